"""Reads files of anybody: none is waited for, none takes more than it is worth.

NumPy's own reader of .npz files sets aside what a header asks for, and zipfile
expands a member beyond the size that the archive tells.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
import zipfile
from typing import Any, BinaryIO

import numpy as np

# An archive may expand to this multiple of its size, or to this many bytes.
MAX_EXPANSION = 32
MAX_EXPANDED_BYTES = 2**26

# As numpy.lib.format writes it; Python 2 put an L behind large numbers.
_HEADER = re.compile(
  rb"\s*\{\s*'descr':\s*(?:'([^']{1,16})'|.{1,4000}?),"
  rb"\s*'fortran_order':\s*(True|False),"
  rb"\s*'shape':\s*\(([0-9L, ]{0,1000})\),?\s*\}\s*",
  re.DOTALL,
)
_DTYPE = re.compile(r'[<>|=]?[biufcUV]\d{1,9}')
_LAST_CODE_POINT = 0x10FFFF


class NotNumericError(ValueError):
  """An array of objects, records or dates."""


def check_expansion(archive: zipfile.ZipFile, size: int) -> None:
  """Refuses an archive that says it is far larger than its file.

  Args:
    archive: any.
    size: of its file in bytes.

  Raises:
    ValueError: it would expand to more than `MAX_EXPANSION` times its size and
      `MAX_EXPANDED_BYTES`.
  """
  limit = max(MAX_EXPANSION * size, MAX_EXPANDED_BYTES)
  if sum(member.file_size for member in archive.infolist()) > limit:
    raise ValueError(f'would expand to more than {limit} bytes')


def _parse_header(data: bytes) -> tuple[int, np.dtype, tuple[int, ...], str]:
  """Where the numbers begin, their dtype, shape and order."""
  if data[:6] != b'\x93NUMPY' or data[6:8] not in (b'\1\0', b'\2\0', b'\3\0'):
    raise ValueError('not an array')
  width = 2 if data[6] == 1 else 4
  start = 8 + width
  end = start + int.from_bytes(data[8:start], 'little')
  found = _HEADER.fullmatch(data[start : min(end, start + 10_000)])
  if found is None or end > len(data):
    raise ValueError('its header is damaged')
  descr = (found[1] or b'').decode('latin-1')
  if not _DTYPE.fullmatch(descr):
    raise NotNumericError(f'an array of {descr or "records"}')
  try:
    dtype = np.dtype(descr)
  except TypeError as error:
    raise ValueError(f'an array of {descr}, which there is not') from error
  shape = tuple(int(n) for n in re.findall(rb'\d+', found[3]))
  return end, dtype, shape, 'F' if found[2] == b'True' else 'C'


def read_member(
  archive: zipfile.ZipFile, member: zipfile.ZipInfo
) -> np.ndarray:
  """Reads an array of numbers or text.

  Args:
    archive: one that passed `check_expansion`.
    member: of the archive.

  Returns:
    The array in native byte order; dtypes that NumPy lacks are raw bytes, V.

  Raises:
    NotNumericError: an array of something else.
    ValueError: it is damaged or not as large as its shape.
  """
  if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
    raise ValueError('it is compressed in a way that np.savez does not use')
  try:
    with archive.open(member) as file:
      # Without a size it would expand whatever there is.
      data = file.read(member.file_size)
  # zipfile and zlib each have their own errors.
  except Exception as error:
    raise ValueError(one_line(error) or type(error).__name__) from error
  start, dtype, shape, order = _parse_header(data)
  if len(shape) > 32 or math.prod(shape) * dtype.itemsize != len(data) - start:
    raise ValueError('an array whose size is not that of its shape')
  if not dtype.itemsize:
    return np.zeros(shape, dtype)
  array = np.frombuffer(data, dtype, offset=start).reshape(shape, order=order)
  array = array.astype(dtype.newbyteorder('='), copy=False)
  if dtype.kind == 'U' and array.size:
    letters = np.ascontiguousarray(array).view(np.uint32)
    if letters.max() > _LAST_CODE_POINT:
      raise ValueError('its text is damaged')
  return array


def read_npz(file: BinaryIO) -> dict[str, np.ndarray]:
  """Reads all arrays of an .npz file.

  Args:
    file: open for reading, at any position.

  Returns:
    Arrays by name, all of numbers or text, some of them read-only.

  Raises:
    OSError: the file can't be read.
    ValueError: it is damaged, no .npz file, or expands to far more than it is.
  """
  size = file.seek(0, os.SEEK_END)
  try:
    archive = zipfile.ZipFile(file)
  except OSError:
    raise
  # What zipfile raises depends on where an archive is damaged.
  except Exception as error:
    raise ValueError(one_line(error) or type(error).__name__) from error
  with archive:
    check_expansion(archive, size)
    return {
      member.filename.removesuffix('.npy'): read_member(archive, member)
      for member in archive.infolist()
    }


def check_regular(path: str | os.PathLike[str]) -> None:
  """Refuses pipes, devices and folders, of which none is read to an end.

  Raises:
    OSError: there is nothing, or something other than a file.
  """
  if not stat.S_ISREG(os.stat(path).st_mode):
    raise OSError(
      errno.EINVAL,
      'it is not a file but a folder, a pipe or a device',
      os.fspath(path),
    )


def parse_json(text: str | bytes) -> Any:
  """Parses JSON.

  Raises:
    ValueError: it is damaged or nested deeper than anyone would nest it.
  """
  try:
    return json.loads(text)
  except RecursionError as error:
    raise ValueError('it is nested too deeply') from error


def one_line(text: object, length: int = 300) -> str:
  """What a message may quote of a file or an error: a line, and no long one.

  Args:
    text: anything; control characters come out escaped.
    length: characters at most.
  """
  line = ' '.join(str(text).split())
  line = line if len(line) <= length else f'{line[:length]}...'
  return line if line.isprintable() else ascii(line)[1:-1]
