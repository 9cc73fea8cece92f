"""What the processes that decode run; nothing here needs JAX or a device."""

from __future__ import annotations

import multiprocessing.connection
import os
import threading

import numpy as np

from cmd_jax.data.canvas import Decoded, Skipped, decode_example
from cmd_jax.data.pipeline.order import batch_indices, choose_partners
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
    neighbours: [N, k] of each example, of which one goes with it; None without.
  """

  def __init__(
    self,
    source: Source,
    *,
    canvas_px: int,
    seed: int,
    batch_size: int,
    places: np.ndarray,
    neighbours: np.ndarray | None = None,
  ) -> None:
    self._source, self._canvas_px = source, canvas_px
    self._seed, self._batch_size = seed, batch_size
    self._places, self._neighbours = places, neighbours

  def __len__(self) -> int:
    return _NUM_STEPS * len(self._places)

  def __getitem__(self, number: int) -> dict[str, np.ndarray]:
    """{images [R, R, 3], sizes [2], index [], wanted []} of an example.

    `index` is the example decoded and `wanted` the one that the order named.
    With neighbours there are `partners` and `partner_sizes` of one besides.
    """
    step, place = divmod(number, len(self._places))
    place = self._places[place]
    named = batch_indices(
      self._seed,
      step,
      num_examples=len(self._source.file_names),
      batch_size=self._batch_size,
    )
    index, decoded = self._decode(named[place])
    example = {
      'images': decoded.canvas,
      'sizes': np.array(decoded.size, np.int32),
      'index': np.int32(index),
      'wanted': named[place],
    }
    if self._neighbours is None:
      return example
    partners = choose_partners(self._seed, step, named, self._neighbours)
    _, partner = self._decode(partners[place])
    return example | {
      'partners': partner.canvas,
      'partner_sizes': np.array(partner.size, np.int32),
    }

  def _decode(self, index: np.integer) -> tuple[int, Decoded]:
    return decode_readable(self._source, int(index), self._canvas_px)


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
