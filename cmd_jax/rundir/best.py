"""Which of a run's checkpoints is used."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import orbax.checkpoint as ocp

from cmd_jax.rundir.checkpoint import damage, newest_good_step


class Choice(NamedTuple):
  """The checkpoint that is used.

  Attributes:
    step: its step.
    newest_step: that of the newest good one.
    best: `score`, `step` and `value` by which it is the best; None where it is
      used because it is the newest.
  """

  step: int
  newest_step: int
  best: Mapping[str, Any] | None


def choose_step(directory: pathlib.Path, *, newest: bool = False) -> Choice:
  """The checkpoint to use: the best one if the run keeps it, or the newest.

  The newest good one says which was the best when it was saved: so whatever
  killed the run, what is said and what is there agree.

  Args:
    directory: with the checkpoints of a run, which is only read.
    newest: whether it is the newest in any case.

  Raises:
    UserError: no good checkpoint.
  """
  step, _ = newest_good_step(directory)
  meta = {} if newest else _read_meta(directory / str(step))
  best = (meta.get('validation') or {}).get('best')
  if not best:
    return Choice(step, step, None)
  path = directory / str(best['step'])
  reason = damage(path) if path.is_dir() else 'it is missing'
  if reason is None:
    return Choice(best['step'], step, best)
  print(
    f'checkpoint {path}, the best by {best["score"]}, cannot be used '
    f'({reason}): step {step}, the newest, is',
    file=sys.stderr,
  )
  return Choice(step, step, None)


def _read_meta(path: pathlib.Path) -> dict[str, Any]:
  """What was saved with a state; empty if it cannot be read."""
  try:
    return ocp.JsonCheckpointHandler().restore(
      path.absolute() / 'meta', args=ocp.args.JsonRestore()
    )
  except (OSError, TypeError, ValueError):
    # What needs the state reads it again, and tells.
    return {}
