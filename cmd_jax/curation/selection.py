"""Which images to label first: facility location, weighted by typicality."""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np

# Images among which is chosen; all cosines between them are 256 MiB.
MAX_POOL = 8192
_SEED = 0


class Selection(NamedTuple):
  """Images to label, the most useful first.

  Attributes:
    rows: [n] of the images.
    coverage: mean cosine of an image to the nearest one that is chosen or was
      labelled before, over the images chosen from.
    by_chance: the same of as many images chosen by chance.
    pool_size: images that were chosen from.
  """

  rows: np.ndarray
  coverage: float
  by_chance: float
  pool_size: int


def _greedy(
  similarities: np.ndarray, weights: np.ndarray, best: np.ndarray, count: int
) -> list[int]:
  """Rows of the pool, each the one that adds most, by lazy evaluation."""

  def gain(row: int) -> float:
    added = similarities[row] - best
    return float(weights @ np.maximum(added, 0))

  # Gains only fall (submodularity), so an old one is an upper bound.
  queue = [(-gain(row), row, 0) for row in range(len(similarities))]
  heapq.heapify(queue)
  chosen = []
  while len(chosen) < count:
    _, row, when = heapq.heappop(queue)
    if when == len(chosen):
      chosen.append(row)
      np.maximum(best, similarities[row], out=best)
    else:
      heapq.heappush(queue, (-gain(row), row, len(chosen)))
  return chosen


def _cover(similarities: np.ndarray, rows: np.ndarray, start: np.ndarray):
  if not len(rows):
    return float(start.mean())
  return float(np.maximum(similarities[rows].max(0), start).mean())


def select(
  directions: np.ndarray,
  typicality: np.ndarray,
  candidates: np.ndarray,
  labelled: np.ndarray,
  count: int,
) -> Selection:
  """Chooses images that all others are like.

  Maximises, greedily and so to within 1 - 1/e of the best (Nemhauser et al.
  1978), the sum over the pool of w_i max_s cos(i, s), s chosen or labelled
  before: every image should have a labelled one near it, and the more so the
  more typical it is (w_i, from 0 for the least typical to 1).

  Args:
    directions: [N, D] unit vectors.
    typicality: [N].
    candidates: [M] rows to choose from, a random sample if there are many.
    labelled: [L] rows that have a label already; of many a random sample.
    count: n; fewer where there are fewer candidates.
  """
  rng = np.random.default_rng(_SEED)
  pool, known = (
    rows
    if len(rows) <= MAX_POOL
    else np.sort(rng.choice(rows, MAX_POOL, replace=False))
    for rows in (candidates, labelled)
  )
  count = min(count, len(pool))
  if not count:
    return Selection(np.zeros(0, int), 0.0, 0.0, len(pool))
  vectors = directions[pool]
  similarities = np.maximum(vectors @ vectors.T, 0)
  start = np.zeros(len(pool), np.float32)
  if len(known):
    start = np.maximum((vectors @ directions[known].T).max(1), 0)
  low, high = typicality[pool].min(), typicality[pool].max()
  weights = (typicality[pool] - low + 1e-3) / (high - low + 1e-3)
  chosen = _greedy(
    similarities, weights.astype(np.float32), start.copy(), count
  )
  random = rng.choice(len(pool), count, replace=False)
  return Selection(
    pool[chosen],
    _cover(similarities, np.array(chosen), start),
    _cover(similarities, random, start),
    len(pool),
  )
