"""Metric writers: metrics.jsonl, TensorBoard and the terminal."""

from __future__ import annotations

import json
import pathlib
import sys
import time
from collections.abc import Mapping

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

from cmd_jax.files import safe_read
from cmd_jax.files.atomic import write_atomically

# Seconds from one upload of metrics.jsonl to an object store to the next.
_REWRITE_S = 60
# Seconds from one flush of the TensorBoard events to the next: each waits for
# the disk.
_FLUSH_S = 30


def drop_lines_after(path: pathlib.Path, step: int) -> None:
  """Removes the lines of a metrics.jsonl that lie after a step.

  A resumed run repeats them; a line cut short by a crash goes as well.
  """
  if not path.exists():
    return
  kept = []
  for line in path.read_bytes().decode(errors='replace').splitlines():
    try:
      if safe_read.parse_json(line)['step'] <= step:
        kept.append(line + '\n')
    except (ValueError, KeyError, TypeError):
      continue
  write_atomically(path, ''.join(kept))


class MetricWriter:
  """Writes scalars to metrics.jsonl and TensorBoard."""

  def __init__(
    self, metrics_file: pathlib.Path, tensorboard: pathlib.Path, *, step: int
  ):
    """Opens both for a run that starts or resumes after `step` steps.

    An object store has no TensorBoard events, and can't append to a file:
    metrics.jsonl is written anew now and then.
    """
    drop_lines_after(metrics_file, step)
    self._path, self._lines = metrics_file, None
    self._written = self._flushed = time.monotonic()
    self._file = self._events = None
    if '://' in str(metrics_file):
      there = metrics_file.exists()
      self._lines = [metrics_file.read_text()] if there else []
      return
    self._file = open(metrics_file, 'a', encoding='utf-8')
    tensorboard.mkdir(parents=True, exist_ok=True)
    # Not SummaryWriter, whose thread dies of a full disk and is then waited
    # for without end.
    self._events = EventsWriter(str(tensorboard / 'events'))
    start = SessionLog(status=SessionLog.START)
    self._events.write_event(Event(step=step + 1, session_log=start))

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes the scalars of a step, at once."""
    line = json.dumps({'step': step, **scalars}) + '\n'
    if self._lines is not None:
      self._lines.append(line)
      if time.monotonic() - self._written > _REWRITE_S:
        self._rewrite()
      return
    self._file.write(line)
    self._file.flush()
    values = [
      Summary.Value(tag=name, simple_value=value)
      for name, value in scalars.items()
    ]
    self._events.write_event(
      Event(wall_time=time.time(), step=step, summary=Summary(value=values))
    )
    if time.monotonic() - self._flushed >= _FLUSH_S:
      self._events.flush()
      self._flushed = time.monotonic()

  def _rewrite(self) -> None:
    write_atomically(self._path, ''.join(self._lines))
    self._written = time.monotonic()

  def close(self) -> None:
    """Flushes and closes both."""
    if self._lines is not None:
      self._rewrite()
      return
    try:
      self._file.close()
    finally:
      self._events.close()


class Progress:
  """Progress bar with images/s, ETA and the loss; notes above it."""

  def __init__(
    self, *, step: int, total_steps: int, batch_size: int, shown: bool = True
  ):
    """Starts after `step` of `total_steps` steps; counts alone if not shown."""
    self._batch_size = batch_size
    self._start = self._last = time.monotonic()
    self._timed_steps = self._first_steps = 0
    self._bar = tqdm(
      total=total_steps,
      initial=step,
      unit='step',
      disable=not shown,
      dynamic_ncols=True,
      # A log file gets a line now and then rather than ten a second.
      mininterval=0.2 if sys.stderr.isatty() else 10.0,
    )

  def images_per_second(self) -> float | None:
    """Throughput without the first call, which compiles; None before it."""
    steps = self._timed_steps - self._first_steps
    if not steps:
      return None
    return steps * self._batch_size / (self._last - self._start)

  def update(self, loss: float, steps: int = 1) -> None:
    """Counts the steps of a finished call."""
    self._last = time.monotonic()
    if not self._timed_steps:
      self._start, self._first_steps = self._last, steps
    self._timed_steps += steps
    rate = self.images_per_second()
    postfix = {'loss': f'{loss:.3f}'}
    if rate is not None:
      postfix['images/s'] = f'{rate:.0f}'
    self._bar.set_postfix(postfix, refresh=False)
    self._bar.update(steps)

  def skip_pause(self) -> None:
    """Leaves the time since the last step out of the throughput."""
    now = time.monotonic()
    self._start += now - self._last
    self._last = now

  def note(self, text: str) -> None:
    """Prints a line without tearing the bar."""
    if not self._bar.disable:
      self._bar.write(text, file=sys.stderr)

  def close(self) -> None:
    """Leaves the bar as it stands."""
    self._bar.close()
