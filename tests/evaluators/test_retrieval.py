from __future__ import annotations

import logging

import numpy as np
import pytest

from cmd_jax.data.sources import index
from cmd_jax.evaluators import Features
from cmd_jax.evaluators.retrieval import (
  make_centred,
  make_cmd_ratio9,
  make_loo,
  make_retrieval,
)


def _splits(train: int, test: int) -> list[Features]:
  rng = np.random.default_rng(5)
  centres = rng.normal(size=(6, 10))
  splits = []
  for count in (train, test):
    labels = rng.integers(0, 6, count).astype(np.int32)
    vectors = centres[labels] + 1.5 * rng.normal(size=(count, 10))
    names = tuple(map(str, range(count)))
    splits.append(
      Features(vectors.astype(np.float32), labels, tuple('abcdef'), names)
    )
  return splits


def _naive(train: Features, test: Features) -> dict[str, float]:
  rank1 = rank5 = 0
  precisions = []
  for vector, label in zip(test.vectors, test.labels):
    cosines = [
      float(np.dot(vector, v) / np.linalg.norm(vector) / np.linalg.norm(v))
      for v in train.vectors.astype(np.float64)
    ]
    hits = [train.labels[i] == label for i in np.argsort(cosines)[::-1]]
    rank1 += any(hits[:1])
    rank5 += any(hits[:5])
    found, total = 0, 0.0
    for place, hit in enumerate(hits, start=1):
      if hit:
        found += 1
        total += found / place
    if found:
      precisions.append(total / found)
  count = len(test.labels)
  return {
    'rank1': rank1 / count,
    'rank5': rank5 / count,
    'mAP': sum(precisions) / len(precisions),
  }


@pytest.mark.parametrize(('train', 'test'), [(120, 53), (3, 20), (41, 1)])
def test_equals_a_plain_loop(train, test):
  train, test = _splits(train, test)
  got = make_retrieval()(train, test)
  assert got == pytest.approx(_naive(train, test), rel=1e-5)


def test_centred_takes_the_mean_of_train_off_both():
  train, test = _splits(120, 53)
  cone = np.float32(40)
  narrow = [x._replace(vectors=x.vectors + cone) for x in (train, test)]
  mean = narrow[0].vectors.astype(np.float64).mean(0)
  want = _naive(*(x._replace(vectors=x.vectors - mean) for x in narrow))
  assert make_centred()(*narrow) == pytest.approx(want, rel=1e-5)
  # Without it the cone hides what the images differ in.
  assert make_retrieval()(*narrow)['mAP'] < want['mAP'] - 0.02


@pytest.mark.parametrize('chunk', [1, 8, 52, 53])
def test_chunks_change_nothing(chunk):
  train, test = _splits(120, 53)
  want = make_retrieval()(train, test)
  got = make_retrieval(max_similarities=120 * chunk)(train, test)
  assert got == pytest.approx(want, rel=1e-6)


def test_queries_without_relevant_images(caplog):
  train, test = _splits(120, 53)
  kept = train.labels != 2
  train = train._replace(vectors=train.vectors[kept], labels=train.labels[kept])
  orphans = int((test.labels == 2).sum())
  assert orphans > 0
  with caplog.at_level(logging.WARNING):
    got = make_retrieval()(train, test)
  assert got == pytest.approx(_naive(train, test), rel=1e-5)
  assert f'{orphans} of 53 queries' in caplog.text

  only = test.labels == 2
  test = test._replace(vectors=test.vectors[only], labels=test.labels[only])
  # There is no precision of nothing.
  assert make_retrieval()(train, test) == {'rank1': 0, 'rank5': 0}
  alone = test.take(np.array([0]))
  assert make_loo()(train, alone) == {'rank1': 0, 'rank5': 0}
  assert make_cmd_ratio9()(train, alone) == {'rank1': 0, 'rank5': 0}


def test_hand_computed_average_precision():
  train = Features(
    np.float32([[1, 0], [1, 1], [0, 1], [-1, 0]]),
    np.int32([1, 0, 1, 0]),
    ('x', 'y'),
    tuple('abcd'),
  )
  test = Features(np.float32([[5, 0.1]]), np.int32([0]), ('x', 'y'), ('q',))
  got = make_retrieval()(train, test)
  want = {'rank1': 0.0, 'rank5': 1.0, 'mAP': (1 / 2 + 2 / 4) / 2}
  assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize('max_similarities', [2**22, 53 * 7])
def test_leave_one_out_is_retrieval_among_the_others(max_similarities):
  train, test = _splits(4, 53)
  # Twins tie with the query itself, which must not be found.
  test.vectors[1], test.vectors[2] = test.vectors[0], test.vectors[0]
  got = make_loo(max_similarities)(train, test)
  wants = []
  for row in range(53):
    others = test.take(np.delete(np.arange(53), row))
    wants.append(make_retrieval()(others, test.take(np.array([row]))))
  for name in ('rank1', 'rank5', 'mAP'):
    want = np.mean([scores[name] for scores in wants])
    assert got[name] == pytest.approx(want, rel=1e-5)


def test_ties_keep_the_order_of_the_gallery():
  train = Features(
    np.float32([[2, 0], [1, 0], [0, 1], [3, 0]]),
    np.int32([1, 0, 0, 0]),
    ('x', 'y'),
    tuple('abcd'),
  )
  test = Features(np.float32([[1, 0]]), np.int32([0]), ('x', 'y'), ('q',))
  got = make_retrieval()(train, test)
  # Relevant are the second and third of three equals, and the last.
  want = {'rank1': 0.0, 'rank5': 1.0, 'mAP': (1 / 2 + 2 / 3 + 3 / 4) / 3}
  assert got == pytest.approx(want)


def test_names_may_be_any_sequence():
  train, test = _splits(20, 30)
  plain = make_cmd_ratio9()(train, test)
  compact = [
    x._replace(file_names=index.Names.of(x.file_names)) for x in (train, test)
  ]
  assert make_cmd_ratio9()(*compact) == plain
