"""Embeddings whitened by what neighbours differ in."""

import numpy as np
import pytest

from cmd_jax.evaluators import retrieval, whitening
from cmd_jax.evaluators.features import Features, centred, unit_rows


def _kinds(per_kind, seed, num_kinds=30, dim=16, nuisance=3.0):
  """Kinds that differ a little in half of the directions, all alike a lot."""
  kinds = np.random.default_rng(0).normal(size=(num_kinds, dim))
  kinds[:, dim // 2 :] = 0
  rng = np.random.default_rng(seed)
  labels = np.repeat(np.arange(num_kinds), per_kind)
  noise = rng.normal(size=(len(labels), dim))
  noise[:, : dim // 2] *= 0.35
  # What is the same for all kinds, and large: a viewpoint, a light.
  noise[:, dim // 2 :] *= nuisance / 2
  vectors = 5 + kinds[labels] + noise
  names = tuple(map(str, range(len(labels))))
  return Features(
    vectors.astype(np.float32), labels.astype(np.int32), names[:30], names
  )


def test_it_is_the_formula():
  vectors = _kinds(10, 1).vectors
  found = whitening.learn_whitening(vectors)
  units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
  likeness = units @ units.T
  np.fill_diagonal(likeness, -2)
  nearest = np.argsort(-likeness, axis=1)[:, :3]
  d = (units[:, None] - units[nearest]).reshape(-1, units.shape[1])
  covariance = d.T.astype(float) @ d / len(d)
  size = len(covariance)
  spread = np.trace(covariance) / size
  mixed = 0.4 * covariance / spread + 0.6 * np.eye(size)
  # matrix^-2 is the covariance, mixed.
  inverse = np.linalg.inv(found.matrix.astype(float))
  np.testing.assert_allclose(inverse @ inverse, mixed, atol=1e-4)
  np.testing.assert_allclose(found.matrix, found.matrix.T, atol=1e-6)
  mapped = unit_rows(units @ found.matrix)
  np.testing.assert_allclose(found.mean, mapped.mean(0), atol=1e-6)
  ours = found(7.5 * vectors)
  np.testing.assert_allclose(ours, unit_rows(mapped - found.mean), atol=1e-5)


def test_kinds_are_found_where_what_all_share_hides_them():
  train, test = _kinds(10, 1), _kinds(5, 2)
  plain = retrieval.make_centred()(train, test)
  found = retrieval.make_as_searched()(train, test)
  assert found['rank1'] > plain['rank1'] + 0.03
  assert found['mAP'] > plain['mAP'] + 0.02


def test_few_vectors_are_centred_and_equal_ones_too():
  few = _kinds(6, 1).vectors[: whitening.MIN_VECTORS - 1]
  assert whitening.learn_whitening(few) is None
  np.testing.assert_array_equal(whitening.apart_in(few)(few), centred(few, few))
  equal = np.ones((whitening.MIN_VECTORS, 5), np.float32)
  assert whitening.learn_whitening(equal) is None
  assert np.isfinite(whitening.apart_in(equal)(equal)).all()


@pytest.mark.parametrize('scale', [1e-12, 1e12])
def test_the_length_of_vectors_does_not_matter(scale):
  vectors = _kinds(10, 1).vectors
  found = whitening.learn_whitening(vectors)(vectors)
  scaled = (vectors * scale).astype(np.float32)
  ours = whitening.learn_whitening(scaled)(scaled)
  np.testing.assert_allclose(ours, found, atol=1e-3)
