"""Where a set is kept while it is trained on: the devices, or its files."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
import psutil
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from cmd_jax.data.channels import dtype_of
from cmd_jax.devices import chips
from cmd_jax.errors import UserError

PLACEMENTS = ('auto', 'device', 'stream')

# Of a device's memory, the rest being for the model and its activations; of
# the host's, which holds the images of both splits while they are decoded.
DEVICE_SHARE, _HOST_SHARE = 0.4, 0.5


class Placement(NamedTuple):
  """Where a set is kept.

  Attributes:
    route: 'device' or 'stream'.
    reason: one line that says why.
  """

  route: str
  reason: str


def _size(num_bytes: float) -> str:
  if num_bytes >= 2**30:
    return f'{num_bytes / 2**30:.1f} GiB'
  return f'{num_bytes / 2**20:.0f} MiB'


def bytes_on_device(
  num_pretrain: int, canvas_px: int, with_parts: bool, channels: int = 3
) -> int:
  """What the training images take of a device that keeps them all."""
  pixel = channels * np.dtype(dtype_of(channels)).itemsize
  return num_pretrain * canvas_px**2 * (pixel + with_parts)


def choose_placement(
  wanted: str,
  *,
  num_pretrain: int,
  num_test: int,
  canvas_px: int,
  channels: int = 3,
  with_parts: bool,
  mesh: Mesh,
  route_before: str | None = None,
) -> Placement:
  """Chooses from the size of a set and the memory that there is.

  The device route needs the training images on every device and the images of
  both splits in the host's memory.

  Args:
    wanted: one of `PLACEMENTS`.
    num_pretrain: images trained on.
    num_test: images evaluated on.
    canvas_px: side R of the canvases in pixels.
    channels: C of the images.
    with_parts: whether a part mask goes with every training image.
    mesh: the devices.
    route_before: of the run that goes on, which `auto` keeps; None for a new
      one.

  Raises:
    UserError: an unknown placement.
  """
  if wanted not in PLACEMENTS:
    raise UserError(
      f'config.placement is {wanted!r}: choose one of {", ".join(PLACEMENTS)}'
    )
  on_device = bytes_on_device(num_pretrain, canvas_px, with_parts, channels)
  on_host = on_device + bytes_on_device(num_test, canvas_px, False, channels)
  limit = chips.memory_limit(mesh.devices.flat[0])
  if limit is None:
    # Every CPU device has a copy of its own in the same memory.
    on_host += on_device * sum(
      device.process_index == jax.process_index()
      for device in mesh.devices.flat
    )
  free = psutil.virtual_memory().available
  fits = on_host <= _HOST_SHARE * free
  needs = f'{_size(on_host)} of {_size(free)} free host memory'
  if limit is None and num_pretrain:
    needs += ' (training images once as read and once on each CPU device)'
  if limit is not None:
    fits = fits and on_device <= DEVICE_SHARE * limit
    needs = f'{_size(on_device)} of {_size(limit)} on each device and {needs}'
  if jax.process_count() > 1:
    # All hosts take one route, or those on the other would wait for ever.
    fits = bool(multihost_utils.process_allgather(np.array(fits)).all())
  route = wanted
  if wanted == 'auto':
    route = route_before or ('device' if fits else 'stream')
  allowed = f'{_HOST_SHARE:.0%} of the host'
  if limit is not None:
    allowed = f'{DEVICE_SHARE:.0%} of a device and {allowed}'
  why = 'as config.placement says'
  if wanted == 'auto' and route_before:
    why = 'as when the run began'
  elif wanted == 'auto':
    why = f'{"within" if fits else "more than"} {allowed}'
  return Placement(
    route,
    f'placement {route}: {num_pretrain + num_test} images take {needs}, {why}',
  )
