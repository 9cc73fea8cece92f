"""One run to a work directory at a time.

The kernel's own lock (flock) goes with the process that holds it, however that
ends, so on one machine nothing is ever left locked. The file says who holds it
and has a heartbeat, because some network file systems keep the locks of a host
to that host: a lock that the kernel gives although another host's heartbeat is
there is watched, and taken once that is silent. No clocks are compared.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import socket
import sys
import threading
import time
from typing import Any, Self

from cmd_jax.errors import UserError
from cmd_jax.files import disk_errors

FILE = 'lock.json'
# Seconds from one sign of life to the next, and those after which there will
# be no more: a host may hang for some of them.
_BEAT_S = 10.0
_SILENT_S = 45.0
# Seconds after which a file system without locks shows what another process has
# written.
_SETTLE_S = 1.0
# Bytes of the file: all that is read is written at once, or two that come at
# once could leave a mixture of both.
_SIZE = 4096
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def _machine() -> str:
  """What is the same for processes that see each other's kernel locks."""
  with contextlib.suppress(OSError):
    return pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
  return socket.gethostname()


def _read(descriptor: int) -> dict[str, Any]:
  """What the file says; nothing if it is new or cut short."""
  with contextlib.suppress(OSError, ValueError):
    owner = json.loads(os.pread(descriptor, _SIZE, 0))
    if isinstance(owner, dict):
      return owner
  return {}


def _time(seconds: Any) -> str:
  try:
    when = datetime.datetime.fromtimestamp(float(seconds))
  except (OverflowError, OSError, TypeError, ValueError):
    return 'an unknown time'
  age = max(datetime.timedelta(), datetime.datetime.now() - when)
  ago = datetime.timedelta(seconds=round(age.total_seconds()))
  return f'{when.isoformat(" ", "seconds")}, {ago} ago'


def _describe(owner: dict[str, Any]) -> str:
  return (
    f'process {owner.get("pid", "unknown")} on {owner.get("host", "unknown")} '
    f'(since {_time(owner.get("started"))}; last sign of life at '
    f'{_time(owner.get("beat"))})'
  )


class Lock:
  """The right to write to a work directory; `with` gives it back."""

  def __init__(self, directory: pathlib.Path):
    """Names the directory; nothing is touched yet.

    Args:
      directory: of the run. One in an object store, which has no locks, is not
        locked.
    """
    self._directory, self._path = directory, directory / FILE
    self._descriptor: int | None = None
    self._left: threading.Event | None = None
    self._heart: threading.Thread | None = None
    self._started = time.time()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self.release()

  def take(self) -> None:
    """Takes the lock, unless it is held here already.

    Raises:
      UserError: another process holds it, or the directory can't be written.
    """
    if self._descriptor is not None or '://' in str(self._directory):
      return
    with disk_errors.explaining(self._directory):
      self._make_directory()
      descriptor, decisive = self._open()
      try:
        self._check_owner(descriptor, decisive)
        self._beat(descriptor)
        if not decisive:
          self._check_written(descriptor)
      except BaseException:
        os.close(descriptor)
        raise
    self._descriptor, self._left = descriptor, threading.Event()
    self._heart = threading.Thread(target=self._keep_beating, daemon=True)
    self._heart.start()

  def _make_directory(self) -> None:
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
      raise UserError(
        f'{self._directory} cannot be made ({error.strerror}: '
        f'{error.filename}): choose another --workdir'
      ) from error

  def _open(self) -> tuple[int, bool]:
    """The locked file, and whether this file system has locks at all."""
    while True:
      descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
      try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError as error:
        if error.errno in _NO_LOCKS_HERE:
          return descriptor, False
        owner = _read(descriptor)
        os.close(descriptor)
        if not isinstance(error, BlockingIOError):
          raise
        self._refuse(owner, error)
      # Its owner may have removed it since it was opened.
      with contextlib.suppress(FileNotFoundError):
        if os.stat(self._path).st_ino == os.fstat(descriptor).st_ino:
          return descriptor, True
      os.close(descriptor)

  def _refuse(self, owner: dict[str, Any], cause: Exception | None) -> None:
    raise UserError(
      f'{self._directory} is in use by {_describe(owner)}: wait until it ends, '
      'stop it, or choose another --workdir'
    ) from cause

  def _check_owner(self, descriptor: int, decisive: bool) -> None:
    """Refuses while another host's process gives signs of life."""
    owner = _read(descriptor)
    if not owner:
      return
    if not decisive or owner.get('machine') != _machine():
      print(
        f'{self._directory} was in use by {_describe(owner)}; waiting '
        f'{_SILENT_S:.0f} s for a sign of life',
        file=sys.stderr,
      )
      deadline = time.monotonic() + _SILENT_S
      while time.monotonic() < deadline:
        time.sleep(min(1.0, _SILENT_S / 10))
        now = _read(descriptor)
        if now != owner and now:
          self._refuse(now, None)
    print(
      f'{self._directory}: took over the lock of {_describe(owner)}, which has '
      'ended without giving it back',
      file=sys.stderr,
    )

  def _check_written(self, descriptor: int) -> None:
    """Refuses if another has or takes the lock and wrote its name last."""
    # The name may have been written late, over that of a process that has the
    # lock meanwhile and says so with its next heartbeat.
    time.sleep(_BEAT_S + _SETTLE_S)
    owner = _read(descriptor)
    mine = os.getpid(), _machine(), self._started
    if tuple(map(owner.get, ('pid', 'machine', 'started'))) != mine:
      self._refuse(owner, None)

  def _beat(self, descriptor: int) -> None:
    content = json.dumps(
      {
        'host': socket.gethostname(),
        'machine': _machine(),
        'pid': os.getpid(),
        'started': self._started,
        'beat': time.time(),
      }
    ).encode()
    os.pwrite(descriptor, content.ljust(_SIZE), 0)

  def _keep_beating(self) -> None:
    while not self._left.wait(_BEAT_S):
      # A full disk ends the run where it saves, not here.
      with contextlib.suppress(OSError):
        self._beat(self._descriptor)

  def release(self) -> None:
    """Gives the lock back, if it is held."""
    if self._descriptor is None:
      return
    self._left.set()
    self._heart.join()
    # The directory may be gone, or another host may have taken the lock.
    with contextlib.suppress(OSError):
      if _read(self._descriptor).get('started') == self._started:
        os.unlink(self._path)
    os.close(self._descriptor)
    self._descriptor = None
