from __future__ import annotations

import numpy as np
import pytest

from cmd_jax.evaluators import Features
from cmd_jax.evaluators.labels import choose, make_label_share
from cmd_jax.evaluators.linear import make_logreg


def test_shares_are_stratified_and_nested():
  labels = np.repeat([0, 1, 2, 3], [50, 10, 3, 1])
  for seed in (0, 1):
    kept = {percent: choose(labels, percent, seed) for percent in (10, 20, 50)}
    assert set(kept[10]) <= set(kept[20]) <= set(kept[50])
    counts = [np.bincount(labels[rows]).tolist() for rows in kept.values()]
    assert counts == [[5, 1, 1, 1], [10, 2, 1, 1], [25, 5, 2, 1]]
    assert all(np.all(np.diff(rows) > 0) for rows in kept.values())
  assert set(choose(labels, 10, 0)) != set(choose(labels, 10, 1))
  np.testing.assert_array_equal(choose(labels, 100, 0), np.arange(64))


def _splits() -> list[Features]:
  rng = np.random.default_rng(3)
  centres = rng.normal(size=(4, 6))
  splits = []
  for count in (80, 40):
    labels = (np.arange(count) % 4).astype(np.int32)
    vectors = centres[labels] + rng.normal(size=(count, 6))
    names = tuple(map(str, range(count)))
    splits.append(
      Features(vectors.astype(np.float32), labels, tuple('abcd'), names)
    )
  return splits


def test_scores_are_the_mean_over_the_draws():
  train, test = _splits()
  got = make_label_share(20, num_seeds=2)(train, test)
  draws = [
    make_logreg()(train.take(choose(train.labels, 20, seed)), test)['top1']
    for seed in range(2)
  ]
  assert got == pytest.approx(
    {'top1': np.mean(draws), 'top1_std': np.std(draws)}
  )
  assert make_label_share(100)(train, test) == make_logreg()(train, test)


def test_refuses_bad_arguments():
  for percent, seeds in ((0, 3), (101, 3), (10, 0)):
    with pytest.raises(ValueError, match='percent must be'):
      make_label_share(percent, seeds)
