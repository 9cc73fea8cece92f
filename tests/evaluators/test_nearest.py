import numpy as np
import pytest

from cmd_jax.evaluators.nearest import find_nearest


def _vectors(count, seed):
  return np.random.default_rng(seed).normal(size=(count, 7)).astype(np.float32)


@pytest.mark.parametrize('per_block', [1, 5, 1000])
def test_neighbours_are_those_of_a_full_sort_and_never_oneself(per_block):
  gallery = _vectors(23, 0)
  queries = np.concatenate([gallery[:9], _vectors(4, 1)])
  own = np.concatenate([np.arange(9), np.full(4, -1)])
  limit = per_block * len(gallery)
  found = find_nearest(queries, gallery, 6, own=own, max_similarities=limit)

  def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)

  cosine = unit(queries) @ unit(gallery).T
  cosine[np.arange(9), np.arange(9)] = -2
  expected = np.argsort(-cosine, axis=1)[:, :6]
  np.testing.assert_array_equal(found.rows, expected)
  np.testing.assert_allclose(
    found.similarities, np.take_along_axis(cosine, expected, 1), atol=1e-6
  )


@pytest.mark.parametrize('count, own, expected', [(3, 0, 2), (1, 0, 0)])
def test_a_small_gallery_gives_the_neighbours_it_has(count, own, expected):
  gallery = _vectors(count, 0)
  found = find_nearest(gallery[:1], gallery, 5, own=np.array([own]))
  assert found.rows.shape == found.similarities.shape == (1, expected)
  assert own not in found.rows


def test_of_equally_similar_ones_the_first_comes_first():
  gallery = _vectors(20, 1)
  gallery[7] = gallery[3]
  found = find_nearest(gallery[3:4], gallery, 50)
  assert found.rows.shape == (1, 20)
  assert found.rows[0, :2].tolist() == [3, 7]
