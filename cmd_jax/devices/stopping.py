"""Ctrl-C and SIGTERM: one line and exit status 128 + N, at every moment.

Between the steps of a run `training.loop` answers signals, which `Remembered`
keeps for it, and saves its state.
Everywhere else the process ends at once. An exception would not do: modules of
C++ that are being imported crash on it, libraries swallow it in their
callbacks, the compiler may hold the main thread for a minute, and an
interpreter that ends while other threads run native code is killed by the C++
runtime. Nothing is lost by an end at once, because what is written appears
whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds that giving back may take.
_GRACE_S = 5.0

_phase = 'start-up'
_given_back: list[Callable[[], None]] = []
# Taken once and never released: one thread ends the process.
_ending = threading.Lock()


@contextlib.contextmanager
def during(what: str) -> Iterator[None]:
  """Names what is done meanwhile, for the line of a signal that comes then."""
  global _phase
  before, _phase = _phase, what
  try:
    yield
  except KeyboardInterrupt:
    # Who catches it tells the line.
    raise
  except BaseException:
    _phase = before
    raise
  _phase = before


def describe(number: int) -> str:
  """One line: which signal stopped what."""
  name = signal.Signals(number).name
  return f'stopped by {name} during {_phase}; the same command goes on'


@contextlib.contextmanager
def giving_back(give_back: Callable[[], None]) -> Iterator[None]:
  """Has something done should a signal end the process meanwhile.

  Args:
    give_back: () -> None; called in any thread, wherever the others are.
  """
  _given_back.append(give_back)
  try:
    yield
  finally:
    _given_back.remove(give_back)


def _is_answered(number: int) -> bool:
  """False where who started the program has said no to the signal.

  As a shell does with SIGINT for what it runs in the background.
  """
  return signal.getsignal(number) is not signal.SIG_IGN


class Remembered:
  """Remembers SIGINT and SIGTERM instead of dying of them.

  Attributes:
    received: number of the signal that came; None without.
  """

  def __init__(self):
    self.received: int | None = None

  def __enter__(self) -> Remembered:
    self._previous = {
      number: signal.signal(number, self._remember)
      for number in _SIGNALS
      if _is_answered(number)
    }
    return self

  def _remember(self, number: int, frame: object) -> None:
    del frame
    if self.received == number == signal.SIGINT:
      raise KeyboardInterrupt  # A second Ctrl-C means it.
    self.received = number

  def __exit__(self, error_type: type | None, *_) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    if self.received and error_type is None:
      # It came after it was last asked for.
      signal.raise_signal(self.received)


def _end(number: int) -> NoReturn:
  if _ending.acquire(blocking=False):
    # A terminal shows ^C, and perhaps a progress bar, on this line.
    before = '\n' if os.isatty(2) else ''
    with contextlib.suppress(OSError):
      os.write(2, f'{before}{describe(number)}\n'.encode())
      # Whatever is printed from here on is the noise of ending.
      quiet = os.open(os.devnull, os.O_WRONLY)
      os.dup2(quiet, 2)
    for give_back in reversed(_given_back):
      with contextlib.suppress(Exception):
        give_back()
    with contextlib.suppress(Exception):
      sys.stdout.flush()
  else:
    # Another thread does so, unless it waits for this one.
    time.sleep(_GRACE_S)
  os._exit(128 + number)


def _stop(number: int, frame: object) -> None:
  del frame
  _end(number)


def _watch(descriptor: int) -> None:
  """Answers a signal while the main thread is in native code."""
  while True:
    number = os.read(descriptor, 1)[0]
    # Others may have put something else in the handler's place.
    if number in _SIGNALS and signal.getsignal(number) is _stop:
      _end(number)


def _install() -> None:
  for number in _SIGNALS:
    if _is_answered(number):
      signal.signal(number, _stop)
  reading, writing = os.pipe()
  os.set_blocking(writing, False)
  signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
  threading.Thread(target=_watch, args=(reading,), daemon=True).start()


def run_program(run: Callable[[], int]) -> NoReturn:
  """Runs a program to its end, or to the signal that stops it.

  Args:
    run: () -> exit status; what it imports itself can be stopped as well.
  """
  _install()
  code = run()
  for number in _SIGNALS:
    # All is done and told; the interpreter, as it ends, would let them kill it.
    signal.signal(number, signal.SIG_IGN)
  if code >= 128:
    # Threads that still compile would be torn down with the interpreter.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  sys.exit(code)
