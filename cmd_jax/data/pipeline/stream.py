"""The streaming route: Grain decodes ahead of the step, batches are sent.

It gives the batches of the device-resident route, from any step on and without
replaying those before.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator
from concurrent import futures

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh, Sharding

from cmd_jax.data.batch import Batch
from cmd_jax.data.canvas import Canvases
from cmd_jax.data.pipeline.worker import RunExamples, start_worker
from cmd_jax.data.sources.base import Source
from cmd_jax.devices import sharding
from cmd_jax.errors import UserError

# Starts in a row that gave no batch before the run is given up.
_MOST_STARTS = 3

_logger = logging.getLogger(__name__)


def places_of_process(sharding: Sharding, batch_size: int) -> np.ndarray:
  """The places in a global batch that this process's devices hold.

  Args:
    sharding: of the batch's leading axis.
    batch_size: B.

  Returns:
    [b] int, rising: the order in which
    `jax.make_array_from_process_local_data` wants them.
  """
  shares = sharding.addressable_devices_indices_map((batch_size,)).values()
  ranges = {share[0].indices(batch_size)[:2] for share in shares}
  return np.concatenate([np.arange(*ends) for ends in sorted(ranges)])


def _start_grain(
  examples: RunExamples,
  *,
  first_step: int,
  local_size: int,
  num_workers: int,
  ahead: int,
) -> Iterator[dict[str, np.ndarray]]:
  """This process's share of the batches from a step on."""
  dataset = grain.MapDataset.source(examples)[first_step * local_size :]
  if num_workers == 0:
    threads = min(32, os.cpu_count() or 1)
    options = grain.ReadOptions(
      num_threads=threads,
      prefetch_buffer_size=max(threads, ahead * local_size),
    )
    return iter(dataset.to_iter_dataset(options).batch(local_size))
  if not flags.FLAGS.is_parsed():
    # Grain asks absl for its flags, which a program without absl never parses.
    flags.FLAGS.mark_as_parsed()
  # Whole batches cross from process to process, through shared memory.
  dataset = dataset.batch(local_size).to_iter_dataset(
    grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
  )
  options = grain.multiprocessing.MultiprocessingOptions(
    num_workers=num_workers, per_worker_buffer_size=1
  )
  return iter(dataset.mp_prefetch(options, worker_init_fn=start_worker))


def _leave_ctrl_c_to_others() -> None:
  """Keeps SIGINT from this thread and from the processes that it starts.

  Ctrl-C reaches all processes of a terminal; the run ends those that decode
  after its last step. From their first moment on: they inherit this.
  """
  signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))


class _Feed:
  """step -> global `Batch`; reads ahead as long as the steps follow on."""

  def __init__(
    self,
    start: Callable[[int], Iterator[dict[str, np.ndarray]]],
    send: Callable[[dict[str, np.ndarray]], Batch],
    *,
    ahead: int,
  ) -> None:
    self._start, self._send, self._ahead = start, send, ahead
    self._decoded = None
    # One thread, because batches come out of Grain in order.
    self._thread = futures.ThreadPoolExecutor(
      1, 'stream', initializer=_leave_ctrl_c_to_others
    )
    self._coming = collections.deque()
    self._next_step = 0

  def _stop(self) -> None:
    for batch in self._coming:
      batch.cancel()
    futures.wait(self._coming)
    self._coming.clear()
    if self._decoded is not None:
      self._decoded.close()
      self._decoded = None

  def _restart(self, step: int) -> None:
    self._stop()
    self._decoded = self._start(step)
    self._next_step = step

  def _fetch(self) -> Batch:
    return self._send(next(self._decoded))

  def _read_ahead(self, count: int) -> None:
    while len(self._coming) < count:
      self._coming.append(self._thread.submit(self._fetch))

  def __call__(self, step: int) -> Batch:
    for _ in range(_MOST_STARTS):
      if self._decoded is None or step != self._next_step:
        self._restart(step)
      self._read_ahead(self._ahead + 1)
      try:
        batch = self._coming.popleft().result()
      except jax.errors.JaxRuntimeError as error:
        raise UserError(
          f'the images of step {step} do not fit on the devices ({error}): '
          'lower --config.stream.ahead or --config.batch_size'
        ) from error
      except RuntimeError as error:
        # Grain's word for a process that died; the steps are random access,
        # so nothing is lost by beginning again at this one.
        reason = str(error)
        _logger.warning('decoding starts again at step %d: %s', step, error)
        self._stop()
        continue
      self._next_step += 1
      self._read_ahead(self._ahead)
      return batch
    raise UserError(
      f'images cannot be decoded at step {step} ({reason}): the processes that '
      'decode may lack memory, or room in /dev/shm; lower '
      '--config.stream.num_workers (0 decodes in threads)'
    )

  def close(self) -> None:
    """Ends the threads and processes."""
    self._stop()
    self._thread.shutdown()


@contextlib.contextmanager
def streamed_batches(
  canvases: Canvases,
  source: Source,
  *,
  batch_size: int,
  seed: int,
  mesh: Mesh,
  part_ids: np.ndarray | None = None,
  with_labels: bool = False,
  neighbours: np.ndarray | None = None,
  num_workers: int = 0,
  ahead: int = 2,
) -> Iterator[Callable[[int], Batch]]:
  """Gives what decodes the batches of a set and sends them to the devices.

  Args:
    canvases: the set, lazily decoded: takes note of what can't be read.
    source: the set; pickled if there are worker processes.
    batch_size: B of all devices together.
    seed: of the order.
    mesh: the devices.
    part_ids: [N, R, R] uint8 parts to go with the images; may be mapped from a
      file.
    with_labels: whether the labels go with the images.
    neighbours: [N, k] of each image, of which one goes with it; None without.
    num_workers: processes that decode; 0 decodes in threads of this one.
    ahead: batches made, and held on the devices, ahead of the step.

  Yields:
    step -> global `Batch`, split over the devices.

  Raises:
    UserError: images or processes fail over and over.
  """
  split = sharding.sharded(mesh)
  places = places_of_process(split, batch_size)
  examples = RunExamples(
    source,
    canvas_px=canvases.images.shape[1],
    seed=seed,
    batch_size=batch_size,
    places=places,
    neighbours=neighbours,
  )

  def start(step):
    return _start_grain(
      examples,
      first_step=step,
      local_size=len(places),
      num_workers=num_workers,
      ahead=ahead,
    )

  def send(local):
    # A copy: the arrays of a worker are shared memory that Grain takes back,
    # and a device that is a CPU would use them in place.
    local = {name: np.array(x) for name, x in local.items()}
    index, wanted = local['index'], local.pop('wanted')
    for place in np.flatnonzero(index != wanted):
      canvases.skipped.add(int(wanted[place]), int(index[place]))
    if part_ids is not None:
      local['part_ids'] = np.asarray(part_ids[index], np.uint8)
    if with_labels:
      # The source's: the canvases' are gone where an image can't be read.
      local['labels'] = np.asarray(source.labels, np.int32)[index]
    return Batch(
      **{
        name: jax.make_array_from_process_local_data(
          split, x, (batch_size, *x.shape[1:])
        )
        for name, x in local.items()
      }
    )

  feed = _Feed(start, send, ahead=ahead)
  try:
    yield feed
  finally:
    feed.close()
