import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from cmd_jax.losses import cmd


def _softmax(rng, *shape):
  return np.asarray(jax.nn.softmax(jnp.array(rng.normal(size=shape) * 2)))


def test_bag_is_the_attention_weighted_mean():
  rng = np.random.default_rng(0)
  regions, attention = _softmax(rng, 2, 3, 4, 5), _softmax(rng, 2, 3, 4)
  bag = cmd.bag_distribution(regions, attention)
  expected = (attention[..., None] * regions).sum(2)
  np.testing.assert_allclose(bag, expected, rtol=1e-5)
  np.testing.assert_allclose(bag.sum(-1), np.ones((2, 3)), rtol=1e-5)


def test_bag_ignores_the_order_of_the_regions():
  rng = np.random.default_rng(1)
  regions, attention = _softmax(rng, 4, 5), _softmax(rng, 4)
  order = rng.permutation(4)
  np.testing.assert_allclose(
    cmd.bag_distribution(regions, attention),
    cmd.bag_distribution(regions[order], attention[order]),
    rtol=1e-6,
  )


def test_bag_by_maximum_is_a_distribution():
  regions = _softmax(np.random.default_rng(2), 3, 4, 5)
  bag = cmd.bag_distribution(regions, None)
  peak = regions.max(1)
  np.testing.assert_allclose(bag, peak / peak.sum(1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize('direction', cmd.KL_DIRECTIONS)
def test_kl_is_the_textbook_one(direction):
  rng = np.random.default_rng(3)
  image, bag = _softmax(rng, 2, 3, 5), _softmax(rng, 2, 3, 5)
  p, q = (image, bag) if direction == 'image_to_bag' else (bag, image)
  expected = np.sum(p * np.log(p / q), axis=-1).mean(1)
  np.testing.assert_allclose(
    cmd.cross_level_kl(image, bag, direction=direction), expected, rtol=1e-4
  )


@pytest.mark.parametrize('direction', cmd.KL_DIRECTIONS)
def test_kl_vanishes_where_the_levels_agree(direction):
  same = _softmax(np.random.default_rng(4), 2, 3, 5)
  np.testing.assert_allclose(
    cmd.cross_level_kl(same, same, direction=direction), [0, 0], atol=1e-6
  )


@pytest.mark.parametrize('direction', cmd.KL_DIRECTIONS)
def test_kl_gradient_reaches_the_bag_alone(direction):
  rng = np.random.default_rng(5)
  image, logits = _softmax(rng, 2, 3, 5), jnp.array(rng.normal(size=(2, 3, 5)))

  def loss(image, logits):
    bag = jax.nn.softmax(logits)
    return cmd.cross_level_kl(image, bag, direction=direction).sum()

  check_grads(
    lambda x: loss(image, x), (logits,), 1, ['rev'], atol=1e-2, rtol=1e-2
  )
  np.testing.assert_array_equal(
    jax.grad(loss)(image, logits), np.zeros((2, 3, 5))
  )


@pytest.mark.parametrize('direction', cmd.KL_DIRECTIONS)
def test_kl_of_probabilities_that_underflow_is_finite(direction):
  certain = jnp.array([[[1.0, 0.0, 0.0]]])
  other = jnp.array([[[0.0, 1.0, 0.0]]])
  value, gradient = jax.value_and_grad(
    lambda bag: cmd.cross_level_kl(certain, bag, direction=direction).sum()
  )(other)
  assert np.isfinite(value) and value > 1
  assert np.all(np.isfinite(gradient))
