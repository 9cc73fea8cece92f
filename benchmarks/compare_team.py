"""Runs main.py several times side by side, for `benchmarks.compare`."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

from benchmarks import record
from benchmarks.compare_runs import Run, has_scores
from cmd_jax.errors import UserError
from cmd_jax.files.atomic import write_atomically
from cmd_jax.files.safe_read import one_line

MAIN = record.REPOSITORY / 'main.py'
_LAST_LINES = 6
_POLL_S = 0.2
# Runs take minutes to hours, in which their last lines tell that they go on.
_REPORT_EVERY_S = 60.0


def share_cores(jobs: int) -> list[tuple[int, ...]]:
  """The cores of each of the runs side by side; none where all are free.

  Raises:
    UserError: more runs than cores.
  """
  affinity = getattr(os, 'sched_getaffinity', None)
  cores = sorted(affinity(0)) if affinity else range(os.cpu_count() or 1)
  if not 1 <= jobs <= len(cores):
    raise UserError(f'--jobs={jobs}: give 1 to {len(cores)}, a core for each')
  if jobs == 1 or affinity is None:
    return [()] * jobs
  each = len(cores) // jobs
  return [tuple(cores[i * each : (i + 1) * each]) for i in range(jobs)]


@contextlib.contextmanager
def _bound_to(cores: Sequence[int]) -> Iterator[None]:
  """What is started within inherits these cores; all where there are none."""
  if not cores:
    yield
    return
  before = os.sched_getaffinity(0)
  os.sched_setaffinity(0, cores)
  try:
    yield
  finally:
    os.sched_setaffinity(0, before)


class _Child(NamedTuple):
  """A process of main.py under way."""

  run: Run
  process: subprocess.Popen
  cores: tuple[int, ...]
  session: dict[str, Any]
  start: float


class Outcome(NamedTuple):
  """How a run ended.

  Attributes:
    run: the run.
    failed: whether it did not reach its end.
  """

  run: Run
  failed: bool


def last_lines(path: pathlib.Path, count: int = _LAST_LINES) -> list[str]:
  """The last lines of a log, of a progress bar its last state."""
  with open(path, 'rb') as file:
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - 8192))
    text = file.read().decode(errors='replace')
  lines = [line.rpartition('\r')[2].strip() for line in text.split('\n')]
  return [one_line(line) for line in lines if line][-count:]


class Team:
  """Runs side by side, each on its own cores; `with` stops what is left."""

  def __init__(
    self,
    runs: Sequence[Run],
    cores: Sequence[tuple[int, ...]],
    say: Callable[[str], None],
  ):
    """Starts nothing yet.

    Args:
      runs: in their order.
      cores: from `share_cores`, of each of those side by side.
      say: is given a line at the start and the end of each, and every minute
        the last line of its log.
    """
    self.failed: list[str] = []
    self._waiting, self._cores = list(runs), list(cores)
    self._jobs, self._total, self._say = len(cores), len(runs), say
    self._children: list[_Child] = []
    self._seconds: list[float] = []
    self._handlers = {}
    self._reported = time.monotonic()

  def __enter__(self) -> Self:
    def stop(*_):
      raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
      self._handlers[number] = signal.signal(number, stop)
    return self

  def __exit__(self, *_) -> None:
    try:
      for child in self._children:
        self._say(f'stops {child.run.name}, which can be resumed')
        child.process.send_signal(signal.SIGTERM)
      while self._children:
        self._reap()
        time.sleep(_POLL_S)
    finally:
      for child in self._children:
        child.process.kill()
      for number, handler in self._handlers.items():
        signal.signal(number, handler)

  def _start(self, run: Run) -> None:
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    cores = self._cores.pop(0)
    session = {
      'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
      'commit': record.commit(),
      'side_by_side': self._jobs,
      'load_average': [round(os.getloadavg()[0], 1)],
    }
    with _bound_to(cores), open(run.log, 'ab') as log:
      process = subprocess.Popen(
        [sys.executable, str(MAIN), *run.arguments],
        cwd=record.REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        # A Ctrl-C is for this process, which passes it on once.
        process_group=0,
      )
    self._children.append(
      _Child(run, process, cores, session, time.monotonic())
    )
    self._say(f'starts {run.name}; {self._left()}')

  def _left(self) -> str:
    left = len(self._waiting) + len(self._children)
    text = f'{left} of {self._total} left'
    if left and self._seconds:
      seconds = statistics.mean(self._seconds) * left / self._jobs
      text += f', about {max(1, round(seconds / 60))} min'
    return text

  def _reap(self) -> list[_Child]:
    """Those that have ended, their sessions written."""
    ended = []
    for child in list(self._children):
      pid, status, usage = os.wait4(child.process.pid, os.WNOHANG)
      if not pid:
        continue
      child.process.returncode = os.waitstatus_to_exitcode(status)
      self._children.remove(child)
      self._cores.append(child.cores)
      # Linux counts kibibytes, macOS bytes.
      unit = 2**20 if sys.platform == 'darwin' else 2**10
      child.session.update(
        exit_code=child.process.returncode,
        wall_seconds=round(time.monotonic() - child.start, 1),
        peak_memory_mib=round(usage.ru_maxrss / unit),
      )
      child.session['load_average'].append(round(os.getloadavg()[0], 1))
      sessions = [*record.read(child.run.sessions), child.session]
      text = json.dumps(sessions, indent=2) + '\n'
      write_atomically(child.run.sessions, text)
      ended.append(child)
    return ended

  def _judge(self, child: _Child) -> Outcome:
    run, seconds = child.run, child.session['wall_seconds']
    failed = child.process.returncode != 0 or not has_scores(run)
    if failed:
      self.failed.append(run.name)
      said = '\n'.join(f'  {line}' for line in last_lines(run.log))
      code = child.process.returncode
      self._say(f'failed: {run.name} (exit code {code}, {run.log})\n{said}')
    else:
      self._seconds.append(seconds)
      self._say(f'done: {run.name} in {seconds:.0f} s; {self._left()}')
    return Outcome(run, failed)

  def _report(self) -> None:
    """Says what each run has come to, if it is time to."""
    now = time.monotonic()
    if now - self._reported < _REPORT_EVERY_S:
      return
    self._reported = now
    for child in self._children:
      for line in last_lines(child.run.log, 1):
        self._say(f'  {child.run.name}: {line}')

  def outcomes(self) -> Iterator[Outcome]:
    """Runs all, and gives each when it has ended."""
    while self._waiting or self._children:
      while self._waiting and self._cores:
        self._start(self._waiting.pop(0))
      for child in self._reap():
        yield self._judge(child)
      self._report()
      time.sleep(_POLL_S)
