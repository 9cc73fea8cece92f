import numpy as np
import pytest

from cmd_jax.export import search


def _vectors(count, seed):
  return np.random.default_rng(seed).normal(size=(count, 7)).astype(np.float32)


@pytest.mark.parametrize('max_similarities', [2**24, 40, 1])
def test_the_nearest_are_exact_in_blocks(monkeypatch, max_similarities):
  monkeypatch.setattr(search, '_MAX_SIMILARITIES', max_similarities)
  queries, gallery = _vectors(5, 0), _vectors(20, 1)
  gallery[7] = gallery[3]
  unit = [
    x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, gallery)
  ]
  cosines = unit[0] @ unit[1].T
  want = np.argsort(-cosines, axis=1, kind='stable')
  for k in (1, 6, 50):
    got = search.nearest(queries, gallery, k)
    np.testing.assert_array_equal(got.rows, want[:, :k])
    np.testing.assert_allclose(
      got.similarities, np.take_along_axis(cosines, got.rows, 1), atol=1e-5
    )


def test_faiss_finds_the_same():
  pytest.importorskip('faiss')
  queries, gallery = _vectors(5, 0), _vectors(20, 1)
  got = search.nearest_by_faiss(queries, gallery, 6)
  want = search.nearest(queries, gallery, 6)
  np.testing.assert_array_equal(got.rows, want.rows)
  np.testing.assert_allclose(got.similarities, want.similarities, atol=1e-5)
