"""The training loop: resumable, interruptible, scored before and after."""

from __future__ import annotations

import collections
import signal
import sys
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax
import numpy as np

import cmd_jax
from cmd_jax.devices import host_memory, processes, stopping
from cmd_jax.errors import UserError
from cmd_jax.evaluators.pictures import draw_neighbours
from cmd_jax.files.formats import VERSION_FIELD, check_format
from cmd_jax.rundir.checkpoint import Checkpoints, restore_step
from cmd_jax.rundir.workdir import Workdir
from cmd_jax.training import classification, hooks, part_rounds
from cmd_jax.training.experiment import Experiment
from cmd_jax.training.metrics import Progress
from cmd_jax.training.neighbours import with_neighbours
from cmd_jax.training.profiling import Profiler
from cmd_jax.training.scoring import (
  describe_choice,
  explain_lost_start,
  network_of,
  note_start,
  score,
)
from cmd_jax.training.state import TrainState
from cmd_jax.training.summary import (
  announce,
  describe_hardware,
  report_skipped,
  show_start,
)
from cmd_jax.training.validation import Validation

# Steps the host may be ahead of the device. Their losses are looked at as they
# arrive, so the device never waits for the host.
_STEPS_AHEAD = 2

# Steps after which several processes ask each other whether one was told to
# stop. They meet for it, while the devices have steps to work on.
_STEPS_TO_AGREE = 4

# Of what a checkpoint says besides its state.
_META_VERSION = 1


class Interrupted(Exception):
  """The run was asked to stop and has saved its state.

  Attributes:
    signal: number of the signal that asked.
  """

  def __init__(self, signal_number: int, step: int):
    super().__init__(
      f'stopped by {signal.Signals(signal_number).name} after step {step}; '
      'the same command resumes there'
    )
    self.signal = signal_number


class _Loop:
  """The steps between a state and a later one."""

  def __init__(
    self,
    experiment: Experiment,
    workdir: Workdir,
    checkpoints: Checkpoints,
    state: TrainState,
    meta: dict,
    train_step: Callable,
  ):
    self._experiment, self._workdir = experiment, workdir
    self._train_step = train_step
    self._checkpoints = checkpoints
    self._state, self._step = state, int(state.step)
    self._seconds_before = meta.get('train_seconds', 0.0)
    self._parts_hash = meta.get('parts_encoder_sha256', '')
    self.train_seconds = self._seconds_before
    self._start = time.monotonic()
    self._pending = collections.deque()
    self._saved = self._step
    self._validation = Validation(
      experiment, meta.get('validation'), checkpoints.steps()
    )
    self.progress = Progress(
      step=self._step,
      total_steps=experiment.steps.total,
      batch_size=experiment.steps.batch_size,
      shown=processes.is_main_process(),
    )
    self.non_finite = hooks.StopAtNonFinite(
      experiment, workdir, meta.get('skipped_steps', 0)
    )
    self._log = hooks.LogMetrics(
      experiment,
      workdir,
      self.progress,
      self.non_finite,
      self._step if meta else -1,
    )
    self._profiler = Profiler(experiment, workdir, self.progress, self._step)
    # In the order in which they look: what is not finite is not logged.
    self._hooks: list[hooks.Hook] = [
      self.non_finite,
      hooks.WarnOfCollapse(experiment, workdir, self.progress),
      self._log,
    ]

  @property
  def best(self) -> dict | None:
    """The best step so far, see `Validation`."""
    return self._validation.best

  @property
  def scores(self) -> dict[str, dict[str, float]]:
    """The first and the last scores while it trained, see `Validation`."""
    return self._validation.scores

  def run(self) -> TrainState:
    """Trains to the end.

    Raises:
      Interrupted: a signal came; the state is saved.
      UserError: a step is not finite, or part masks do not fit.
    """
    experiment, start = self._experiment, 0
    try:
      for number, end in enumerate(experiment.steps.round_ends):
        if self._step < end and not self._validation.has_stalled:
          # A signal ends the search at once: what is found is kept.
          with stopping.during(f'the search for parts of round {number + 1}'):
            part_ids = self._find_parts(number, start)
          with (
            experiment.data.make_batches(part_ids) as batches,
            stopping.Remembered() as signals,
          ):
            self._take_steps(batches, end, signals)
            self._save()
            if received := processes.agree_on_signal(signals.received):
              raise Interrupted(received, self._step)
        start = end
    finally:
      self.train_seconds = self._seconds_before + time.monotonic() - self._start
      self._profiler.close()
      self.progress.close()
      for hook in self._hooks:
        hook.close()
    return self._state

  def _take_steps(
    self, batches: Callable, end: int, signals: stopping.Remembered
  ) -> None:
    self._validate()
    while self._step < end and not self._validation.has_stalled:
      batch, count = self._next_batches(batches, end)
      self._profiler.before(self._step + 1, count)
      self._state, metrics = self._train_step(
        self._state, batch, self._experiment.rng
      )
      # On their way before anybody asks for them.
      jax.tree.map(lambda value: value.copy_to_host_async(), metrics)
      self._pending.append((self._step + 1, count, metrics))
      self._step += count
      self._profiler.after(self._step, self._state)
      self._show_hooks(_STEPS_AHEAD)
      # Before the step is saved, which therefore says that it was scored.
      self._validate()
      if self._step % self._experiment.steps.checkpoint_every == 0:
        self._save()
      if received := self._asked_to_stop(signals):
        self._save()
        raise Interrupted(received, self._step)

  def _next_batches(self, batches: Callable, end: int) -> tuple[Any, int]:
    """What the next call is given, and how many steps it takes."""
    most = self._experiment.steps.per_call
    if most == 1:
      return batches(self._step), 1
    every = self._experiment.steps.checkpoint_every
    count = min(
      most,
      end - self._step,
      every - self._step % every,
      self._validation.steps_left(self._step),
    )
    return batches(self._step, count), count

  def _validate(self) -> None:
    """Scores the network if that is due, and keeps it if it is the best."""
    if not self._validation.is_due(self._step):
      return
    self._show_hooks(0)
    scores = self._validation.evaluate(self._experiment, self._state)
    self._log.write_scores(self._step, scores)
    if self.best and self.best['step'] == self._step:
      self._save()
    self.progress.skip_pause()

  def _show_hooks(self, ahead: int) -> None:
    """Hands on the metrics of all steps but the last `ahead` calls'."""
    while len(self._pending) > ahead:
      first, count, metrics = self._pending.popleft()
      metrics = {name: np.ravel(value) for name, value in metrics.items()}
      self.progress.update(float(metrics['loss'][count - 1]), count)
      for i in range(count):
        values = {name: float(value[i]) for name, value in metrics.items()}
        for hook in self._hooks:
          hook.look(first + i, values, self._saved)

  def _save(self) -> None:
    # Only after every loss has been seen to be finite.
    self._show_hooks(0)
    seconds = self._seconds_before + time.monotonic() - self._start
    meta = {
      VERSION_FIELD: _META_VERSION,
      'train_seconds': seconds,
      'parts_encoder_sha256': self._parts_hash,
      'skipped_steps': self.non_finite.skipped,
    }
    best = None
    if self._validation.is_on:
      meta['validation'] = self._validation.as_json()
      best = self.best and self.best['step']
    self._checkpoints.save(self._state, meta, best=best)
    self._saved = self._step

  def _asked_to_stop(self, signals: stopping.Remembered) -> int | None:
    """The signal that one of the processes has received."""
    if processes.process_count() > 1 and self._step % _STEPS_TO_AGREE:
      return None
    return processes.agree_on_signal(signals.received)

  def _find_parts(self, number: int, start: int) -> np.ndarray | None:
    """The part masks of a round that began at step `start`."""
    experiment, name = self._experiment, f'round_{number + 1}'
    if experiment.parts is None:
      return None
    if self._step > start:
      return part_rounds.load_part_masks(
        experiment, self._workdir, name, self._parts_hash
      )
    alone, state = experiment.on_this_process(self._state)
    path = '' if number else experiment.parts.path
    part_ids = None

    def find():
      nonlocal part_ids
      part_ids = part_rounds.find_part_masks(
        alone, state, self._workdir, name, path=path
      )
      return part_rounds.hash_of_encoder(alone, state)

    self._parts_hash = processes.broadcast_from_main(find)
    if part_ids is None:
      part_ids = part_rounds.load_part_masks(
        experiment, self._workdir, name, self._parts_hash
      )
    self.progress.skip_pause()
    return part_ids


def _score_start(experiment: Experiment, workdir: Workdir) -> None:
  """Scores the initial encoder, unless it was scored before."""
  if processes.broadcast_from_main(lambda: bool(workdir.results().get('init'))):
    return
  if experiment.start_is_lost:
    processes.broadcast_from_main(lambda: explain_lost_start(experiment))
    return
  with stopping.during('the scoring of the initial encoder'):
    alone, state = experiment.on_this_process(experiment.init_state())
    processes.broadcast_from_main(
      lambda: workdir.update_results(
        init=score(alone, network_of(alone, state, workdir))
      )
    )


def _read_best(
  experiment: Experiment, workdir: Workdir, best: dict
) -> TrainState:
  """The state of the best step, and says so."""
  if processes.is_main_process():
    print(describe_choice(best), file=sys.stderr)
  return restore_step(workdir.checkpoints, best['step'], experiment.state_like)


def _score_end(
  experiment: Experiment, state: TrainState, workdir: Workdir, skipped: int
) -> dict[str, Any]:
  """Scores the trained network and draws neighbours; entries of results."""
  network = network_of(experiment, state, workdir)
  draw_neighbours(network, experiment.splits, workdir.neighbours_file)
  report_skipped(experiment, workdir, skipped)
  step = int(state.step)
  classifier = classification.classifier_of_state(experiment, state)
  return {
    **classification.score_classifier(experiment, network, classifier, step),
    'final': score(experiment, network),
    'scored_step': step,
  }


def _describe_training(
  experiment: Experiment, workdir: Workdir, loop: _Loop, steps: int
) -> dict[str, Any]:
  """What was trained, how long and on what; entries of results."""
  entries = dict(
    while_training=loop.scores,
    steps=steps,
    skipped_steps=loop.non_finite.skipped,
    seconds=round(loop.train_seconds, 1),
    hardware=describe_hardware(experiment),
    versions={
      'cmd_jax': cmd_jax.__version__,
      'jax': jax.__version__,
      'numpy': np.__version__,
    },
  )
  # A run that has kept a best checkpoint before says that it has none now.
  if loop.best or 'best' in workdir.results():
    entries['best'] = loop.best
  if (rate := loop.progress.images_per_second()) is not None:
    entries['images_per_second'] = round(rate, 1)
  return entries


def train(experiment: Experiment, workdir: Workdir) -> dict:
  """Trains, or resumes, and scores the encoder before and after.

  All processes train; the first one alone scores, on its own devices.

  Args:
    experiment: what to train.
    workdir: opened for the experiment's config.

  Returns:
    The entries of results.json.

  Raises:
    Interrupted: a signal came; the state is saved.
    UserError: a step is not finite, or a checkpoint doesn't fit.
  """
  if workdir.is_remote and experiment.parts is not None:
    raise UserError(
      f'{workdir.path}: part masks are kept in files that are read in place: '
      'give --workdir a directory of a file system'
    )
  announce(experiment, workdir)
  starts_from_knowledge = experiment.imported is not None
  skipped = report_skipped(experiment, workdir)
  checkpoints = experiment.open_checkpoints(workdir)
  try:
    # The step compiles while the initial state does, and is made.
    with futures.ThreadPoolExecutor(1) as pool:
      train_step = pool.submit(experiment.compile_step)
      state, meta = experiment.init_state(), {}
      processes.broadcast_from_main(lambda: note_start(experiment, workdir))
    if checkpoints.latest_step() is not None:
      state, meta = checkpoints.restore(experiment.state_like)
      check_format(meta, _META_VERSION, workdir.checkpoints)
      if processes.is_main_process():
        print(f'resumed after step {int(state.step)}', file=sys.stderr)
    compiled = train_step.result()
    host_memory.give_back_freed()
    if starts_from_knowledge:
      # Of use before any training, and what that has to beat.
      _score_start(experiment, workdir)
      processes.broadcast_from_main(lambda: show_start(workdir))
    experiment = with_neighbours(experiment, workdir)
    loop = _Loop(experiment, workdir, checkpoints, state, meta, compiled)
    with stopping.during('training'):
      state = loop.run()
  finally:
    checkpoints.close()
    skipped = report_skipped(experiment, workdir, skipped)
  if not starts_from_knowledge:
    # Only now, made again from its seed: the first step need not wait for it.
    _score_start(experiment, workdir)
  steps = int(state.step)
  if loop.best:
    state = _read_best(experiment, workdir, loop.best)
  with stopping.during('the scoring of the trained encoder'):
    alone = experiment.on_this_process(state)
    final = processes.broadcast_from_main(
      lambda: _score_end(*alone, workdir, skipped)
    )
  return processes.broadcast_from_main(
    lambda: workdir.update_results(
      **final, **_describe_training(experiment, workdir, loop, steps)
    )
  )
