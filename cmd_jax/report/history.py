"""What a run recorded while it trained."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from cmd_jax.files import safe_read

# Points of a curve; a page draws no more.
_MAX_POINTS = 2000
# What is scored while a run trains, on few of its lines.
_SCORES = 'eval/'
# Runs have some twenty. Steps are whole numbers in a browser up to here.
_MAX_CURVES = 500
_MAX_STEP = 2**53


def read_curves(path: pathlib.Path) -> dict[str, Any]:
  """Reads a metrics.jsonl into columns.

  Args:
    path: of the file; it may be missing.

  Returns:
    `step`, a list, and `series`, name -> list of values, None where a line
    lacks one or it is not finite. Lines of one step are put together. Long
    runs are thinned out evenly, but for the scores.
  """
  rows = []
  text = path.read_bytes() if path.is_file() else b''
  for line in text.splitlines():
    try:
      row = safe_read.parse_json(line)
      step = int(row['step'])
      if 0 <= step < _MAX_STEP:
        row['step'] = step
        if rows and rows[-1]['step'] == step:
          rows[-1].update(row)
        else:
          rows.append(row)
    except (ValueError, KeyError, TypeError, OverflowError):
      continue  # Cut short by a crash, or still being written.
  every = -(-len(rows) // _MAX_POINTS) or 1
  rows = [
    row
    for i, row in enumerate(rows)
    if i % every == 0 or any(name.startswith(_SCORES) for name in row)
  ]
  names = sorted({name for row in rows for name in row} - {'step', 'epoch'})
  names = names[:_MAX_CURVES]
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
  if not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
    return None
  return float(f'{value:.6g}')


def table(results: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The rows of initial against trained scores.

  Args:
    results: what results.json holds.

  Returns:
    For each '<protocol>/<metric>' a row with its `name` and the scores `init`
    and `final`, None where there is none or it is not finite.
  """
  init, final = (
    scores if isinstance(scores := results.get(key), Mapping) else {}
    for key in ('init', 'final')
  )
  return [
    {
      'name': name,
      'init': _finite(init.get(name)),
      'final': _finite(final.get(name)),
    }
    for name in dict.fromkeys([*final, *init])
  ]
