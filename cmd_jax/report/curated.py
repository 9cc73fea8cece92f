"""What `cmd-jax curate` said of a run's images, for the run's page."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

from cmd_jax.errors import UserError
from cmd_jax.files.safe_read import one_line
from cmd_jax.rundir.workdir import Workdir

# Where `cmd-jax curate --workdir` writes if nothing else is said.
FOLDER = 'curated'
# Labels named on the page; the linked page has all.
_NUM_SHOWN = 20


def _suspicion(row: dict[str, str]) -> float:
  # The same photograph under another name says more than neighbours do.
  if row['same_photograph_called']:
    return math.inf
  return float(row['suspicion'] or 0)


def _summary(text: str) -> dict[str, Any]:
  rows = list(csv.DictReader(io.StringIO(text)))
  suspects = [row for row in rows if _suspicion(row) > 0]
  suspects.sort(key=_suspicion, reverse=True)
  return {
    'counts': {
      'images': len(rows),
      'duplicates': sum(bool(row['duplicate_of']) for row in rows),
      'outliers': sum(row['is_outlier'] == '1' for row in rows),
      'suspicious labels': len(suspects),
      'to label first': sum(bool(row['select_rank']) for row in rows),
    },
    'suspects': [
      {
        'file': row['file'],
        'given': row['class_name'],
        'suggested': row['same_photograph_called'] or row['suggested_class'],
      }
      for row in suspects[:_NUM_SHOWN]
    ],
  }


def read_curated(workdir: Workdir) -> dict[str, Any] | None:
  """The findings in a work directory; None without any.

  Raises:
    UserError: the table cannot be read.
  """
  path = workdir.path / FOLDER / 'curate.csv'
  if not path.is_file():
    return None
  try:
    return _summary(path.read_bytes().decode(errors='surrogateescape'))
  except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
    raise UserError(
      f'{path} cannot be read ({one_line(error)}): remove its folder, or make '
      'it anew by cmd-jax curate'
    ) from error
