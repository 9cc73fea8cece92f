import jax
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import special

from cmd_jax.losses import cmd


def _softmax(rng, *shape):
  values = special.softmax(rng.normal(size=shape) * 2, -1)
  return values.astype(np.float32)


_kl = jax.jit(cmd.cross_level_kl, static_argnames='direction')


@pytest.mark.parametrize('direction', cmd.KL_DIRECTIONS)
def test_kl_is_the_textbook_one(direction):
  rng = np.random.default_rng(3)
  image, bag = _softmax(rng, 2, 3, 5), _softmax(rng, 2, 3, 5)
  p, q = (image, bag) if direction == 'image_to_bag' else (bag, image)
  expected = np.sum(p * np.log(p / q), axis=-1)
  np.testing.assert_allclose(
    _kl(image, bag, direction=direction), expected, rtol=1e-4
  )


@pytest.mark.parametrize('direction', cmd.KL_DIRECTIONS)
def test_kl_of_what_is_no_distribution_yet(direction):
  rng = np.random.default_rng(6)
  image, bag = _softmax(rng, 2, 3, 5), _softmax(rng, 2, 3, 5)
  mass = np.float32([[0.5, 1, 2], [3, 4, 5]])
  divergence = _kl(image, bag * mass[..., None], direction=direction)
  normalise = jax.jit(cmd.normalised_kl, static_argnames='direction')
  np.testing.assert_allclose(
    normalise(divergence, mass, direction=direction),
    _kl(image, bag, direction=direction),
    rtol=1e-4,
    atol=1e-6,
  )


@pytest.mark.parametrize('direction', cmd.KL_DIRECTIONS)
def test_kl_vanishes_where_the_levels_agree(direction):
  same = _softmax(np.random.default_rng(4), 2, 3, 5)
  np.testing.assert_allclose(
    _kl(same, same, direction=direction),
    np.zeros((2, 3)),
    atol=1e-6,
  )


@pytest.mark.parametrize('direction', cmd.KL_DIRECTIONS)
def test_kl_gradient_reaches_the_bag_alone(direction):
  rng = np.random.default_rng(5)
  image = _softmax(rng, 2, 3, 5)
  logits = np.float32(rng.normal(size=(2, 3, 5)))

  @jax.jit
  def loss(image, logits):
    bag = jax.nn.softmax(logits)
    return cmd.cross_level_kl(image, bag, direction=direction).sum()

  check_grads(
    lambda x: loss(image, x), (logits,), 1, ['rev'], atol=1e-2, rtol=1e-2
  )
  np.testing.assert_array_equal(
    jax.jit(jax.grad(loss))(image, logits), np.zeros((2, 3, 5))
  )


@pytest.mark.parametrize('direction', cmd.KL_DIRECTIONS)
def test_kl_of_probabilities_that_underflow_is_finite(direction):
  certain = np.float32([[[1.0, 0.0, 0.0]]])
  other = np.float32([[[0.0, 1.0, 0.0]]])
  value, gradient = jax.jit(
    jax.value_and_grad(lambda bag: _kl(certain, bag, direction=direction).sum())
  )(other)
  assert np.isfinite(value) and value > 1
  assert np.all(np.isfinite(gradient))
