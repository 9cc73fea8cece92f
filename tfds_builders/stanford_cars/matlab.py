"""Reads the few kinds of MATLAB files that Stanford Cars comes with.

The format is that of "MAT-File Format, Level 5" by The MathWorks, as far as
structs, cells, text and real numbers go. SciPy's reader is not used: of 3,000
lists cut off and changed in three bytes, 112 end the process with a
segmentation fault there (SciPy 1.17.1).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

_HEADER = 128
# The lists have a few megabytes, and their cells nest three deep.
_MAX_BYTES = 1 << 26
_MAX_DEPTH = 32
_COMPRESSED, _MATRIX = 15, 14
_TEXT = {1: 'latin-1', 2: 'latin-1', 4: 'utf-16', 16: 'utf-8', 17: 'utf-16'}
_NUMBERS = {
  1: 'i1',
  2: 'u1',
  3: 'i2',
  4: 'u2',
  5: 'i4',
  6: 'u4',
  7: 'f4',
  9: 'f8',
  12: 'i8',
  13: 'u8',
}
# Classes of arrays; 6 to 15 are numbers.
_CELL, _STRUCT, _CHAR = 1, 2, 4
_NUMERIC = range(6, 16)
_COMPLEX = 0x0800


def _take(parts: Iterator[tuple[int, bytes]]) -> tuple[int, bytes]:
  for part in parts:
    return part
  raise ValueError('the file is cut off')


class _Reader:
  """Reads the elements of a MATLAB file's content, in its byte order."""

  def __init__(self, order: str) -> None:
    self._order = order
    self._left = _MAX_BYTES

  def _expand(self, data: bytes) -> bytes:
    expanded = zlib.decompressobj().decompress(data, self._left + 1)
    self._left -= len(expanded)
    if self._left < 0:
      raise ValueError('it expands to far more than the lists of the set')
    return expanded

  def elements(
    self, data: bytes, depth: int = 0
  ) -> Iterator[tuple[int, bytes]]:
    """Yields (type, content) of one element after another."""
    at = 0
    while at + 8 <= len(data):
      kind, size = struct.unpack_from(f'{self._order}II', data, at)
      if kind >> 16:
        # A small element: its size shares a word with its type.
        kind, size, start, end = kind & 0xFFFF, kind >> 16, at + 4, at + 8
      else:
        start = at + 8
        # Compressed elements alone are not padded to eight bytes.
        padding = 0 if kind == _COMPRESSED else -size % 8
        end = start + size + padding
      content = data[start : start + size]
      if len(content) < size:
        raise ValueError('the file is cut off')
      if kind == _COMPRESSED:
        if depth:
          raise ValueError('compressed twice')
        yield from self.elements(self._expand(content), 1)
      else:
        yield kind, content
      at = end

  def numbers(self, element: tuple[int, bytes]) -> np.ndarray:
    kind, content = element
    return np.frombuffer(content, f'{self._order}{_NUMBERS[kind]}')

  def text(self, element: tuple[int, bytes]) -> str:
    kind, content = element
    encoding = _TEXT[kind]
    if encoding == 'utf-16':
      encoding += '-le' if self._order == '<' else '-be'
    return content.decode(encoding)

  def array(self, data: bytes, depth: int = 0) -> tuple[str, Any]:
    """Reads an array: its name and what `read_matlab` gives for it."""
    if not data:
      return '', []
    if depth > _MAX_DEPTH:
      raise ValueError('nested too deeply')
    # Only whole variables are compressed.
    parts = self.elements(data, 1)
    flags = int(self.numbers(_take(parts))[0])
    array_class = flags & 0xFF
    shape = self.numbers(_take(parts))
    name = self.text(_take(parts))
    if array_class in _NUMERIC and not flags & _COMPLEX:
      return name, self.numbers(_take(parts)).tolist()
    if array_class == _CHAR:
      return name, self.text(next(parts, (1, b'')))
    if array_class == _CELL:
      return name, [self.array(x, depth + 1)[1] for _, x in parts]
    if array_class == _STRUCT:
      # As floats: their product may be beyond any integer.
      count = float(np.prod(shape, dtype=np.float64))
      if not 0 <= count * 8 <= len(data):
        raise ValueError(f'{count:g} structs in {len(data)} bytes')
      return name, self._structs(parts, int(count), depth)
    return name, None

  def _structs(
    self, parts: Iterator[tuple[int, bytes]], count: int, depth: int
  ) -> list[dict[str, Any]]:
    width = int(self.numbers(_take(parts))[0])
    names = _take(parts)[1]
    fields = [
      names[i : i + width].split(b'\0')[0].decode('ascii')
      for i in range(0, len(names), width)
    ]
    return [
      {field: self.array(_take(parts)[1], depth + 1)[1] for field in fields}
      for _ in range(count)
    ]


def read_matlab(data: bytes) -> dict[str, Any]:
  """Reads the variables of a MATLAB file of level 5.

  Args:
    data: content of the file.

  Returns:
    By name: a list of numbers for a numeric array, a string for text, a list
    for a cell, and a list of dicts for a struct array, all without their
    shapes; None for an array of another kind.

  Raises:
    ValueError: the file is of another format or damaged.
  """
  order = {b'IM': '<', b'MI': '>'}.get(data[_HEADER - 2 : _HEADER])
  if order is None:
    raise ValueError('not a MATLAB file of level 5')
  reader = _Reader(order)
  try:
    return dict(
      reader.array(content)
      for kind, content in reader.elements(data[_HEADER:])
      if kind == _MATRIX
    )
  except (ArithmeticError, LookupError, struct.error, zlib.error) as e:
    raise ValueError(f'a damaged MATLAB file ({type(e).__name__}: {e})') from e
