import numpy as np
import pytest

from cmd_jax.evaluators import label_free


def _by_definition(vectors):
  values = np.linalg.svd(vectors.astype(np.float64), compute_uv=False)
  shares = values / values.sum() + 1e-7
  return np.exp(-(shares * np.log(shares)).sum())


@pytest.mark.parametrize('shape', [(40, 8), (8, 40)])
def test_rankme_is_the_entropy_of_the_singular_values(shape):
  rng = np.random.default_rng(0)
  vectors = (rng.normal(size=shape) * np.arange(1, shape[1] + 1)).astype('f')
  expected = _by_definition(vectors)
  assert 1 < expected < 8
  assert label_free.rankme(vectors) == pytest.approx(expected, rel=1e-5)


def test_rankme_of_one_direction_and_of_all():
  one = np.outer(np.arange(1, 20), np.ones(6))
  assert label_free.rankme(one) == pytest.approx(1, abs=1e-4)
  assert label_free.rankme(np.zeros((5, 3))) == 1
  assert label_free.rankme(np.eye(6)) == pytest.approx(6, rel=1e-4)
  # The length of the vectors says nothing, their mean does.
  assert label_free.rankme(1e-3 * np.eye(6)) == pytest.approx(6, rel=1e-4)
  assert label_free.rankme(np.eye(6) + 5) < 4


def test_nobody_is_a_neighbour_of_its_own():
  vectors = np.array([[1, 0], [9, 1], [0, 2], [-1, 8]], np.float32)
  assert label_free.nearest_neighbours(vectors).tolist() == [1, 0, 3, 2]
  assert label_free.nearest_neighbours(vectors[:1]).size == 0
