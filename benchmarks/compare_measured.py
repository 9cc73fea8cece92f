"""Records of `benchmarks.compare` by row, and how rows relate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from benchmarks.compare_rows import ROWS

LOGREG = 'linear/logreg/top1'
RANK1 = 'retrieval/test-vs-train/rank1'
MAP = 'retrieval/test-vs-train/mAP'
KNN = 'knn/20/top1'
SCORES = {
  '`knn/20` top1': KNN,
  '`linear/logreg` top1': LOGREG,
  '`retrieval` rank1': RANK1,
  '`retrieval` mAP': MAP,
  'parts, mIoU': 'seg/pascub5/miou',
}
# What sets with part masks alone have.
_OF_PARTS = ('parts, mIoU',)
# More than arithmetic in another order makes of the scores of equal encoders.
_TOLERANCE = 1e-3

Record = Mapping[str, Any]


class Measured(NamedTuple):
  """The records of a row.

  Attributes:
    by_seed: seed -> record, of the config of the newest.
    old: number of records of other configs, which are left out.
  """

  by_seed: dict[int, Record]
  old: int

  @property
  def newest(self) -> Record:
    """The record made last."""
    return max(self.by_seed.values(), key=lambda x: x['date'])


def measured_rows(records: Iterable[Record]) -> dict[str, Measured]:
  """The records of a set by row, in the order of `ROWS`, then by name."""
  of_row: dict[str, list[Record]] = {}
  for record in records:
    of_row.setdefault(record['row'], []).append(record)
  order = {row.name: number for number, row in enumerate(ROWS)}
  rows = {}
  for name in sorted(of_row, key=lambda x: (order.get(x, len(order)), x)):
    newest = max(of_row[name], key=lambda x: x['date'])['config_sha256']
    kept = [x for x in of_row[name] if x['config_sha256'] == newest]
    by_seed = {x['seed']: x for x in sorted(kept, key=lambda x: x['seed'])}
    rows[name] = Measured(by_seed, len(of_row[name]) - len(kept))
  return rows


def is_alias(row: Measured, rows: Mapping[str, Measured]) -> bool:
  """Whether the row's config is that of its base as measured now."""
  base = rows.get(row.newest['base'])
  of_base = base and base.newest['config_sha256']
  if row.newest.get('same_as') and base is None:
    return True
  return of_base == row.newest['config_sha256']


def shown_rows(rows: Mapping[str, Measured]) -> dict[str, Measured]:
  """The rows that have a line of scores."""
  return {
    name: row
    for name, row in rows.items()
    if row.newest['rows'] and not is_alias(row, rows)
  }


def values_of(record: Record, when: str) -> dict[str, float]:
  """The scores of a record by metric.

  Args:
    record: that has them.
    when: 'init' or 'final'.
  """
  return {x['metric']: x[when] for x in record['rows'] if x[when] is not None}


def scores_of(records: Iterable[Record]) -> dict[str, str]:
  """`SCORES` without those of parts where no record has them."""
  is_scored = {key for record in records for key in values_of(record, 'final')}
  return {
    name: metric
    for name, metric in SCORES.items()
    if name not in _OF_PARTS or metric in is_scored
  }


def untrained_values(rows: Mapping[str, Measured]) -> list[dict[str, float]]:
  """Scores of the initial encoders by seed, of the first row where rows differ.

  Args:
    rows: of a set, from `measured_rows`.
  """
  best: dict[int, dict[str, float]] = {}
  for row in rows.values():
    for seed, record in row.by_seed.items():
      # The multi-instance attention is not in all of them.
      for metric, value in values_of(record, 'init').items():
        best.setdefault(seed, {}).setdefault(metric, value)
  return [best[seed] for seed in sorted(best)]


def paired(row: Measured, other: Measured, metric: str) -> list[float]:
  """Differences in points, seed by seed, of those that both have."""
  differences = []
  for seed in row.by_seed:
    if seed in other.by_seed:
      mine, theirs = (
        values_of(x.by_seed[seed], 'final').get(metric) for x in (row, other)
      )
      if mine is not None and theirs is not None:
        differences.append(100 * (mine - theirs))
  return differences


def starts_elsewhere(row: Measured, other: Measured) -> bool:
  """Whether the same seed has drawn another initial encoder."""
  for seed in row.by_seed.keys() & other.by_seed.keys():
    mine, theirs = (values_of(x.by_seed[seed], 'init') for x in (row, other))
    for metric in mine.keys() & theirs.keys() & set(SCORES.values()):
      if abs(mine[metric] - theirs[metric]) > _TOLERANCE:
        return True
  return False


def is_outdated(row: Measured, rows: Mapping[str, Measured]) -> bool:
  """Whether what all rows share has changed since the row was measured.

  Args:
    row: one of them.
    rows: of a set, from `measured_rows`.
  """
  trained = [x.newest for x in rows.values() if x.newest['rows']]
  newest = max(trained, key=lambda x: x['date']).get('shared_sha256')
  return any(x.get('shared_sha256') != newest for x in row.by_seed.values())
