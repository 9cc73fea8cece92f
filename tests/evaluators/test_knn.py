from __future__ import annotations

import numpy as np
import pytest

from cmd_jax.evaluators import Features
from cmd_jax.evaluators.knn import make_knn, predict


def _splits(train: int, test: int, classes: int = 12) -> list[Features]:
  rng = np.random.default_rng(3)
  centres = rng.normal(size=(classes, 16))
  splits = []
  for count in (train, test):
    labels = rng.integers(0, classes, count).astype(np.int32)
    vectors = centres[labels] + 1.3 * rng.normal(size=(count, 16))
    vectors *= rng.uniform(0.1, 9, (count, 1))
    names = tuple(map(str, range(count)))
    splits.append(
      Features(vectors.astype(np.float32), labels, tuple('abcdefghijkl'), names)
    )
  return splits


def _naive(train: Features, test: Features, k: int, temperature: float):
  hits = np.zeros(2)
  for vector, label in zip(test.vectors, test.labels):
    cosines = [
      float(np.dot(vector, v) / np.linalg.norm(vector) / np.linalg.norm(v))
      for v in train.vectors.astype(np.float64)
    ]
    votes = {}
    for i in np.argsort(cosines)[::-1][:k]:
      votes.setdefault(int(train.labels[i]), 0.0)
      votes[int(train.labels[i])] += np.exp(cosines[i] / temperature)
    ranking = sorted(votes, key=votes.get, reverse=True)
    hits += [label in ranking[:1], label in ranking[:5]]
  return dict(zip(('top1', 'top5'), hits / len(test.labels)))


@pytest.mark.parametrize('k', [1, 3, 20, 1000])
@pytest.mark.parametrize('temperature', [0.07, 1.0])
def test_equals_a_plain_loop(k, temperature):
  train, test = _splits(150, 61)
  got = make_knn(k, temperature)(train, test)
  want = _naive(train, test, k, temperature)
  assert 0.2 < want['top1'] < 0.95
  assert got == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize('chunk', [1, 7, 60, 61])
def test_chunks_change_nothing(chunk):
  train, test = _splits(150, 61)
  want = make_knn(5)(train, test)
  assert make_knn(5, max_similarities=150 * chunk)(train, test) == want


def test_class_without_train_examples_is_an_error():
  train, test = _splits(150, 61)
  kept = train.labels != 4
  reduced = train._replace(
    vectors=train.vectors[kept], labels=train.labels[kept]
  )
  only = test.labels == 4
  test = test._replace(vectors=test.vectors[only], labels=test.labels[only])
  assert make_knn(20)(train, test)['top5'] > 0.5
  assert make_knn(20)(reduced, test) == {'top1': 0.0, 'top5': 0.0}


def test_small_temperature_does_not_overflow():
  train, test = _splits(150, 61)
  assert make_knn(20, 1e-4)(train, test)['top1'] == pytest.approx(
    make_knn(1)(train, test)['top1'], abs=1e-12
  )


def test_refuses_bad_arguments():
  with pytest.raises(ValueError, match='positive'):
    make_knn(0)
  with pytest.raises(ValueError, match='positive'):
    make_knn(5, 0.0)


def test_what_is_predicted_is_what_is_scored():
  train, test = _splits(150, 61)
  predicted = predict(train, test)
  assert predicted.shape == (61,) and predicted.dtype == np.int32
  scores = make_knn()(train, test)
  assert (predicted == test.labels).mean() == pytest.approx(scores['top1'])
  # An image without a label has no vote, and can be voted on.
  hidden = train.labels.copy()
  hidden[::3] = -1
  np.testing.assert_array_equal(
    predict(train._replace(labels=hidden), test),
    predict(train.take(np.flatnonzero(hidden >= 0)), test),
  )
  unknown = test._replace(labels=np.full_like(test.labels, -1))
  np.testing.assert_array_equal(predict(train, unknown), predicted)
  assert predict(train._replace(labels=np.full_like(hidden, -1)), test) is None
