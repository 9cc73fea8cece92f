"""Shifted sums against XLA's grouped convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.models import depthwise


def _draw(height, width, kernel_px, channels=3):
  keys = jax.random.split(jax.random.key(0))
  shape = (2, height, width, channels)
  x = jax.random.normal(keys[0], shape)
  kernel = jax.random.normal(keys[1], (kernel_px, kernel_px, 1, channels))
  return x, kernel


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

  def run(convolve):
    y, pull = jax.vjp(lambda *args: convolve(*args, stride), x, kernel)
    cotangent = jax.random.normal(jax.random.key(1), y.shape)
    return y, *pull(cotangent)

  expected = jax.jit(run, static_argnums=0)(depthwise.grouped_convolution)
  found = jax.jit(run, static_argnums=0)(depthwise.shifted_products)
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
  y = depthwise.depthwise(x, kernel.at[..., 1].set(0), 1)
  full = depthwise.depthwise(x, kernel, 1)
  np.testing.assert_array_equal(y[..., 1], 0)
  np.testing.assert_array_equal(y[..., ::2], full[..., ::2])


def test_bfloat16_is_summed_in_float32():
  x, kernel = (a.astype(jnp.bfloat16) for a in _draw(6, 6, 5))
  exact = depthwise.shifted_products(
    x.astype(jnp.float32), kernel.astype(jnp.float32), 1
  )
  found = depthwise.shifted_products(x, kernel, 1)
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
