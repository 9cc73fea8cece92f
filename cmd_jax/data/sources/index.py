"""What listing a large set found, kept so that it is listed once.

An index is an .npz file with a key that says what was listed and how. One that
is missing, damaged, or of another key is as good as none.
"""

from __future__ import annotations

import array
import hashlib
import io
import json
import logging
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cmd_jax.files import safe_read
from cmd_jax.files.atomic import write_atomically

_KEY = 'key'
# Names decoded at a time.
_BLOCK = 4096
# Part of every key: raise it when the arrays of any index change.
_VERSION = 2

_logger = logging.getLogger(__name__)


class Names(Sequence):
  """Strings in one block of bytes: an eighth of what as many `str` take.

  Args:
    blob: uint8, the strings one after the other as UTF-8; what is no valid
      Unicode, as in file names, as `surrogateescape` has it.
    ends: [M + 1] int64; string i is blob[ends[i] : ends[i + 1]].
    rows: [N] which of the strings; all by default.
  """

  def __init__(
    self, blob: np.ndarray, ends: np.ndarray, rows: np.ndarray | None = None
  ) -> None:
    self.blob, self.ends = blob, ends
    self._rows = np.arange(len(ends) - 1) if rows is None else rows

  @classmethod
  def of(cls, strings: Iterable[str]) -> Names:
    """Names from strings."""
    blob, ends = bytearray(), array.array('q', [0])
    for string in strings:
      blob += string.encode('utf-8', 'surrogateescape')
      ends.append(len(blob))
    return cls(np.frombuffer(blob, np.uint8), np.frombuffer(ends, np.int64))

  def take(self, rows: np.ndarray) -> Names:
    """The names of the given rows, which share the bytes."""
    return Names(self.blob, self.ends, self._rows[rows])

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, number: int | slice) -> Any:
    """A name, or a tuple of them for a slice."""
    if isinstance(number, slice):
      return tuple(self[i] for i in range(*number.indices(len(self))))
    row = self._rows[number]
    name = self.blob[self.ends[row] : self.ends[row + 1]].tobytes()
    return name.decode('utf-8', 'surrogateescape')

  def __iter__(self) -> Iterator[str]:
    bytes_of = memoryview(self.blob)
    for start in range(0, len(self), _BLOCK):
      rows = self._rows[start : start + _BLOCK]
      starts, ends = self.ends[rows].tolist(), self.ends[rows + 1].tolist()
      for first, last in zip(starts, ends):
        yield str(bytes_of[first:last], 'utf-8', 'surrogateescape')

  def __eq__(self, other: object) -> bool:
    if not isinstance(other, Sequence) or isinstance(other, str):
      return NotImplemented
    return len(self) == len(other) and all(a == b for a, b in zip(self, other))

  __hash__ = None

  def __repr__(self) -> str:
    return f'Names({list(self[:3])!r}{", ..." * (len(self) > 3)})'


def default_path(key: Mapping[str, Any]) -> pathlib.Path:
  """Where the index of a key is kept, in the user's folder for caches."""
  cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  name = hashlib.sha256(_encode(key)).hexdigest()[:32]
  return pathlib.Path(cache) / 'cmd_jax' / 'listings' / f'{name}.npz'


def _encode(key: Mapping[str, Any]) -> bytes:
  return json.dumps({'version': _VERSION, **key}, sort_keys=True).encode()


def read_index(
  path: pathlib.Path, key: Mapping[str, Any]
) -> dict[str, np.ndarray] | None:
  """The arrays of an index; None if there is none for the key.

  Args:
    path: of the index.
    key: what was listed and how; JSON can represent it.
  """
  try:
    safe_read.check_regular(path)
    with path.open('rb') as file:
      arrays = safe_read.read_npz(file)
    return arrays if arrays.pop(_KEY).tobytes() == _encode(key) else None
  except FileNotFoundError:
    return None
  except (OSError, ValueError, KeyError) as error:
    _logger.warning('%s is damaged and made anew (%s)', path, error)
    return None


def strings(
  arrays: Mapping[str, np.ndarray], name: str
) -> tuple[str, ...] | None:
  """The strings that an array of an index holds as JSON; None if it has none.

  Args:
    arrays: from `read_index`.
    name: of the array.
  """
  try:
    values = safe_read.parse_json(arrays[name].tobytes())
  except (KeyError, ValueError):
    return None
  if not isinstance(values, list):
    return None
  return tuple(values) if all(isinstance(v, str) for v in values) else None


def has_numbers(
  arrays: Mapping[str, np.ndarray], name: str, count: int, least: int, end: int
) -> bool:
  """Whether an array of an index is [count] integers from `least` to `end` - 1.

  Args:
    arrays: from `read_index`.
    name: of the array.
    count: its length.
    least: the smallest value allowed.
    end: one more than the largest value allowed.
  """
  array = arrays.get(name)
  if array is None or array.shape != (count,) or array.dtype.kind != 'i':
    return False
  return not count or bool(array.min() >= least and array.max() < end)


def names_of(arrays: Mapping[str, np.ndarray]) -> Names | None:
  """The names that an index has; None if `blob` and `ends` do not fit.

  Args:
    arrays: from `read_index`.
  """
  blob, ends = arrays.get('blob'), arrays.get('ends')
  if blob is None or ends is None or blob.dtype != np.uint8 or blob.ndim != 1:
    return None
  if ends.dtype != np.int64 or ends.ndim != 1 or not len(ends):
    return None
  if ends[0] or ends[-1] != len(blob) or (np.diff(ends) < 0).any():
    return None
  return Names(blob, ends)


def write_index(
  path: pathlib.Path, key: Mapping[str, Any], **arrays: np.ndarray
) -> None:
  """Keeps arrays for `read_index`; where it can't, they are listed again.

  Args:
    path: of the index; its folder is made if it is not there.
    key: what was listed and how.
    **arrays: what was found.
  """
  buffer = io.BytesIO()
  np.savez(buffer, **{_KEY: np.frombuffer(_encode(key), np.uint8)}, **arrays)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())
  except OSError as error:
    _logger.warning('the listing is not kept in %s (%s)', path, error)
