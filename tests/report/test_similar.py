import numpy as np
import pytest

from cmd_jax.evaluators import Features, knn
from cmd_jax.report import similar


def _features(count, seed, num_classes=4):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, num_classes, count).astype(np.int32)
  centres = np.random.default_rng(9).normal(size=(num_classes, 6))
  vectors = centres[labels] + rng.normal(size=(count, 6))
  names = tuple('abcdefgh'[:num_classes])
  files = tuple(f'{seed}_{i}.png' for i in range(count))
  return Features(vectors.astype(np.float32), labels, names, files)


def test_neighbours_are_those_of_a_full_sort_and_never_oneself(monkeypatch):
  gallery = _features(23, 0).vectors
  queries = np.concatenate([gallery[:9], _features(4, 1).vectors])
  own = np.concatenate([np.arange(9), np.full(4, -1)])
  # Several blocks, the last of them not full.
  monkeypatch.setattr(similar, '_MAX_SIMILARITIES', 5 * len(gallery))
  found = similar.find_nearest(gallery, queries, own, k=6)

  def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)

  cosine = unit(queries) @ unit(gallery).T
  cosine[np.arange(9), np.arange(9)] = -2
  expected = np.argsort(-cosine, axis=1)[:, :6]
  np.testing.assert_array_equal(found.index, expected)
  np.testing.assert_allclose(
    found.similarity, np.take_along_axis(cosine, expected, 1), atol=1e-6
  )


@pytest.mark.parametrize('count, own, expected', [(3, 0, 2), (1, 0, 0)])
def test_a_small_gallery_gives_the_neighbours_it_has(count, own, expected):
  gallery = _features(count, 0).vectors
  found = similar.find_nearest(gallery, gallery[:1], np.array([own]), k=5)
  assert found.index.shape == found.similarity.shape == (1, expected)
  assert own not in found.index


def test_votes_are_those_of_the_protocol():
  train, test = _features(60, 0), _features(40, 1)
  predicted = similar.predict(train, test)
  scores = knn.make_knn(k=20, temperature=0.07)(train, test)
  assert (predicted == test.labels).mean() == pytest.approx(scores['top1'])
  assert 0.3 < scores['top1'] < 1
  # An image without a label has no vote.
  hidden = train.labels.copy()
  hidden[::3] = -1
  np.testing.assert_array_equal(
    similar.predict(train._replace(labels=hidden), test),
    similar.predict(train.take(np.flatnonzero(hidden >= 0)), test),
  )
  assert similar.predict(train._replace(labels=0 * hidden - 1), test) is None


def test_confusions_are_counted_and_the_worst_pairs_come_first():
  labels = np.array([0, 0, 0, 1, 1, 2, 2, -1])
  votes = np.array([0, 1, 1, 0, 1, 2, 1, 0])
  counts = similar.count_confusions(labels, votes, 4)
  assert counts.tolist() == [
    [1, 2, 0, 0],
    [1, 1, 0, 0],
    [0, 1, 1, 0],
    [0, 0, 0, 0],
  ]
  pairs = similar.most_confused(counts, 5)
  assert pairs == [similar.Pair(0, 1, 2, 1), similar.Pair(1, 2, 0, 1)]
  assert similar.most_confused(counts, 1) == pairs[:1]
