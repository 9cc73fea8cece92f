"""Metric writers: metrics.jsonl, TensorBoard and the terminal."""

from __future__ import annotations

import json
import pathlib
import sys
import time
from collections.abc import Mapping

import tensorboardX
from tqdm import tqdm

from cmd_jax.atomic import write_atomically


def drop_lines_after(path: pathlib.Path, step: int) -> None:
  """Removes the lines of a metrics.jsonl that lie after a step.

  A resumed run repeats them; a line cut short by a crash goes as well.
  """
  if not path.exists():
    return
  kept = []
  for line in path.read_text(encoding='utf-8').splitlines():
    try:
      if json.loads(line)['step'] <= step:
        kept.append(line + '\n')
    except (ValueError, KeyError, TypeError):
      continue
  write_atomically(path, ''.join(kept))


class MetricWriter:
  """Writes scalars to metrics.jsonl and TensorBoard."""

  def __init__(
    self, metrics_file: pathlib.Path, tensorboard: pathlib.Path, *, step: int
  ):
    """Opens both for a run that starts or resumes after `step` steps."""
    drop_lines_after(metrics_file, step)
    self._file = open(metrics_file, 'a', encoding='utf-8')
    self._events = tensorboardX.SummaryWriter(
      str(tensorboard), purge_step=step + 1
    )

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes the scalars of a step, at once."""
    self._file.write(json.dumps({'step': step, **scalars}) + '\n')
    self._file.flush()
    for name, value in scalars.items():
      self._events.add_scalar(name, value, step)

  def close(self) -> None:
    """Flushes and closes both."""
    self._file.close()
    self._events.close()


class Progress:
  """Progress bar with images/s, ETA and the loss; notes above it."""

  def __init__(self, *, step: int, total_steps: int, batch_size: int):
    """Starts after `step` of `total_steps` steps."""
    self._batch_size = batch_size
    self._start = self._last = time.monotonic()
    self._timed_steps = 0
    self._bar = tqdm(
      total=total_steps,
      initial=step,
      unit='step',
      dynamic_ncols=True,
      # A log file gets a line now and then rather than ten a second.
      mininterval=0.2 if sys.stderr.isatty() else 10.0,
    )

  def images_per_second(self) -> float | None:
    """Throughput without the first step, which compiles; None before it."""
    if self._timed_steps < 2:
      return None
    seconds = self._last - self._start
    return (self._timed_steps - 1) * self._batch_size / seconds

  def update(self, loss: float) -> None:
    """Counts a finished step."""
    self._timed_steps += 1
    self._last = time.monotonic()
    if self._timed_steps == 1:
      self._start = self._last
    rate = self.images_per_second()
    postfix = {'loss': f'{loss:.3f}'}
    if rate is not None:
      postfix['images/s'] = f'{rate:.0f}'
    self._bar.set_postfix(postfix, refresh=False)
    self._bar.update()

  def skip_pause(self) -> None:
    """Leaves the time since the last step out of the throughput."""
    now = time.monotonic()
    self._start += now - self._last
    self._last = now

  def note(self, text: str) -> None:
    """Prints a line without tearing the bar."""
    self._bar.write(text, file=sys.stderr)

  def close(self) -> None:
    """Leaves the bar as it stands."""
    self._bar.close()
