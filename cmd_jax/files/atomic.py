"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator


def make_place(path: pathlib.Path) -> None:
  """Makes the folder of a file or folder that is written later.

  So that one which cannot be written is known before the work.

  Args:
    path: of the later file or folder.

  Raises:
    OSError: nothing can be written there.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryFile(dir=path.parent):
    pass


@contextlib.contextmanager
def new_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Lets a folder appear only when all of it is written.

  Args:
    path: of the folder; nothing is there, or an empty folder.

  Yields:
    A hidden folder beside it to write into, which takes its place if the block
    ends well and is removed if it does not.

  Raises:
    OSError: it can't be made.
  """
  path = path.absolute()
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished = pathlib.Path(
    tempfile.mkdtemp(dir=path.parent, prefix=f'.{path.name}.')
  )
  try:
    os.chmod(unfinished, 0o755)
    yield unfinished
    # Over an empty folder, or over nothing.
    os.replace(unfinished, path)
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
  """Writes a whole file or leaves the old one.

  Args:
    path: of the file; its folder exists. May be an `epath.Path` of an object
      store, which shows a file when it is whole.
    content: bytes, or text to be written as UTF-8; names of files in it that
      are no valid Unicode become the bytes that they are.
  """
  if isinstance(content, str):
    content = content.encode(errors='surrogateescape')
  if '://' in str(path):
    path.write_bytes(content)
    return
  descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
  try:
    with os.fdopen(descriptor, 'wb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.chmod(name, 0o644)
    os.replace(name, path)
  except BaseException:
    # Gone with its folder, it must not hide why.
    with contextlib.suppress(OSError):
      os.unlink(name)
    raise
