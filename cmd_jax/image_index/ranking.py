"""The nearest images of an index, by the ranking of `cmd-jax search`.

Cosines after the mean of the live rows was taken off. All rows are compared up
to `EXACT_UP_TO`; beyond it inverted lists give candidates of the rows that they
are of, and rows that were added since are all compared.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import numpy as np

from cmd_jax.errors import UserError
from cmd_jax.evaluators.features import unit_rows
from cmd_jax.evaluators.nearest import find_nearest
from cmd_jax.image_index.inverted_lists import (
  Inverted,
  make_lists,
  open_lists,
  save_lists,
)
from cmd_jax.image_index.store import LIVE, Index, Lists

# Rows that are compared one by one: at 384 numbers a query takes 5 ms.
EXACT_UP_TO = 50_000
# Candidates of the lists for each result: with 8 bits, the nearest are not
# always the first.
_CANDIDATES = 4
# Results beside those wanted that may fall away: the query itself, files gone.
_SPARE = 16
# Share of the ten nearest that lists must find, measured when they are made.
_RECALL, _RECALL_OF = 0.97, 10
_MEASURED_ON = 256
_BLOCK = 1 << 15
# Vectors compared anew at a time.
_RERANKED = 1 << 16


class Ranked(NamedTuple):
  """The nearest live rows of Q queries, the nearest first.

  Attributes:
    rows: [Q, k] rows of the index; -1 where there are no more.
    likeness: [Q, k] cosines after the mean was taken off.
    cosines: [Q, k] cosines of the rows as they are.
  """

  rows: np.ndarray
  likeness: np.ndarray
  cosines: np.ndarray


def _merge(parts: list[tuple[np.ndarray, np.ndarray]], k: int):
  """The k best of several (rows, similarities) [Q, any]."""
  rows, similarities = (np.concatenate(x, axis=1) for x in zip(*parts))
  order = np.argsort(-similarities, axis=1, kind='stable')[:, :k]
  return tuple(
    np.take_along_axis(x, order, axis=1) for x in (rows, similarities)
  )


def exact(
  queries: np.ndarray,
  vectors: np.ndarray,
  mean: np.ndarray,
  allowed: np.ndarray,
  k: int,
) -> tuple[np.ndarray, np.ndarray]:
  """The nearest of the allowed rows [A], block by block.

  Returns:
    [Q, k] rows and [Q, k] cosines around the mean; fewer than k where there are
    fewer rows.
  """
  around = queries.astype(np.float32) - mean
  best = []
  for start in range(0, len(allowed), _BLOCK):
    block = allowed[start : start + _BLOCK]
    found = find_nearest(around, vectors[block] - mean, k)
    best.append((block[found.rows], found.similarities))
    best = [_merge(best, k)] if len(best) > 1 else best
  if not best:
    none = np.zeros((len(queries), 0))
    return none.astype(int), none.astype(np.float32)
  return best[0]


def compare(
  queries: np.ndarray,
  vectors: np.ndarray,
  mean: np.ndarray,
  rows: np.ndarray,
  states: np.ndarray,
) -> np.ndarray:
  """Cosines of queries and candidates, from their full vectors.

  Args:
    queries: [Q, D] embeddings.
    vectors: [N, D] of the index.
    mean: [D] that is taken off, or 0.
    rows: [Q, c] candidates; -1 for none.
    states: [N] of the rows.

  Returns:
    [Q, c] float32; -2 for what is no result.
  """
  similarities = np.empty(rows.shape, np.float32)
  around = unit_rows(queries - mean)
  size = max(_RERANKED // max(rows.shape[1], 1), 1)
  for start in range(0, len(rows), size):
    block = rows[start : start + size]
    # Candidates of many queries are the same rows.
    unique, place = np.unique(np.maximum(block, 0), return_inverse=True)
    directions = unit_rows(vectors[unique] - mean)
    similarities[start : start + size] = np.einsum(
      'qd,qcd->qc',
      around[start : start + size],
      directions[place.reshape(block.shape)],
    )
  is_result = (rows >= 0) & (states[rows] == LIVE)
  return np.where(is_result, similarities, -2)


def _by_lists(
  index: Index,
  inverted: Inverted,
  vectors: np.ndarray,
  queries: np.ndarray,
  k: int,
) -> tuple[np.ndarray, np.ndarray]:
  lists, items = index.lists, index.items
  rows = inverted.candidates(queries, _CANDIDATES * k, lists.probes)
  listed = compare(queries, vectors, items.mean, rows, items.states)
  live = items.live
  later = exact(queries, vectors, items.mean, live[live >= lists.rows], k)
  rows, similarities = _merge([(rows, listed), later], k)
  # No candidate, or none that is a result.
  return np.where(similarities > -2, rows, -1), similarities


def rank(
  index: Index,
  queries: np.ndarray,
  k: int,
  *,
  without: np.ndarray | None = None,
) -> Ranked:
  """The k nearest live rows of every query.

  Args:
    index: that is searched.
    queries: [Q, D] as the rows are, see `Index.like_rows`.
    k: how many are wanted; fewer where there are fewer.
    without: [Q] a row that is no result of the query; -1 for none.

  Raises:
    UserError: there is no live row, or files are damaged.
  """
  vectors, live = index.vectors(), index.items.live
  if not len(live):
    raise UserError(
      f'{index.path} has no image that is still there: cmd-jax index add adds '
      'some'
    )
  wanted = k + (0 if without is None else 1)
  inverted = _open_lists(index)
  if inverted is None:
    rows, similarities = exact(queries, vectors, index.items.mean, live, wanted)
  else:
    rows, similarities = _by_lists(
      index, inverted, vectors, queries, wanted + _SPARE
    )
  if without is not None:
    # A stable sort puts the query itself behind all others.
    order = np.argsort(rows == without[:, None], axis=1, kind='stable')
    rows, similarities = (
      np.take_along_axis(x, order, axis=1) for x in (rows, similarities)
    )
    is_own = rows == without[:, None]
    rows = np.where(is_own, -1, rows)
  rows, similarities = rows[:, :k], similarities[:, :k]
  cosines = compare(queries, vectors, np.float32(0), rows, index.items.states)
  return Ranked(rows, similarities, cosines)


def _open_lists(index: Index) -> Inverted | None:
  """The lists of a large index; None where all rows are compared."""
  if index.lists is None:
    return None
  try:
    return open_lists(index.path / index.lists.file, index.dim)
  except UserError as error:
    print(f'{error}; until then all rows are compared', file=sys.stderr)
    return None


def _choose_probes(
  inverted: Inverted, vectors: np.ndarray, live: np.ndarray
) -> tuple[int, float]:
  """As few lists as find nearly all of the ten nearest, and their share."""
  rng = np.random.default_rng(0)
  own = np.sort(rng.choice(live, min(_MEASURED_ON, len(live)), replace=False))
  queries = np.asarray(vectors[own])
  # The query itself is always found, and is not counted.
  k = _RECALL_OF + 1
  truth, _ = exact(queries, vectors, inverted.mean, live, k)
  states = np.full(len(vectors), LIVE + 1, np.int8)
  states[live] = LIVE
  probes, most = 1, inverted.index.nlist
  while True:
    rows = inverted.candidates(queries, _CANDIDATES * (k + _SPARE), probes)
    similarities = compare(queries, vectors, inverted.mean, rows, states)
    found, _ = _merge([(rows, similarities)], k)
    shares = [
      len(set(a) & set(b) - {row}) / (len(set(b) - {row}) or 1)
      for a, b, row in zip(found.tolist(), truth.tolist(), own.tolist())
    ]
    recall = float(np.mean(shares))
    if recall >= _RECALL or probes >= most:
      return probes, recall
    probes = min(2 * probes, most)


def with_lists(index: Index) -> Index:
  """The index with lists where it has become large and they would help.

  They are made anew when `EXACT_UP_TO` rows were added since; the index on the
  disk has them with the next `commit`.
  """
  rows = len(index.items.names)
  covered = index.lists.rows if index.lists else 0
  if rows - covered <= EXACT_UP_TO:
    return index
  vectors, live = index.vectors(), index.items.live
  try:
    inverted = make_lists(vectors, index.items.mean)
    probes, recall = _choose_probes(inverted, vectors, live)
    file = f'lists-{index.generation + 1}.faiss'
    save_lists(index.path / file, inverted)
  except UserError as error:
    # All rows can be compared without.
    print(f'{error}; until then all rows are compared', file=sys.stderr)
    return index
  return index._replace(lists=Lists(file, rows, probes, recall))
