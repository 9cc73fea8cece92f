"""What the processes that decode run; nothing here needs JAX or a device."""

from __future__ import annotations

import multiprocessing.connection
import os
import threading

import numpy as np

from cmd_jax.data.canvas import Decoded, Skipped, decode_example
from cmd_jax.data.pipeline.order import batch_indices
from cmd_jax.data.sources.base import Source
from cmd_jax.errors import UserError

# More than any run takes: Grain wants to know a length.
_NUM_STEPS = 2**40
# Unreadable examples in a row that are taken for a fault of the storage.
_MOST_UNREADABLE = 100


def decode_readable(
  source: Source, index: int, canvas_px: int
) -> tuple[int, Decoded]:
  """Decodes an example or, if it can't be read, the next that can.

  Args:
    source: the examples; the first follows the last.
    index: number of the example.
    canvas_px: side R of the canvas in pixels.

  Returns:
    The number of the example decoded, and the example.

  Raises:
    UserError: the next hundred can't be read either.
  """
  count = len(source.file_names)
  for distance in range(min(count, _MOST_UNREADABLE)):
    there = (index + distance) % count
    decoded = decode_example(source, there, canvas_px)
    if isinstance(decoded, Decoded):
      return there, decoded
    if not distance:
      first: Skipped = decoded
  raise UserError(
    f'{source.name}: {min(count, _MOST_UNREADABLE)} images in a row cannot be '
    f'read; the first, {first.file_name}: {first.reason}; check the files, '
    'move them away, or use --config.placement=device'
  )


class RunExamples:
  """The examples of an endless run in order, for random access.

  Element k is the example in place k % b of the b examples that this process
  has of batch k // b. An example that can't be read gives way to the next one
  in the source, so what a step sees depends on nothing but the source.

  Args:
    source: the examples.
    canvas_px: side R of the canvases in pixels.
    seed: of the order.
    batch_size: B of all processes together.
    places: [b] this process's places in a batch.
  """

  def __init__(
    self,
    source: Source,
    *,
    canvas_px: int,
    seed: int,
    batch_size: int,
    places: np.ndarray,
  ) -> None:
    self._source, self._canvas_px = source, canvas_px
    self._seed, self._batch_size = seed, batch_size
    self._places = places

  def __len__(self) -> int:
    return _NUM_STEPS * len(self._places)

  def __getitem__(self, number: int) -> dict[str, np.ndarray]:
    """{image [R, R, 3], size [2], index [], wanted []} of an example.

    `index` is the example decoded and `wanted` the one that the order named.
    """
    step, place = divmod(number, len(self._places))
    wanted = batch_indices(
      self._seed,
      step,
      num_examples=len(self._source.file_names),
      batch_size=self._batch_size,
    )[self._places[place]]
    index, decoded = decode_readable(self._source, int(wanted), self._canvas_px)
    return {
      'images': decoded.canvas,
      'sizes': np.array(decoded.size, np.int32),
      'index': np.int32(index),
      'wanted': wanted,
    }


def _end_with_parent() -> None:
  parent = multiprocessing.parent_process()
  multiprocessing.connection.wait([parent.sentinel])
  os._exit(1)


def start_worker(number: int, count: int) -> None:
  """Prepares a process that decodes.

  Args:
    number: of the process.
    count: of processes.
  """
  del number, count
  # A run that is killed can't end them, and they would wait for it for ever.
  threading.Thread(target=_end_with_parent, daemon=True).start()
