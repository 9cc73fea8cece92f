"""Devices, shardings and collectives: the only module that names an axis.

One pure step is compiled two ways. Under `jit` arrays are global and XLA
inserts the communication; under `pmap` the step sees one device's share and
communicates through the functions below, which are identities when there is
no axis name.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cmd_jax.errors import UserError

DATA_AXIS = 'data'
MODES = ('jit', 'pmap')


def make_mesh(num_devices: int | None = None) -> Mesh:
  """A one-axis mesh over the first `num_devices` devices, all by default.

  Raises:
    UserError: fewer devices are present.
  """
  devices = jax.devices()
  if num_devices and num_devices > len(devices):
    raise UserError(
      f'config.parallel.num_devices is {num_devices}, but {len(devices)} '
      f'{devices[0].platform} device(s) are present: ask for at most that many'
    )
  # Not jax.make_mesh: its axes are Explicit by default, under which a reshape
  # of a sharded batch is an error.
  return Mesh(np.array(devices[: num_devices or None]), (DATA_AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of an array that every device holds whole."""
  return NamedSharding(mesh, P())


def split_over_data(mesh: Mesh) -> NamedSharding:
  """The sharding of an array whose leading axis is split over the devices."""
  return NamedSharding(mesh, P(DATA_AXIS))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
  """Raises UserError unless the devices can share the batch evenly."""
  if batch_size % mesh.size:
    lower = batch_size // mesh.size * mesh.size
    nearest = f'{lower} or {lower + mesh.size}' if lower else f'{mesh.size}'
    raise UserError(
      f'config.batch_size is {batch_size}, which {mesh.size} devices cannot '
      f'share evenly: use {nearest}, or set config.parallel.num_devices'
    )


def pmean(tree, axis_name: str | None):
  """Mean over the devices; the argument itself without an axis name."""
  return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def psum(tree, axis_name: str | None):
  """Sum over the devices; the argument itself without an axis name."""
  return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def all_gather(x: jax.Array, axis_name: str | None) -> jax.Array:
  """All devices' shares of the leading axis, in the order of the devices."""
  if axis_name is None:
    return x
  return jax.lax.all_gather(x, axis_name, tiled=True)


def axis_index(axis_name: str | None) -> jax.Array | int:
  """Number of this device along the axis; 0 without an axis name."""
  return 0 if axis_name is None else jax.lax.axis_index(axis_name)


def on_each_device(
  fn: Callable, mesh: Mesh | None, axis_name: str | None = None
) -> Callable:
  """Lets each device compute on its share of an example axis.

  Args:
    fn: (shared, examples, axis_name) -> (equal on all devices, of the
      examples); `axis_name` is for collectives, None if there is one device.
    mesh: the devices over which global arrays are spread; None where the
      arrays are one device's share already.
    axis_name: what `fn` is given then.

  Returns:
    (shared, examples) -> what `fn` returns, for arrays like those given.
  """
  if mesh is None or mesh.size == 1:
    return lambda shared, examples: fn(shared, examples, axis_name)
  return jax.shard_map(
    lambda shared, examples: fn(shared, examples, DATA_AXIS),
    mesh=mesh,
    in_specs=(P(), P(DATA_AXIS)),
    out_specs=(P(), P(DATA_AXIS)),
    check_vma=False,
  )


def compile_step(
  make_step: Callable[..., Callable], *, mode: str, mesh: Mesh
) -> Callable:
  """Compiles a step for the devices of a mesh.

  The state has no device axis in either mode, so checkpoints and evaluators do
  not know which one ran. `jax.pmap` is in maintenance mode since JAX 0.8 and
  implemented by jit and shard_map; it is offered because it was asked for.

  Args:
    make_step: (axis_name, mesh) -> step(state, batch, rng) -> (state, metrics),
      pure; there is an axis name under pmap, and a mesh under jit.
    mode: 'jit' or 'pmap'.
    mesh: the devices.

  Returns:
    step(state, batch, rng) for global batches; the state is donated.

  Raises:
    UserError: unknown mode.
  """
  if mode == 'jit':
    whole, split = replicated(mesh), split_over_data(mesh)
    return jax.jit(
      make_step(axis_name=None, mesh=mesh),
      in_shardings=(whole, split, whole),
      out_shardings=(whole, whole),
      donate_argnums=0,
    )
  if mode == 'pmap':
    step = jax.pmap(
      make_step(axis_name=DATA_AXIS, mesh=None),
      axis_name=DATA_AXIS,
      in_axes=(None, 0, None),
      out_axes=(None, None),
      devices=list(mesh.devices.flat),
      donate_argnums=0,
    )

    def with_device_axis(state, batch, rng):
      shares = jax.tree.map(
        lambda x: jnp.reshape(x, (mesh.size, -1, *x.shape[1:])), batch
      )
      return step(state, shares, rng)

    return with_device_axis
  raise UserError(
    f'config.parallel.mode is {mode!r}: choose one of {", ".join(MODES)}'
  )


def compile_ahead(step: Callable, *arguments) -> Callable:
  """Compiles a step for the shapes of its arguments without calling it.

  Args:
    step: from `compile_step`. One made by pmap is returned as it is and
      compiles when it is first called.
    *arguments: shapes and shardings of the arguments.

  Returns:
    A function like `step`, for these shapes alone.
  """
  if not hasattr(step, 'lower'):
    return step
  return step.lower(*arguments).compile()
