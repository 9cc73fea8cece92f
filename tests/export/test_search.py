import numpy as np
import pytest

from cmd_jax.evaluators.nearest import find_nearest
from cmd_jax.export import search


def _vectors(count, seed):
  return np.random.default_rng(seed).normal(size=(count, 7)).astype(np.float32)


def test_faiss_finds_the_same():
  pytest.importorskip('faiss')
  queries, gallery = _vectors(5, 0), _vectors(20, 1)
  got = search.nearest_by_faiss(queries, gallery, 6)
  want = find_nearest(queries, gallery, 6)
  np.testing.assert_array_equal(got.rows, want.rows)
  np.testing.assert_allclose(got.similarities, want.similarities, atol=1e-5)
