"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import pathlib
import tempfile


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
  """Writes a whole file or leaves the old one.

  Args:
    path: of the file; its folder exists.
    content: bytes, or text to be written as UTF-8.
  """
  if isinstance(content, str):
    content = content.encode()
  descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
  try:
    with os.fdopen(descriptor, 'wb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.chmod(name, 0o644)
    os.replace(name, path)
  except BaseException:
    os.unlink(name)
    raise
