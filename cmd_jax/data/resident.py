"""The device-resident route: the whole set on the devices, gathered there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cmd_jax import parallel
from cmd_jax.data.canvas import Canvases
from cmd_jax.data.order import batch_indices
from cmd_jax.errors import UserError
from cmd_jax.train_step import Batch


def check_num_examples(canvases: Canvases, batch_size: int) -> None:
  """Raises UserError for a set that is smaller than a batch."""
  num_examples = len(canvases.images)
  if not num_examples:
    raise UserError(
      f'{canvases.name} has no usable images to train on: check config.dataset'
    )
  if num_examples < batch_size:
    raise UserError(
      f'{canvases.name} has {num_examples} usable images, fewer than '
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
) -> Iterator[Callable[[int], Batch]]:
  """Puts a set on the devices and gives what draws its batches there.

  Args:
    canvases: the set.
    batch_size: B of all devices together.
    seed: of the order.
    mesh: every device of it gets the whole set.
    part_ids: [N, R, R] uint8 parts to go with the images.

  Yields:
    step -> global `Batch`, split over the devices; compiled once.

  Raises:
    UserError: the set is smaller than a batch.
  """
  check_num_examples(canvases, batch_size)
  num_examples = len(canvases.images)
  whole, split = parallel.replicated(mesh), parallel.split_over_data(mesh)
  data = jax.device_put((canvases.images, canvases.sizes, part_ids), whole)

  def draw(data, index):
    images, sizes, part_ids = jax.tree.map(lambda x: x[index], data)
    return Batch(images, sizes, index, part_ids)

  draw = jax.jit(draw, in_shardings=(whole, whole), out_shardings=split)
  yield lambda step: draw(
    data,
    batch_indices(seed, step, num_examples=num_examples, batch_size=batch_size),
  )


def batch_like(
  canvases: Canvases, *, batch_size: int, mesh: Mesh, with_parts: bool = False
) -> Batch:
  """Shapes and shardings of the batches of a set, by either route."""
  split = parallel.split_over_data(mesh)

  def like(shape, dtype):
    return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=split)

  return Batch(
    images=like(canvases.images.shape[1:], jnp.uint8),
    sizes=like((2,), jnp.int32),
    index=like((), jnp.int32),
    part_ids=like(canvases.images.shape[1:3], jnp.uint8)
    if with_parts
    else None,
  )
