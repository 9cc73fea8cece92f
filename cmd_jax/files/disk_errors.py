"""What a person is told when a disk fails, in place of a traceback."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
from collections.abc import Iterator

from cmd_jax.errors import UserError

_FREE = 'free some'
_REASONS = {
  errno.ENOSPC: ('no space left on {}', _FREE),
  errno.EDQUOT: ('the disk quota is used up at {}', _FREE),
  errno.EFBIG: ('{} reaches the limit on the size of a file', 'raise it'),
  errno.EROFS: ('{} is on a read-only file system', 'mount it for writing'),
  errno.EACCES: ('{} may not be read or written', 'change its permissions'),
  errno.EPERM: ('{} may not be read or written', 'change its permissions'),
  errno.EIO: ('the disk fails at {} (input/output error)', 'look at the disk'),
  errno.ESTALE: ('{} is on a file server that has gone', 'mount it again'),
}


def _chain(error: BaseException | None) -> Iterator[BaseException]:
  """The error and those it was raised from or while handling."""
  seen = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    yield error
    error = error.__cause__ or error.__context__


def explain(error: BaseException, path: pathlib.Path | None) -> str | None:
  """One line on a disk that failed; None if it was something else.

  TensorStore, which writes checkpoints, has only words for what went wrong:
  those that the operating system has for the number.

  Args:
    error: what was raised, with all that led to it.
    path: a folder that is read or written and must be there; named where the
      error names no file.
  """
  if path is not None and not path.exists():
    for found in _chain(error):
      if isinstance(found, FileNotFoundError) or 'NOT_FOUND' in str(found):
        return (
          f'{path} has gone while the program ran: bring it back and repeat '
          'the command'
        )
  for found in _chain(error):
    for number, (what, remedy) in _REASONS.items():
      if isinstance(found, OSError):
        where = found.filename if found.errno == number else None
        known = found.errno == number
      else:
        where, known = None, os.strerror(number) in str(found)
      if known and (where or path):
        return (
          f'{what.format(os.fsdecode(where) if where else path)}: {remedy} '
          'and repeat the command; what was saved before is kept'
        )
  return None


@contextlib.contextmanager
def explaining(path: pathlib.Path | None) -> Iterator[None]:
  """Turns the errors of a failing disk into those that are told in a line.

  Args:
    path: as for `explain`.

  Raises:
    UserError: a disk failed.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    reason = explain(error, path)
    if reason is None:
      raise
    raise UserError(reason) from error


@contextlib.contextmanager
def writing(
  path: str | os.PathLike[str], remedy: str = 'choose another --output'
) -> Iterator[None]:
  """Tells in a line that what a user has named cannot be written.

  Args:
    path: a file or folder.
    remedy: what to do about it.

  Raises:
    UserError: it cannot.
  """
  try:
    yield
  except OSError as error:
    raise UserError(
      f'{path} cannot be written ({error.strerror}): {remedy}'
    ) from error
