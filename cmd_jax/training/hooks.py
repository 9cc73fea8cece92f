"""What looks at every step of a run: finite values, collapse, the log.

The loop hands each hook the metrics of every step, in order and some steps
late, and keeps what the hooks have to remember in its checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from cmd_jax.devices import processes
from cmd_jax.rundir.workdir import Workdir
from cmd_jax.training.collapse import CollapseWatch
from cmd_jax.training.experiment import Experiment
from cmd_jax.training.metrics import MetricWriter, Progress
from cmd_jax.training.non_finite import NonFiniteSteps
from cmd_jax.training.trackers import Trackers


class Hook(Protocol):
  """What looks at the steps of a run."""

  def look(self, step: int, metrics: Mapping[str, float], saved: int) -> None:
    """Looks at the metrics of a step.

    Args:
      step: its number, from 1.
      metrics: of the step.
      saved: step of the last checkpoint, 0 if there is none.

    Raises:
      UserError: the run cannot go on.
    """

  def close(self) -> None:
    """Ends; to be called once, whatever happened."""


class WarnOfCollapse:
  """Says once of each kind of collapse that it is there."""

  def __init__(
    self, experiment: Experiment, workdir: Workdir, progress: Progress
  ):
    """Begins to watch.

    Args:
      experiment: the run's.
      workdir: where results.json keeps the warnings.
      progress: where they are shown.
    """
    self._workdir, self._progress = workdir, progress
    # The first process alone warns, and writes the file.
    results = workdir.results() if processes.is_main_process() else {}
    self._watch = CollapseWatch(
      num_prototypes=experiment.num_prototypes,
      total_steps=experiment.steps.total,
      known=[x['kind'] for x in results.get('warnings', [])],
    )

  def look(self, step: int, metrics: Mapping[str, float], saved: int) -> None:
    """See `Hook`."""
    del saved
    found = self._watch.look(step, metrics)
    if not found or not processes.is_main_process():
      return
    for warning in found:
      self._progress.note(f'warning: {warning["text"]}')
    before = self._workdir.results().get('warnings', [])
    self._workdir.update_results(warnings=before + found)

  def close(self) -> None:
    """See `Hook`."""


class StopAtNonFinite:
  """Records steps that are not finite, and ends the run after too many."""

  def __init__(self, experiment: Experiment, workdir: Workdir, skipped: int):
    """Starts to count.

    Args:
      experiment: the run's.
      workdir: where non_finite.json is kept.
      skipped: steps left out so far.
    """
    self._steps = NonFiniteSteps(
      workdir,
      allowed=experiment.steps.non_finite_allowed,
      skipped=skipped,
      batch_indices=experiment.data.batch_indices,
      file_names=experiment.data.pretrain.file_names,
    )

  @property
  def skipped(self) -> int:
    """Steps of the run that were left out."""
    return self._steps.skipped

  def look(self, step: int, metrics: Mapping[str, float], saved: int) -> None:
    """See `Hook`."""
    self._steps.look(step, metrics, saved)

  def close(self) -> None:
    """See `Hook`."""


class LogMetrics:
  """Writes metrics.jsonl, TensorBoard, trackers and lines above the bar."""

  def __init__(
    self,
    experiment: Experiment,
    workdir: Workdir,
    progress: Progress,
    non_finite: StopAtNonFinite,
    step: int,
  ):
    """Opens the files for a run that goes on after a step.

    Args:
      experiment: the run's.
      workdir: where they are.
      progress: which knows the throughput.
      non_finite: which knows the steps that were left out.
      step: steps taken so far; -1 drops all that there is, as of a run that
        was killed before its first checkpoint.
    """
    self._steps, self._progress = experiment.steps, progress
    self._non_finite = non_finite
    self._writer = self._trackers = None
    if processes.is_main_process():
      self._writer = MetricWriter(
        workdir.metrics_file, workdir.tensorboard, step=step
      )
      self._trackers = Trackers(workdir)

  def look(self, step: int, metrics: Mapping[str, float], saved: int) -> None:
    """See `Hook`."""
    del saved
    is_due = not step % self._steps.log_every or step == self._steps.total
    if self._writer is None or not is_due:
      return
    written: dict[str, Any] = {**metrics, 'epoch': step / self._steps.per_epoch}
    if self._steps.non_finite_allowed:
      written['skipped_steps'] = self._non_finite.skipped
    rate = self._progress.images_per_second()
    if rate is not None:
      written['images_per_second'] = rate
    self._write(step, written)
    # The terms of the loss first.
    ordered = sorted(written.items(), key=lambda x: not x[0].startswith('loss'))
    shown = '  '.join(
      f'{name.removeprefix("loss/")} {value:.4g}' for name, value in ordered
    )
    self._progress.note(f'step {step}  {shown}')

  def write_scores(self, step: int, scores: Mapping[str, float]) -> None:
    """Writes what `Validation` found, on a line of its own."""
    if self._writer is None:
      return
    if not scores:
      self._progress.note(
        f'step {step}  not scored: its embeddings are not finite'
      )
      return
    epoch = step / self._steps.per_epoch
    self._write(step, {**scores, 'epoch': epoch})
    shown = '  '.join(f'{name} {value:.4g}' for name, value in scores.items())
    self._progress.note(f'step {step}  {shown}')

  def close(self) -> None:
    """See `Hook`."""
    if self._writer is not None:
      try:
        self._writer.close()
      finally:
        self._trackers.close()

  def _write(self, step: int, scalars: Mapping[str, float]) -> None:
    self._writer.write(step, scalars)
    self._trackers.write(step, scalars)
