"""Reads files where it is safe: in a process that may die of them.

One that dies, hangs, grows or runs something is noticed and replaced, and the
file that did it is kept.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pathlib
import random
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import NamedTuple

from tests.reliability.mutate import Target, mutate

# Calls that no reader of data has a use for.
_FORBIDDEN = (
  *('os.system', 'os.exec', 'os.posix_spawn', 'os.fork', 'os.forkpty'),
  *('subprocess.Popen', 'pty.spawn', 'pickle.find_class', 'socket.connect'),
)


class Outcome(NamedTuple):
  """What became of a file: 'value', 'refused' or 'failed', and why."""

  kind: str
  text: str


class Counts(NamedTuple):
  """What became of all files of a target."""

  name: str
  values: int
  refused: int
  failures: tuple[str, ...]
  seconds: float

  @property
  def tried(self) -> int:
    """Number of files."""
    return self.values + self.refused + len(self.failures)

  def line(self) -> str:
    """For the summary."""
    return (
      f'{self.name}: {self.tried:,} inputs tried, {self.values:,} read, '
      f'{self.refused:,} refused, {len(self.failures):,} failures, '
      f'{self.seconds:.0f} s'
    )


class _Watch:
  """Notes what a reader does that no reader should do."""

  def __init__(self) -> None:
    self.seen: list[str] = []
    self.is_on = False

  def __call__(self, event: str, args: tuple) -> None:
    if self.is_on and event in _FORBIDDEN:
      self.seen.append(f'{event}{args!r:.200}')


def _explain(path: pathlib.Path, error: Exception) -> Outcome:
  if type(error).__name__ != 'UserError':
    return Outcome('failed', f'{type(error).__name__}: {error!s:.300}')
  message = str(error)
  if str(path) not in message and str(path.parent) not in message:
    return Outcome('failed', f'does not name the file: {message:.300}')
  if '\n' in message or '\r' in message or len(message) > 4000:
    return Outcome('failed', f'not one short line: {message[:300]!r}')
  return Outcome('refused', message)


def _peak_mebibytes() -> float:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _resident_pages(which: int) -> int:
  with open('/proc/self/statm', encoding='ascii') as file:
    return int(file.read().split()[which])


def _limit_memory(mebibytes: int) -> None:
  """Lets the process ask for no more than so much beyond what it has."""
  now = _resident_pages(0) * resource.getpagesize()
  hard = resource.getrlimit(resource.RLIMIT_AS)[1]
  resource.setrlimit(resource.RLIMIT_AS, (now + mebibytes * 2**20, hard))


def _serve(connection: Connection) -> None:
  """Reads the files that it is told to, until told nothing any more."""
  watch = _Watch()
  sys.addaudithook(watch)
  # What readers say to the user is of no interest here.
  os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
  hard = resource.getrlimit(resource.RLIMIT_AS)[1]
  while True:
    try:
      reader, path, mebibytes = connection.recv()
    except EOFError:
      return
    module, _, name = reader.partition(':')
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    function = getattr(importlib.import_module(module), name)
    # Libraries keep pools of memory of their own beside what is read.
    _limit_memory(4 * mebibytes + 1024)
    peak = _peak_mebibytes()
    before = _resident_pages(1) * resource.getpagesize() / 2**20
    watch.seen.clear()
    try:
      with warnings.catch_warnings():
        warnings.simplefilter('error')
        watch.is_on = True
        function(path)
      outcome = Outcome('value', '')
    except Exception as error:
      outcome = _explain(path, error)
    finally:
      watch.is_on = False
    grown = _peak_mebibytes() - before
    if _peak_mebibytes() > peak and grown > mebibytes:
      outcome = Outcome('failed', f'{grown:.0f} MiB more memory')
    if watch.seen:
      outcome = Outcome('failed', f'it did {watch.seen[0]}')
    connection.send(outcome)


class Worker:
  """A process that reads files; started again after each death."""

  def __init__(self) -> None:
    self._context = multiprocessing.get_context('spawn')
    self._process = None
    self._connection: Connection | None = None

  def __enter__(self) -> Worker:
    return self

  def __exit__(self, *exc_info: object) -> None:
    self.stop()

  def _start(self) -> None:
    self._connection, theirs = self._context.Pipe()
    self._process = self._context.Process(
      target=_serve, args=(theirs,), daemon=True
    )
    self._process.start()
    theirs.close()

  def stop(self) -> None:
    """Ends the process."""
    if self._process is not None:
      self._process.kill()
      self._process.join()
      self._connection.close()
      self._process = None

  def read(self, target: Target, path: pathlib.Path) -> Outcome:
    """What the reader of a target makes of a file."""
    is_new = self._process is None
    if is_new:
      self._start()
    outcome = Outcome('failed', f'more than {target.seconds:g} s')
    try:
      self._connection.send((target.reader, path, target.mebibytes))
      # A new process imports first.
      if self._connection.poll(target.seconds + 60 * is_new):
        outcome = self._connection.recv()
    except (EOFError, OSError):
      self._process.join(5)
      outcome = Outcome('failed', f'died ({self._process.exitcode})')
    if outcome.kind == 'failed':
      # Its state, and the most it ever needed, would tell on the next file.
      self.stop()
    return outcome


def _inputs(
  target: Target, count: int, seed: int
) -> Iterator[tuple[str, bytes]]:
  for number, start in enumerate(target.seeds):
    yield f'seed-{number}', start.wrap(start.data)
  yield from target.specials.items()
  for number in range(count):
    rng = random.Random(f'{target.name} {seed} {number}')
    yield f'mutated-{number}', mutate(rng, target.seeds)


def run(
  worker: Worker,
  target: Target,
  folder: pathlib.Path,
  kept: pathlib.Path,
  *,
  count: int,
  seed: int = 0,
) -> Counts:
  """Reads a target's own files and changed ones.

  Args:
    worker: that reads.
    target: whose files.
    folder: of the folders of the files under test.
    kept: folder for the files that failed.
    count: changed files.
    seed: of the changes.

  Returns:
    The counts; each failure names the file that is kept.
  """
  start = time.monotonic()
  totals = {'value': 0, 'refused': 0}
  failures = []
  path = folder / target.file_name
  path.parent.mkdir(exist_ok=True)
  for name, data in _inputs(target, count, seed):
    path.write_bytes(data)
    outcome = worker.read(target, path)
    if name.startswith('seed-') and outcome.kind == 'refused':
      outcome = Outcome('failed', f'a valid file is refused: {outcome.text}')
    if outcome.kind == 'failed':
      kept.mkdir(parents=True, exist_ok=True)
      copy = kept / f'{target.name}-{name}'.replace(' ', '-')
      copy.write_bytes(data)
      failures.append(f'{copy}: {outcome.text}')
    else:
      totals[outcome.kind] += 1
  seconds = time.monotonic() - start
  return Counts(
    target.name, totals['value'], totals['refused'], tuple(failures), seconds
  )
