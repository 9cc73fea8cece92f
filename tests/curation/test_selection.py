import itertools

import numpy as np

from cmd_jax.curation.selection import select
from cmd_jax.evaluators.features import unit_rows


def _clusters():
  rng = np.random.default_rng(0)
  of = np.repeat(np.arange(4), [40, 30, 20, 10])
  centres = np.eye(8)[:4]
  return unit_rows(centres[of] + 0.1 * rng.normal(size=(100, 8))), of


def _all_rows(vectors):
  return np.arange(len(vectors))


def test_each_cluster_has_one_before_any_has_two():
  vectors, of = _clusters()
  typicality = np.ones(len(vectors))
  found = select(vectors, typicality, _all_rows(vectors), np.zeros(0, int), 4)
  assert sorted(of[found.rows]) == [0, 1, 2, 3]
  # The largest is worth most.
  assert of[found.rows[0]] == 0
  assert found.coverage > found.by_chance


def test_greedy_is_as_good_as_its_bound():
  vectors, _ = _clusters()
  vectors = vectors[::7]
  similarities = np.maximum(vectors @ vectors.T, 0)
  none = np.zeros(0, int)
  found = select(vectors, np.ones(len(vectors)), _all_rows(vectors), none, 3)
  best = max(
    similarities[list(rows)].max(0).mean()
    for rows in itertools.combinations(range(len(vectors)), 3)
  )
  assert found.coverage >= (1 - 1 / np.e) * best
  assert found.coverage <= best + 1e-6


def test_what_is_labelled_already_is_covered():
  vectors, of = _clusters()
  labelled = np.flatnonzero(of < 2)[::5]
  candidates = np.setdiff1d(_all_rows(vectors), labelled)
  typicality = np.ones(len(vectors))
  found = select(vectors, typicality, candidates, labelled, 2)
  assert sorted(of[found.rows]) == [2, 3]


def test_outliers_come_last_and_more_than_there_are_is_all():
  vectors, of = _clusters()
  vectors = np.concatenate([vectors, -np.eye(8, dtype=np.float32)[7:]])
  typicality = np.append(np.ones(len(of)), 0.0)
  found = select(
    vectors, typicality, _all_rows(vectors), np.zeros(0, int), 1000
  )
  assert sorted(found.rows) == list(range(101))
  assert 100 not in found.rows[:4]
  nothing = select(vectors, typicality, np.zeros(0, int), _all_rows(vectors), 5)
  assert not len(nothing.rows)
