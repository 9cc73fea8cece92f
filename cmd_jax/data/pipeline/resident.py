"""The device-resident route: the whole set on the devices, gathered there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cmd_jax.data.batch import Batch, MultiStepBatch
from cmd_jax.data.canvas import Canvases
from cmd_jax.data.channels import dtype_of
from cmd_jax.data.pipeline.order import batch_indices, choose_partners
from cmd_jax.devices import sharding
from cmd_jax.errors import UserError


def check_num_examples(canvases: Canvases, batch_size: int) -> None:
  """Raises UserError for a set that is smaller than a batch."""
  num_examples = len(canvases.images)
  if not num_examples:
    raise UserError(
      f'{canvases.name} has no usable images to train on: check config.dataset'
    )
  if num_examples < batch_size:
    raise UserError(
      f'{canvases.name} has {num_examples} usable '
      f'image{"s" if num_examples > 1 else ""}, fewer than '
      f'config.batch_size {batch_size}: set --config.batch_size to at most '
      f'{num_examples}'
    )


@contextlib.contextmanager
def resident_batches(
  canvases: Canvases,
  *,
  batch_size: int,
  seed: int,
  mesh: Mesh,
  part_ids: np.ndarray | None = None,
  steps_per_dispatch: int = 1,
  with_labels: bool = False,
  neighbours: np.ndarray | None = None,
) -> Iterator[Callable[..., Batch | MultiStepBatch]]:
  """Puts a set on the devices and gives what draws its batches there.

  Args:
    canvases: the set.
    batch_size: B of all devices together.
    seed: of the order.
    mesh: every device of it gets the whole set.
    part_ids: [N, R, R] uint8 parts to go with the images.
    steps_per_dispatch: n, batches drawn at once.
    with_labels: whether the labels go with the images.
    neighbours: [N, k] of each image, of which one goes with it; None without.

  Yields:
    step -> global `Batch`, split over the devices; compiled once. For n above 1
    (step, count) -> `MultiStepBatch` of `count` steps, at most n.

  Raises:
    UserError: the set is smaller than a batch.
  """
  check_num_examples(canvases, batch_size)
  num_examples = len(canvases.images)
  whole, split = sharding.replicated(mesh), sharding.sharded(mesh)
  # Not device_put, which would compare the images of all processes.
  data = jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(whole, np.asarray(x)),
    (
      canvases.images,
      canvases.sizes,
      part_ids,
      canvases.labels if with_labels else None,
    ),
  )

  def draw(data, index, partners):
    images, sizes, *others = jax.tree.map(lambda x: x[index], data)
    batch = Batch(images, sizes, index, *others)
    if partners is None:
      return batch
    return batch._replace(
      partners=data[0][partners], partner_sizes=data[1][partners]
    )

  def indices(step):
    index = batch_indices(
      seed, step, num_examples=num_examples, batch_size=batch_size
    )
    if neighbours is None:
      return index, None
    return index, choose_partners(seed, step, index, neighbours)

  def draw_several(step, count):
    # All calls have one shape; what is too much repeats the last batch.
    numbers = (step + min(i, count - 1) for i in range(steps_per_dispatch))
    chosen = jax.tree.map(lambda *x: np.stack(x), *map(indices, numbers))
    return MultiStepBatch(draw(data, *chosen), np.int32(count))

  if steps_per_dispatch > 1:
    split = sharding.each_sharded(mesh)
  draw = jax.jit(draw, in_shardings=whole, out_shardings=split)
  if steps_per_dispatch > 1:
    yield draw_several
  else:
    yield lambda step: draw(data, *indices(step))


def batch_like(
  canvas_px: int,
  *,
  channels: int = 3,
  batch_size: int,
  mesh: Mesh,
  with_parts: bool = False,
  with_labels: bool = False,
  with_partners: bool = False,
  steps_per_dispatch: int = 1,
) -> Batch | MultiStepBatch:
  """Shapes and shardings of the batches of a set, by either route.

  Args:
    canvas_px: side R of the canvases in pixels.
    channels: C of them.
    batch_size: B of all devices together.
    mesh: the devices.
    with_parts: whether a part mask goes with every image.
    with_labels: whether the labels go with the images.
    with_partners: whether a neighbour goes with every image.
    steps_per_dispatch: n, batches drawn at once.
  """
  leading, split = (batch_size,), sharding.sharded(mesh)
  if steps_per_dispatch > 1:
    leading = steps_per_dispatch, batch_size
    split = sharding.each_sharded(mesh)

  def like(shape, dtype):
    return jax.ShapeDtypeStruct((*leading, *shape), dtype, sharding=split)

  images = like((canvas_px, canvas_px, channels), dtype_of(channels))
  sizes = like((2,), jnp.int32)
  batch = Batch(
    images=images,
    sizes=sizes,
    index=like((), jnp.int32),
    part_ids=like((canvas_px, canvas_px), jnp.uint8) if with_parts else None,
    labels=like((), jnp.int32) if with_labels else None,
    partners=images if with_partners else None,
    partner_sizes=sizes if with_partners else None,
  )
  if steps_per_dispatch == 1:
    return batch
  whole = sharding.replicated(mesh)
  return MultiStepBatch(
    batch, jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
  )
