"""Shifted sums against XLA's grouped convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.models import depthwise
from tests import tiny


def _draw(height, width, kernel_px, channels=3):
  x = tiny.normal(2, height, width, channels)
  return x, tiny.normal(kernel_px, kernel_px, 1, channels, seed=1)


# What TensorFlow documents for 'SAME'; an even side has more at its end.
@pytest.mark.parametrize(
  'sides, kernel_px, stride, expected',
  [
    ((8, 8), 3, 1, ((1, 1), (1, 1))),
    ((8, 7), 3, 2, ((0, 1), (1, 1))),
    ((8, 7), 5, 2, ((1, 2), (2, 2))),
    ((1, 2), 3, 2, ((1, 1), (0, 1))),
  ],
)
def test_padding(sides, kernel_px, stride, expected):
  assert depthwise.same_padding(sides, kernel_px, stride) == expected


@pytest.mark.parametrize('kernel_px', [3, 5])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('sides', [(8, 8), (7, 6), (2, 3), (1, 1)])
def test_values_and_gradients_are_those_of_the_convolution(
  sides, stride, kernel_px
):
  x, kernel = _draw(*sides, kernel_px)

  @jax.jit
  def run(x, kernel):
    def pulled(convolve):
      y, pull = jax.vjp(lambda *args: convolve(*args, stride), x, kernel)
      return y, *pull(tiny.normal(*y.shape, seed=2))

    return (
      pulled(depthwise.grouped_convolution),
      pulled(depthwise.shifted_products),
    )

  expected, found = run(x, kernel)
  assert found[0].shape == (
    2,
    -(-sides[0] // stride),
    -(-sides[1] // stride),
    3,
  )
  for ours, theirs in zip(found, expected, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_each_channel_has_its_own_kernel():
  x, kernel = _draw(4, 4, 3)
  convolve = jax.jit(depthwise.depthwise, static_argnums=2)
  full = np.asarray(convolve(x, kernel, 1))
  kernel[..., 1] = 0
  y = np.asarray(convolve(x, kernel, 1))
  np.testing.assert_array_equal(y[..., 1], 0)
  np.testing.assert_array_equal(y[..., ::2], full[..., ::2])


def test_bfloat16_is_summed_in_float32():
  x, kernel = (a.astype(jnp.bfloat16) for a in _draw(6, 6, 5))
  convolve = jax.jit(depthwise.shifted_products, static_argnums=2)
  exact = convolve(x.astype(np.float32), kernel.astype(np.float32), 1)
  found = convolve(x, kernel, 1)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


def test_every_platform_gets_what_is_fast_there():
  x, kernel = _draw(8, 8, 3)

  def lowered(platform):
    traced = jax.jit(depthwise.depthwise, static_argnums=2).trace(x, kernel, 2)
    return traced.lower(lowering_platforms=(platform,)).as_text()

  assert 'stablehlo.convolution' not in lowered('cpu')
  assert 'feature_group_count = 3' in lowered('cuda')
  assert 'feature_group_count = 3' in lowered('tpu')
