"""Traces of a few steps by JAX's profiler, for TensorBoard and Perfetto."""

from __future__ import annotations

from typing import Any

import jax

from cmd_jax.devices import processes
from cmd_jax.rundir.workdir import Workdir
from cmd_jax.training.experiment import Experiment
from cmd_jax.training.metrics import Progress


class Profiler:
  """Traces the steps that are asked for, into the folder `profile`."""

  def __init__(
    self,
    experiment: Experiment,
    workdir: Workdir,
    progress: Progress,
    step: int,
  ):
    """Nothing is traced yet; of several processes the first one traces.

    Args:
      experiment: with the steps to trace.
      workdir: of the run.
      progress: where lines are shown.
      step: steps taken so far.
    """
    self._folder, self._note = workdir.path / 'profile', progress.note
    self._is_on = False
    self._steps = None
    if processes.is_main_process():
      self._steps = experiment.steps.profile
    if self._steps is None:
      return
    first, last = self._steps
    if step >= last:
      progress.note(
        f'steps {first} to {last} are not traced: {step} are taken already'
      )
      self._steps = None

  def before(self, step: int, count: int) -> None:
    """Begins to trace if a call takes the first step that is asked for.

    Args:
      step: the first of the call, from 1.
      count: how many it takes.
    """
    if self._steps is None or self._is_on:
      return
    first, last = self._steps
    if step <= last and step + count > first:
      # Perfetto's file beside the one that TensorBoard reads.
      jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
      self._is_on = True

  def after(self, step: int, results: Any) -> None:
    """Ends the trace with the last step that is asked for.

    Args:
      step: the last of the call.
      results: of the step, which may still be computed.
    """
    if self._is_on and step >= self._steps[1]:
      jax.block_until_ready(results)
      self.close()

  def close(self) -> None:
    """Writes what is traced, if anything is, and says where."""
    if not self._is_on:
      return
    self._is_on, self._steps = False, None
    jax.profiler.stop_trace()
    self._note(
      f'traced: tensorboard --logdir={self._folder}, or open its '
      'perfetto_trace.json.gz at ui.perfetto.dev'
    )
