"""What a run recorded while it trained."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

# Points of a curve; a page draws no more.
_MAX_POINTS = 2000


def read_curves(path: pathlib.Path) -> dict[str, Any]:
  """Reads a metrics.jsonl into columns.

  Args:
    path: of the file; it may be missing.

  Returns:
    `step`, a list, and `series`, name -> list of values, None where a line
    lacks one or it is not finite. Long runs are thinned out evenly.
  """
  rows = []
  text = path.read_text(encoding='utf-8') if path.exists() else ''
  for line in text.splitlines():
    try:
      row = json.loads(line)
      rows.append({**row, 'step': int(row['step'])})
    except (ValueError, KeyError, TypeError):
      continue  # Cut short by a crash, or still being written.
  rows = rows[:: -(-len(rows) // _MAX_POINTS) or 1]
  names = sorted({name for row in rows for name in row} - {'step', 'epoch'})
  series = {name: [_finite(row.get(name)) for row in rows] for name in names}
  return {
    'step': [row['step'] for row in rows],
    # What was never finite has no curve.
    'series': {
      name: values
      for name, values in series.items()
      if any(value is not None for value in values)
    },
  }


def _finite(value: Any) -> float | None:
  is_number = isinstance(value, int | float) and math.isfinite(value)
  return float(f'{value:.6g}') if is_number else None


def table(results: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The rows of initial against trained scores.

  Args:
    results: what results.json holds.

  Returns:
    For each '<protocol>/<metric>' a row with its `name` and the scores `init`
    and `final`, None where there is none.
  """
  init, final = (results.get(key) or {} for key in ('init', 'final'))
  return [
    {'name': name, 'init': init.get(name), 'final': final.get(name)}
    for name in dict.fromkeys([*final, *init])
  ]
