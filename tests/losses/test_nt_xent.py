import jax
import numpy as np
import pytest

from cmd_jax.devices import sharding
from cmd_jax.losses import simclr
from tests import tiny


def _embeddings(batch=4):
  x = tiny.normal(batch, 2, 6)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


@jax.jit
def _nt_xent(embeddings, temperature):
  return simclr.nt_xent(embeddings, temperature=temperature, axis_name=None)


def _by_hand(embeddings, temperature):
  """Equation 1 of Chen et al., a pair at a time."""
  z = np.asarray(embeddings, np.float64)
  flat = z.reshape(-1, z.shape[-1])
  values = np.zeros(len(z))
  for i in range(len(flat)):
    j = i + 1 if i % 2 == 0 else i - 1
    total = sum(
      np.exp(flat[i] @ flat[k] / temperature)
      for k in range(len(flat))
      if k != i
    )
    values[i // 2] -= np.log(np.exp(flat[i] @ flat[j] / temperature) / total)
  return values / 2


@pytest.mark.parametrize('temperature', [0.1, 1.0])
def test_it_is_the_formula_pair_by_pair(temperature):
  embeddings = _embeddings()
  values = _nt_xent(embeddings, temperature)
  np.testing.assert_allclose(
    values, _by_hand(embeddings, temperature), rtol=1e-5
  )


def test_the_gradient_is_that_of_finite_differences():
  embeddings, direction = (
    _embeddings(),
    np.random.default_rng(1).normal(size=(4, 2, 6)),
  )
  gradient = jax.jit(jax.grad(lambda z: _nt_xent(z, 0.5).sum()))(embeddings)
  step = 1e-5
  there, back = (
    _by_hand(np.asarray(embeddings, np.float64) + sign * direction, 0.5).sum()
    for sign in (step, -step)
  )
  np.testing.assert_allclose(
    np.sum(np.asarray(gradient) * direction),
    (there - back) / (2 * step),
    rtol=1e-3,
  )


def test_devices_contrast_with_the_images_of_all():
  embeddings = _embeddings(8)

  def share(z):
    return simclr.nt_xent(z, temperature=0.2, axis_name=sharding.DATA_AXIS)

  by_device = jax.pmap(share, axis_name=sharding.DATA_AXIS)(
    embeddings.reshape(4, 2, 2, 6)
  )
  np.testing.assert_allclose(
    np.ravel(by_device),
    _nt_xent(embeddings, 0.2),
    rtol=1e-5,
  )


def test_views_that_are_alike_cost_less():
  apart = _embeddings()
  alike = np.stack([apart[:, 0], apart[:, 0]], axis=1)
  costs = [np.mean(_nt_xent(x, 0.1)) for x in (alike, apart)]
  assert costs[0] < costs[1]
