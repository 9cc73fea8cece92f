"""Steps whose loss, gradient or new parameters are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cmd_jax.devices import processes
from cmd_jax.errors import UserError
from cmd_jax.files.formats import check_format
from cmd_jax.rundir.workdir import Workdir, read_json, write_json
from cmd_jax.training.step import WATCHED

_FORMAT_VERSION = 1


def _is_finite(metrics: Mapping[str, float]) -> bool:
  return all(math.isfinite(metrics[name]) for name in WATCHED)


def _culprits(metrics: Mapping[str, float]) -> str:
  """The terms that are not finite, or the first thing after them."""
  terms = [
    name.removeprefix('loss/')
    for name, value in sorted(metrics.items())
    if name.startswith('loss/') and not math.isfinite(value)
  ]
  if terms:
    return f'terms: {", ".join(terms)}'
  name = next(x for x in WATCHED if not math.isfinite(metrics[x]))
  return f'terms: none by itself, {name}'


class NonFiniteSteps:
  """Records such steps, and ends the run after more than are allowed."""

  def __init__(
    self,
    workdir: Workdir,
    *,
    allowed: int,
    skipped: int,
    batch_indices: Callable[[int], np.ndarray],
    file_names: Sequence[str],
  ):
    """Starts to count.

    Args:
      workdir: of the run.
      allowed: steps of the whole run that may be left out.
      skipped: steps left out so far.
      batch_indices: step, from 0 -> [B] numbers of its examples.
      file_names: of all examples.
    """
    self._workdir, self._allowed = workdir, allowed
    self._batch_indices, self._file_names = batch_indices, file_names
    self.skipped = skipped

  def _record(self, step: int, metrics: Mapping[str, float]) -> None:
    """Adds the step, its terms and its batch to non_finite.json."""
    if not processes.is_main_process():
      return
    path, steps = self._workdir.non_finite_file, []
    if path.exists():
      record = read_json(path)
      check_format(record, _FORMAT_VERSION, path)
      # A resumed run takes the steps after its checkpoint again.
      steps = [x for x in record.get('steps', []) if x['step'] < step]
    index = self._batch_indices(step - 1)
    steps.append(
      {
        'step': step,
        # JSON has no numbers that are not finite.
        'values': {
          name: value if math.isfinite(value) else str(value)
          for name, value in metrics.items()
        },
        'index': [int(i) for i in index],
        'file_names': [self._file_names[i] for i in index],
      }
    )
    write_json(path, {'format_version': _FORMAT_VERSION, 'steps': steps})

  def look(self, step: int, metrics: Mapping[str, float], saved: int) -> None:
    """Looks at the metrics of a step.

    Args:
      step: its number, from 1.
      metrics: `WATCHED`, the terms, and whatever else there is.
      saved: step of the last checkpoint, 0 if there is none.

    Raises:
      UserError: one is not finite, and no more steps may be left out.
    """
    if _is_finite(metrics):
      return
    self._record(step, metrics)
    if self.skipped < self._allowed:
      self.skipped += 1
      return
    last = f'the last checkpoint, of step {saved}, is from before'
    if not saved:
      last = 'no checkpoint was saved before'
    allowed = ''
    if self._allowed:
      allowed = (
        f', and config.optim.skip_non_finite_steps={self._allowed} are left '
        'out already'
      )
    raise UserError(
      f'the loss, its gradient or the parameters are not finite at step {step} '
      f'({_culprits(metrics)}){allowed}; {last}, and '
      f'{self._workdir.non_finite_file} names the images: the same command '
      'comes here again; add --config.optim.skip_non_finite_steps='
      f'{max(10, 2 * self._allowed)} to leave such steps out, or choose a new '
      '--workdir with a lower config.optim.base_learning_rate or '
      'config.model.dtype=float32'
    )
