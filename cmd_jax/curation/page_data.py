"""What the page of curation shows."""

from __future__ import annotations

import concurrent.futures
import os
from typing import Any

import numpy as np

from cmd_jax.api import Encoder
from cmd_jax.curation.duplicates import KINDS
from cmd_jax.curation.findings import Findings
from cmd_jax.report.photos import encode_base64, make_thumbnail

# Beyond these a page is not looked through; the table has all.
_MAX_GROUPS, _MAX_MEMBERS = 200, 12
_MAX_SUSPECTS, _NEIGHBOURS_SHOWN = 200, 5
_MAX_OUTLIERS = 60
_MAX_SELECTED = 400
_NUM_THREADS = min(32, os.cpu_count() or 1)


class _Shelf:
  """The photographs that the page holds, each once."""

  def __init__(self, most: int) -> None:
    self.place_of: dict[int, int] = {}
    self._most = most

  def put(self, *rows: int) -> list[int] | None:
    """Places of images on the page, all of them; None if it is full."""
    new = {int(row) for row in rows} - self.place_of.keys()
    if len(self.place_of) + len(new) > self._most:
      return None
    return [
      self.place_of.setdefault(int(row), len(self.place_of)) for row in rows
    ]


def _describe_groups(findings: Findings, shelf: _Shelf) -> list[dict[str, Any]]:
  """Groups with different labels first, then the largest."""
  duplicates, labels = findings.duplicates, findings.photographs.given.labels
  splits = np.array(findings.photographs.given.splits)
  surest = duplicates.surest
  groups = []
  for number in range(duplicates.groups.max() + 1):
    rows = np.flatnonzero(duplicates.groups == number)
    kept = int(duplicates.kept[rows[0]])
    # The one to keep comes first.
    rows = np.r_[kept, rows[rows != kept]]
    known = labels[rows][labels[rows] >= 0]
    groups.append(
      {
        'rows': rows,
        'kinds': ['' if r == kept else KINDS[surest[r]] for r in rows],
        'differs': len(set(known.tolist())) > 1,
        'splits': len(set(splits[rows].tolist())) > 1,
      }
    )
  groups.sort(key=lambda group: (not group['differs'], not group['splits']))
  shown = []
  for group in groups[:_MAX_GROUPS]:
    rows = group.pop('rows')
    places = shelf.put(*rows[:_MAX_MEMBERS])
    if places is not None:
      group['kinds'] = group['kinds'][:_MAX_MEMBERS]
      shown.append({**group, 'photos': places, 'size': len(rows)})
  return shown


def _describe_suspects(
  findings: Findings, shelf: _Shelf
) -> list[dict[str, Any]]:
  around = findings.around
  rows = np.argsort(-around.margins, kind='stable')
  rows = rows[around.suspected[rows] >= 0][:_MAX_SUSPECTS]
  groups = findings.duplicates.groups
  shown = []
  for row in rows.tolist():
    others = findings.nearest.rows[row]
    others = others[(groups[others] != groups[row]) | (groups[row] < 0)]
    places = shelf.put(row, *others[:_NEIGHBOURS_SHOWN])
    if places is not None:
      shown.append(
        {
          'photo': places[0],
          'suggested': findings.name_of(around.suspected[row]),
          'margin': float(around.margins[row]),
          'neighbours': places[1:],
        }
      )
  return shown


def _describe_outliers(
  findings: Findings, shelf: _Shelf
) -> list[dict[str, Any]]:
  around = findings.around
  shown = []
  for row in np.argsort(around.typicality, kind='stable')[:_MAX_OUTLIERS]:
    places = shelf.put(row)
    if places is not None:
      shown.append(
        {
          'photo': places[0],
          'typicality': float(around.typicality[row]),
          'is_outlier': bool(around.is_outlier[row]),
        }
      )
  return shown


def _thumbnails(encoder: Encoder, findings: Findings, rows: list[int]):
  """WebP files as base64; '' of a file that is gone meanwhile."""
  folder, names = findings.photographs.folder, findings.photographs.names

  def draw(row: int) -> str:
    try:
      canvas, size = encoder.make_canvas(folder / names[row])
    except (OSError, ValueError):
      return ''
    return encode_base64(make_thumbnail(canvas, size))

  with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
    return list(pool.map(draw, rows))


def _count(findings: Findings) -> dict[str, int]:
  duplicates, around = findings.duplicates, findings.around
  return {
    'images': len(findings.photographs.names),
    'classes': len(findings.photographs.given.class_names),
    'unreadable': len(findings.photographs.skipped),
    'groups': int(duplicates.groups.max() + 1),
    'spare': int(duplicates.is_spare.sum()),
    'conflicts': int((findings.conflicts >= 0).sum()),
    'suspects': int((around.suspected >= 0).sum()),
    'outliers': int(around.is_outlier.sum()),
    'selected': len(findings.selection.rows),
    'pool': findings.selection.pool_size,
  }


def collect(
  encoder: Encoder, findings: Findings, *, max_images: int
) -> dict[str, Any]:
  """What the page shows, as JSON can represent it.

  Args:
    encoder: that reads the images again for their thumbnails.
    findings: what was found.
    max_images: photographs on the page at most.
  """
  shelf, photographs = _Shelf(max_images), findings.photographs
  chosen = findings.selection.rows[:_MAX_SELECTED].tolist()
  selected = [place for row in chosen for place in shelf.put(row) or ()]
  suspects = _describe_suspects(findings, shelf)
  groups = _describe_groups(findings, shelf)
  outliers = _describe_outliers(findings, shelf)
  rows = list(shelf.place_of)
  counts = _count(findings)
  kinds = np.bincount(findings.duplicates.kinds, minlength=len(KINDS))
  return {
    'folder': str(photographs.folder),
    'encoder': encoder.source,
    'counts': counts,
    'kinds': {name: int(count) for name, count in zip(KINDS, kinds) if count},
    'coverage': [findings.selection.coverage, findings.selection.by_chance],
    'notes': list(findings.notes),
    'photos': {
      'names': [photographs.names[row] for row in rows],
      'classes': [
        findings.name_of(photographs.given.labels[row]) for row in rows
      ],
      'sizes': photographs.sizes[rows].tolist(),
      'thumbnails': _thumbnails(encoder, findings, rows),
    },
    'groups': groups,
    'suspects': suspects,
    'outliers': outliers,
    'selected': selected,
  }
