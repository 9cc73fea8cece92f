import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.errors import UserError
from cmd_jax.models import pooling
from tests import tiny

MAPS = np.random.default_rng(0).uniform(0, 6, (2, 3, 4, 5)).astype(np.float32)


@pytest.mark.parametrize('exponent', [1.0, 2.0, 3.0])
def test_generalised_mean_is_the_root_of_the_mean_of_powers(exponent):
  found = pooling.generalised_mean(jnp.asarray(MAPS), exponent)
  expected = (MAPS.astype(np.float64) ** exponent).mean((1, 2))
  np.testing.assert_allclose(found, expected ** (1 / exponent), rtol=1e-5)


def test_generalised_mean_lies_between_the_mean_and_the_maximum():
  values = [
    np.asarray(pooling.generalised_mean(jnp.asarray(MAPS), p))
    for p in (1.0, 2.0, 8.0, 64.0)
  ]
  assert all((a < b).all() for a, b in zip(values, values[1:]))
  assert (values[-1] < MAPS.max((1, 2))).all()


@pytest.mark.parametrize('scale', [0.0, 1e-4, 1e30])
def test_generalised_mean_is_finite_and_has_a_gradient(scale):
  maps = jnp.asarray(MAPS) * scale
  value, gradient = jax.value_and_grad(
    lambda x: pooling.generalised_mean(x).sum()
  )(maps)
  assert np.isfinite(value) and np.isfinite(gradient).all()
  largest = float(maps.max(initial=1e-6))
  assert value <= 10.001 * largest


def test_maps_of_a_convolutional_network_are_pooled():
  encoder = tiny.make_tiny_encoder('efficientnet')
  images = jnp.asarray(
    np.random.default_rng(1).normal(size=(2, 64, 64, 3)), jnp.float32
  )
  variables = tiny.draw_like(
    jax.eval_shape(encoder.init, jax.random.key(0), images)
  )
  maps = jax.jit(lambda v, x: encoder.apply(v, x, method='stages'))(
    variables, images
  )
  found = jax.jit(
    lambda v, x: tuple(
      pooling.pooled(encoder, v, x, how) for how in pooling.POOLINGS
    )
  )(variables, images)
  # The head's map, through its activation.
  assert float(maps[-1].min()) >= 0
  np.testing.assert_allclose(found[0], maps[-1].mean((1, 2)), atol=1e-5)
  np.testing.assert_allclose(
    found[1], jnp.sqrt((maps[-1] ** 2).mean((1, 2))), atol=1e-5
  )
  weights = np.linalg.norm(maps[-1], axis=-1, keepdims=True)
  weights /= weights.sum((1, 2), keepdims=True)
  np.testing.assert_allclose(
    found[2], (weights * maps[-1]).sum((1, 2)), atol=1e-4
  )


def test_a_strong_place_counts_for_more_and_none_is_the_mean():
  maps = jnp.ones((1, 2, 2, 3)).at[0, 0, 0].set(9.0)
  found = pooling.mean_by_strength(maps)
  np.testing.assert_allclose(
    found, (9 * 9 + 3) / 12 * np.ones((1, 3)), rtol=1e-5
  )
  assert not pooling.mean_by_strength(jnp.zeros((1, 2, 2, 3))).any()


def test_what_an_encoder_does_not_have_is_refused():
  for name in ('resnet', 'efficientnet'):
    pooling.check_pooling(tiny.make_tiny_encoder(name), 'gem', 'pooling')
  vit = tiny.make_tiny_encoder('vit')
  pooling.check_pooling(vit, 'encoder', 'pooling')
  with pytest.raises(UserError, match="^here is 'gem', .*VisionTransformer"):
    pooling.check_pooling(vit, 'gem', 'here')
  with pytest.raises(UserError, match='choose one of encoder, gem, strength'):
    pooling.check_pooling(vit, 'mean', 'here')
