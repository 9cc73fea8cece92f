import pathlib

import numpy as np
import pytest

from cmd_jax.evaluators.nearest import find_nearest
from cmd_jax.export import search
from cmd_jax.export.images import Embeddings


def _vectors(count, seed):
  return np.random.default_rng(seed).normal(size=(count, 7)).astype(np.float32)


def _narrow_cone():
  vectors = 100 + _vectors(20, 1)
  return Embeddings(pathlib.Path('x'), tuple(map(str, range(20))), vectors, ())


@pytest.mark.parametrize('without', [(), (3, 7)])
def test_what_lies_in_a_narrow_cone_is_told_apart(without):
  gallery = _narrow_cone()
  query = 100 + _vectors(1, 0)[0]
  found = search.search(query, gallery, 6, without=without)
  offsets = gallery.vectors.astype(np.float64)
  mean = offsets.mean(0)
  offsets, own = offsets - mean, query - mean
  want = offsets @ own / np.linalg.norm(offsets, axis=1) / np.linalg.norm(own)
  want[list(without)] = -2
  rows = np.argsort(-want)[:6]
  np.testing.assert_array_equal(found.rows, rows)
  np.testing.assert_allclose(found.likeness, want[rows], atol=1e-4)
  assert found.cosines.min() > 0.999
  assert np.ptp(found.likeness) > 0.1


def test_one_image_is_found_though_nothing_is_left_of_it():
  gallery = _narrow_cone()
  one = gallery._replace(
    file_names=gallery.file_names[:1], vectors=gallery.vectors[:1]
  )
  found = search.search(gallery.vectors[1], one, 3)
  assert found.rows.tolist() == [0] and found.likeness.tolist() == [0]
  assert found.cosines[0] > 0.999


def test_faiss_finds_the_same():
  pytest.importorskip('faiss')
  queries, gallery = _vectors(5, 0), _vectors(20, 1)
  got = search.nearest_by_faiss(queries, gallery, 6)
  want = find_nearest(queries, gallery, 6)
  np.testing.assert_array_equal(got.rows, want.rows)
  np.testing.assert_allclose(got.similarities, want.similarities, atol=1e-5)
