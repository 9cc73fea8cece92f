"""The training loop: resumable, interruptible, scored before and after."""

from __future__ import annotations

import collections
import math
import platform
import signal
import sys
import time
from collections.abc import Callable
from concurrent import futures

import jax
import numpy as np

import cmd_jax
from cmd_jax import part_masks
from cmd_jax.atomic import write_atomically
from cmd_jax.checkpoint import Checkpoints
from cmd_jax.data.canvas import skip_report
from cmd_jax.data.report_text import TEXT_FILE, notable
from cmd_jax.errors import UserError
from cmd_jax.evaluate import (
  describe_start,
  draw_neighbours,
  encode,
  results_table,
  score,
  why_not_scored,
)
from cmd_jax.experiment import Experiment
from cmd_jax.inspection import report_on, write_data_report
from cmd_jax.metrics import MetricWriter, Progress
from cmd_jax.train_state import TrainState
from cmd_jax.workdir import Workdir

# Steps the host may be ahead of the device. Their losses are looked at as they
# arrive, so the device never waits for the host.
_STEPS_AHEAD = 2


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


class _StopSignals:
  """Remembers SIGINT and SIGTERM instead of dying of them."""

  def __init__(self):
    self.received = None

  def __enter__(self):
    self._previous = {
      number: signal.signal(number, self._remember)
      for number in (signal.SIGINT, signal.SIGTERM)
    }
    return self

  def _remember(self, number, frame):
    del frame
    if self.received == number == signal.SIGINT:
      raise KeyboardInterrupt  # A second Ctrl-C means it.
    self.received = number

  def __exit__(self, *_):
    for number, handler in self._previous.items():
      signal.signal(number, handler)


def describe_hardware(experiment: Experiment) -> str:
  """One line: the devices used and the host, for results and logs."""
  devices = experiment.mesh.devices.ravel()
  return f'{len(devices)} x {devices[0].device_kind} on {platform.machine()}'


def _check_finite(step: int, metrics: dict[str, float], workdir: Workdir):
  # The gradient too: it reaches the parameters that are saved next.
  watched = (metrics['loss'], metrics['grad_norm'])
  if all(math.isfinite(value) for value in watched):
    return
  terms = [
    name.removeprefix('loss/')
    for name, value in metrics.items()
    if name.startswith('loss/') and not math.isfinite(value)
  ]
  raise UserError(
    f'the loss or its gradient is not finite at step {step} '
    f'(terms: {", ".join(terms) or "none by itself"}): the last checkpoint in '
    f'{workdir.checkpoints} is from before; lower '
    'config.optim.base_learning_rate or use config.model.dtype=float32 in a '
    'new --workdir'
  )


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
    self._seconds = self._seconds_before
    self._start = time.monotonic()
    self._pending = collections.deque()
    self._writer = MetricWriter(
      workdir.metrics_file, workdir.tensorboard, step=self._step
    )
    self._progress = Progress(
      step=self._step,
      total_steps=experiment.total_steps,
      batch_size=experiment.batch_size,
    )

  def train_seconds(self) -> float:
    """Seconds spent in the loop, earlier sessions of the run included."""
    return self._seconds

  def images_per_second(self) -> float | None:
    """Throughput of this session; None if it took fewer than two steps."""
    return self._progress.images_per_second()

  def _report(self, step: int, metrics: dict[str, jax.Array]) -> None:
    metrics = {name: float(value) for name, value in metrics.items()}
    _check_finite(step, metrics, self._workdir)
    self._progress.update(metrics['loss'])
    experiment = self._experiment
    if step % experiment.log_every_steps and step != experiment.total_steps:
      return
    metrics['epoch'] = step / experiment.steps_per_epoch
    rate = self._progress.images_per_second()
    if rate is not None:
      metrics['images_per_second'] = rate
    self._writer.write(step, metrics)
    shown = '  '.join(
      f'{name.removeprefix("loss/")} {value:.4g}'
      for name, value in sorted(
        metrics.items(), key=lambda item: not item[0].startswith('loss')
      )
    )
    self._progress.note(f'step {step}  {shown}')

  def _report_down_to(self, ahead: int) -> None:
    while len(self._pending) > ahead:
      self._report(*self._pending.popleft())

  def _save(self) -> None:
    # Only after every loss has been seen to be finite.
    self._report_down_to(0)
    seconds = self._seconds_before + time.monotonic() - self._start
    meta = {'train_seconds': seconds, 'parts_encoder_sha256': self._parts_hash}
    self._checkpoints.save(self._state, meta)

  def _find_parts(self, number: int, start: int) -> np.ndarray | None:
    """The part masks of a round that began at step `start`."""
    experiment, name = self._experiment, f'round_{number + 1}'
    if experiment.parts is None:
      return None
    if self._step > start:
      return part_masks.load_part_masks(
        experiment, self._workdir, name, self._parts_hash
      )
    self._parts_hash = part_masks.hash_of_encoder(experiment, self._state)
    part_ids = part_masks.find_part_masks(
      experiment,
      self._state,
      self._workdir,
      name,
      path='' if number else experiment.parts.path,
    )
    self._progress.skip_pause()
    return part_ids

  def _take_steps(
    self, batches: Callable, end: int, signals: _StopSignals
  ) -> None:
    while self._step < end:
      self._state, metrics = self._train_step(
        self._state, batches(self._step), self._experiment.rng
      )
      self._step += 1
      self._pending.append((self._step, metrics))
      self._report_down_to(_STEPS_AHEAD)
      if self._step % self._experiment.checkpoint_every_steps == 0:
        self._save()
      if signals.received:
        self._save()
        self._checkpoints.close()
        raise Interrupted(signals.received, self._step)

  def run(self) -> TrainState:
    """Trains to the end.

    Raises:
      Interrupted: a signal came; the state is saved.
      UserError: the loss is not finite, or part masks do not fit.
    """
    experiment, start = self._experiment, 0
    try:
      for number, end in enumerate(experiment.round_ends):
        if self._step < end:
          # A signal ends the search at once: what is found is kept.
          part_ids = self._find_parts(number, start)
          with (
            experiment.make_batches(part_ids) as batches,
            _StopSignals() as signals,
          ):
            self._take_steps(batches, end, signals)
            self._save()
            if signals.received:
              raise Interrupted(signals.received, self._step)
        start = end
    finally:
      self._seconds = self._seconds_before + time.monotonic() - self._start
      self._progress.close()
      self._writer.close()
    return self._state


def _announce(experiment: Experiment, workdir: Workdir) -> None:
  pretrain = experiment.pretrain
  num_test = 0 if experiment.test is None else len(experiment.test.images)
  print(
    f'{experiment.method_name} on {pretrain.name}: {len(pretrain.images)} '
    f'training and {num_test} test images of {len(pretrain.class_names)} '
    f'classes on {describe_hardware(experiment)}',
    file=sys.stderr,
  )
  print(experiment.placement, file=sys.stderr)
  report = report_on(pretrain, experiment.test, experiment.placement)
  write_data_report(report, workdir.path)
  if lines := notable(report):
    lines.append(f'see {workdir.path / TEXT_FILE}')
  for line in lines:
    print(f'data: {line}', file=sys.stderr)
  if experiment.imported is not None:
    print(experiment.imported.text(), file=sys.stderr)


def _report_skipped(
  experiment: Experiment, workdir: Workdir, known: int = 0
) -> int:
  """Names the images found to be unreadable; returns their number.

  Args:
    experiment: what is trained.
    workdir: of the run.
    known: how many were named already: streamed images are found out late.
  """
  splits = [
    canvases
    for canvases in (experiment.pretrain, experiment.test)
    if canvases is not None and canvases.skipped
  ]
  count = sum(len(canvases.skipped) for canvases in splits)
  if count > known:
    write_atomically(
      workdir.skipped_file, '\n'.join(skip_report(split) for split in splits)
    )
    print(
      f'{count} unreadable image(s) skipped; {workdir.skipped_file} names them',
      file=sys.stderr,
    )
  return count


def train(experiment: Experiment, workdir: Workdir) -> dict:
  """Trains, or resumes, and scores the encoder before and after.

  Args:
    experiment: what to train.
    workdir: opened for the experiment's config.

  Returns:
    The entries of results.json.

  Raises:
    Interrupted: a signal came; the state is saved.
    UserError: the loss is not finite, or a checkpoint doesn't fit.
  """
  _announce(experiment, workdir)
  skipped = _report_skipped(experiment, workdir)
  checkpoints = experiment.open_checkpoints(workdir)
  start = {
    'data_sha256': experiment.data_sha256,
    'eval': experiment.evaluation.settings,
    'init_from': describe_start(experiment),
  }
  try:
    # The step compiles while the initial encoder is scored.
    with futures.ThreadPoolExecutor(1) as pool:
      train_step = pool.submit(experiment.compile_step)
      state, meta = experiment.init_state(), {}
      # Scored again where it was scored otherwise: a gain needs one protocol.
      before = workdir.results()
      if any(before.get(key) != value for key, value in start.items()):
        workdir.update_results(
          dataset=experiment.name,
          method=experiment.method_name,
          protocols=list(experiment.evaluation.protocols),
          route=experiment.route,
          **start,
          init=score(experiment, encode(experiment, state, workdir.features)),
        )
    if checkpoints.latest_step() is not None:
      state, meta = checkpoints.restore(experiment.state_like)
      print(f'resumed after step {int(state.step)}', file=sys.stderr)
    loop = _Loop(
      experiment, workdir, checkpoints, state, meta, train_step.result()
    )
    state = loop.run()
  finally:
    checkpoints.close()
    skipped = _report_skipped(experiment, workdir, skipped)
  encoded = encode(experiment, state, workdir.features)
  _report_skipped(experiment, workdir, skipped)
  draw_neighbours(experiment, state, encoded, workdir.neighbours_file)
  entries = dict(
    final=score(experiment, encoded),
    steps=int(state.step),
    seconds=round(loop.train_seconds(), 1),
    hardware=describe_hardware(experiment),
    versions={
      'cmd_jax': cmd_jax.__version__,
      'jax': jax.__version__,
      'numpy': np.__version__,
    },
  )
  if loop.images_per_second() is not None:
    entries['images_per_second'] = round(loop.images_per_second(), 1)
  return workdir.update_results(**entries)


def summary(experiment: Experiment, workdir: Workdir, results: dict) -> str:
  """What a person reads at the end: the table and where to look."""
  reason = why_not_scored(experiment)
  table = results_table(results['init'], results['final'])
  if reason:
    table = f'{reason}\n{table}' if results['final'] else reason
  speed = results.get('images_per_second')
  return '\n'.join(
    [
      f'\n{table}\n',
      f'{results["steps"]} steps in {results["seconds"]:.0f} s'
      + (f', {speed:.0f} images/s' if speed else ''),
      f'results      {workdir.results_file}',
      f'neighbours   {workdir.neighbours_file}',
      f'metrics      {workdir.metrics_file}',
      f'tensorboard  {workdir.tensorboard}',
      f'checkpoints  {workdir.checkpoints}',
    ]
  )
