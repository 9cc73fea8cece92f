"""Canvases that are decoded when they are looked at, for sets that don't fit.

`lazy_canvases` gives what `canvas.make_canvases` gives, but for pixels and
masks that are read row by row as they are sliced, so that nothing else has to
know whether a split is in memory.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from cmd_jax.data.canvas import Canvases, Decoded, Skipped, decode_example
from cmd_jax.data.channels import dtype_of
from cmd_jax.data.pipeline.worker import decode_readable
from cmd_jax.data.sources.base import UNLABELLED, Source
from cmd_jax.errors import UserError

# Rows decoded at a time by what goes through a whole split.
_BLOCK = 64


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
  return concurrent.futures.ThreadPoolExecutor(
    min(32, os.cpu_count() or 1), 'decode'
  )


class Unreadable(Sequence):
  """The examples of a source found to be unreadable so far, in its order.

  They lose their label: a stand-in with the label of another is not scored.

  Args:
    source: the examples.
    labels: [N] int32, written to.
  """

  def __init__(self, source: Source, labels: np.ndarray) -> None:
    self._source, self._labels = source, labels
    self._found: dict[int, Skipped] = {}
    self._lock = threading.Lock()

  def add(self, wanted: int, index: int) -> None:
    """Notes that `index` stands in for `wanted` and those between them."""
    count = len(self._source.file_names)
    for distance in range((index - wanted) % count):
      row = (wanted + distance) % count
      if row in self._found:
        continue
      reason = decode_example(self._source, row, 1)
      if isinstance(reason, Decoded):
        name = self._source.file_names[row]
        reason = Skipped(name, 'could not be read when it was needed')
      with self._lock:
        self._found[row] = reason
        self._labels[row] = UNLABELLED

  def __len__(self) -> int:
    return len(self._found)

  def __getitem__(self, number: int | slice) -> Any:
    return tuple(self._found[row] for row in sorted(self._found))[number]


class _Rows:
  """Reads rows of a source; knows the sizes of those it has read."""

  def __init__(self, source: Source, canvas_px: int, skipped: Unreadable):
    self.source, self.canvas_px, self._skipped = source, canvas_px, skipped
    self.count = len(source.file_names)
    self.sizes = np.zeros((self.count, 2), np.int32)
    self.kinds = np.zeros(self.count, np.uint16)
    self.ranges = np.zeros((self.count, 3), np.uint16)

  def decode(self, rows: np.ndarray) -> list[Decoded]:
    """The examples of the rows, in threads."""
    read = functools.partial(
      decode_readable, self.source, canvas_px=self.canvas_px
    )
    found = list(_pool().map(read, rows.tolist()))
    for row, (index, decoded) in zip(rows.tolist(), found):
      self._skipped.add(row, index)
      self.sizes[row] = decoded.size
      self.kinds[row] = decoded.kinds
      self.ranges[row] = decoded.value_range
    return [decoded for _, decoded in found]

  def read_images(self, rows: np.ndarray) -> np.ndarray:
    return np.stack([decoded.canvas for decoded in self.decode(rows)])

  def _read_extra(self, field: str, words: str, rows: np.ndarray) -> np.ndarray:
    found = [getattr(decoded, field) for decoded in self.decode(rows)]
    for row, value in zip(rows, found):
      if value is None:
        raise UserError(
          f'{self.source.name}: {self.source.file_names[row]} has no {words} '
          'as others have; give one to all images or to none'
        )
    return np.stack(found)

  def read_part_ids(self, rows: np.ndarray) -> np.ndarray:
    return self._read_extra('part_ids', 'part mask', rows)

  def read_boxes(self, rows: np.ndarray) -> np.ndarray:
    return self._read_extra('box', 'box', rows).astype(np.float32)

  def read_sizes(self, rows: np.ndarray) -> np.ndarray:
    unknown = np.unique(rows[(self.sizes[rows] == 0).any(1)])
    for start in range(0, len(unknown), _BLOCK):
      self.decode(unknown[start : start + _BLOCK])
    return self.sizes[rows]


class LazyArray:
  """An array whose rows are read when they are asked for.

  Args:
    read: [K] rows -> [K, ...], for K of at least 1.
    shape: of the whole array.
    dtype: of its elements.
  """

  def __init__(
    self,
    read: Callable[[np.ndarray], np.ndarray],
    shape: tuple[int, ...],
    dtype: type,
  ) -> None:
    self._read, self.shape, self.dtype = read, shape, np.dtype(dtype)

  @property
  def ndim(self) -> int:
    """Number of axes."""
    return len(self.shape)

  @property
  def nbytes(self) -> int:
    """Bytes of the whole array, were it in memory."""
    return int(np.prod(self.shape)) * self.dtype.itemsize

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, rows: int | slice | Sequence[int] | np.ndarray) -> Any:
    """The rows as an array; a number alone gives its row."""
    chosen = np.arange(len(self))[rows]
    if np.ndim(chosen) == 0:
      return self._read(chosen[None])[0]
    if not len(chosen):
      return np.empty((0, *self.shape[1:]), self.dtype)
    return self._read(chosen)

  def __iter__(self) -> Iterator[np.ndarray]:
    for start in range(0, len(self), _BLOCK):
      yield from self[start : start + _BLOCK]

  def __array__(
    self, dtype: type | None = None, copy: bool | None = None
  ) -> np.ndarray:
    del copy
    whole = np.empty(self.shape, dtype or self.dtype)
    for start in range(0, len(self), _BLOCK):
      whole[start : start + _BLOCK] = self[start : start + _BLOCK]
    return whole

  def max(self) -> Any:
    """The largest element."""
    return max(row.max() for row in self)


def lazy_canvases(source: Source, *, canvas_px: int) -> Canvases:
  """Gives a source as canvases that are decoded as they are looked at.

  Only the first readable example is decoded. What turns out to be unreadable
  is shown as the next example that is not, without a label, and joins
  `skipped`.

  Args:
    source: the examples, N of them.
    canvas_px: side R of the canvases in pixels.

  Returns:
    The canvases, whose `images`, `sizes`, `part_ids` and `boxes` are
    `LazyArray`s.

  Raises:
    UserError: none of the first examples can be read, or `canvas_px` is not
      positive.
  """
  if canvas_px < 1:
    raise UserError(
      f'{source.name}: canvas_px is {canvas_px}; set it to at least 1 pixel'
    )
  labels = np.array(source.labels, np.int32)
  skipped = Unreadable(source, labels)
  rows = _Rows(source, canvas_px, skipped)
  square = (rows.count, canvas_px, canvas_px)
  part_ids = boxes = None
  if rows.count:
    first = rows.decode(np.zeros(1, int))[0]
    if first.part_ids is not None:
      part_ids = LazyArray(rows.read_part_ids, square, np.uint8)
    if first.box is not None:
      boxes = LazyArray(rows.read_boxes, (rows.count, 4), np.float32)
  return Canvases(
    name=source.name,
    images=LazyArray(
      rows.read_images,
      (*square, source.channels),
      dtype_of(source.channels),
    ),
    sizes=LazyArray(rows.read_sizes, (rows.count, 2), np.int32),
    labels=labels,
    file_names=source.file_names,
    class_names=source.class_names,
    part_ids=part_ids,
    boxes=boxes,
    skipped=skipped,
    kinds=rows.kinds,
    ranges=rows.ranges,
    notes=source.notes,
  )
