"""Devices, shardings and collectives: the only module that names an axis.

Devices lie along one axis, or along two where they are in several slices that
a slower network connects (the data-centre network, DCN, between TPU slices). A
batch is spread over all devices either way; a state only within a slice, so
that between slices nothing but gradients and sums of the batch is sent.

One pure step is compiled two ways. Under `jit` arrays are global and XLA
inserts the communication; under `pmap` the step sees one device's share and
communicates through the functions below, which are identities when there is
no axis name.

Under `jit` the state may be spread over the same axis as the batch (FSDP, Zhao
et al. 2023; ZeRO, Rajbhandari et al. 2020): every device keeps a share of the
large arrays and XLA gathers them where they are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cmd_jax.devices import chips
from cmd_jax.errors import UserError

DATA_AXIS = 'data'
SLICE_AXIS = 'dcn'
MODES = ('jit', 'pmap')
STATES = ('auto', 'replicated', 'fsdp')

# The axis of an array's devices, all of several, or none for an array that is
# global or one device's.
Axes = str | tuple[str, ...] | None

# Elements below which an array stays whole: gathering it would take longer
# than it is worth in memory.
MIN_SHARDED_SIZE = 2**16

# 'auto' spreads a state that would take more than this of a device's memory:
# gradients, views and activations need the rest.
_STATE_SHARE = 0.3


def _by_slice(
  devices: Sequence[jax.Device], num_slices: int
) -> list[jax.Device]:
  """Devices, those of a slice together.

  Those that say in which slice they are (TPUs) are put in the order of the
  slices; others are taken to lie in order, as many in each.
  """
  known = [getattr(x, 'slice_index', None) for x in devices]
  per_slice, rest = divmod(len(devices), num_slices)
  if rest:
    raise UserError(
      f'config.parallel.num_slices is {num_slices}, which {len(devices)} '
      'devices cannot be divided by: use 1, or another number of devices'
    )
  # Devices of a CPU or of one slice are all said to be in slice 0.
  if None in known or len(set(known)) == 1:
    return list(devices)
  if any(known.count(x) != per_slice for x in known):
    raise UserError(
      f'config.parallel.num_slices is {num_slices}, but the devices are in '
      f'{len(set(known))} slices: use as many of each, or 1'
    )
  return sorted(devices, key=lambda x: x.slice_index)


def make_mesh(
  num_devices: int | None = None,
  devices: Sequence[jax.Device] | None = None,
  num_slices: int = 1,
) -> Mesh:
  """A mesh over the first `num_devices` devices, all by default.

  Args:
    num_devices: how many; None or 0 for all.
    devices: from which, which need not be here; those of JAX without.
    num_slices: over how many slices they are spread evenly; more than one make
      the first of two axes.

  Raises:
    UserError: fewer devices are present, or they are in other slices.
  """
  devices = jax.devices() if devices is None else devices
  if num_devices and num_devices > len(devices):
    raise UserError(
      f'config.parallel.num_devices is {num_devices}, but {len(devices)} '
      f'{devices[0].platform} device(s) are present: ask for at most that many'
    )
  devices = devices[: num_devices or None]
  # Not jax.make_mesh: its axes are Explicit by default, under which a reshape
  # of a sharded batch is an error.
  if num_slices == 1:
    return Mesh(np.array(devices), (DATA_AXIS,))
  ordered = np.array(_by_slice(devices, num_slices))
  return Mesh(ordered.reshape(num_slices, -1), (SLICE_AXIS, DATA_AXIS))


def _batch_axes(mesh: Mesh) -> Axes:
  """The axes over which a batch is spread: all that the mesh has."""
  names = mesh.axis_names
  return names[0] if len(names) == 1 else names


def platform_of(mesh: Mesh | None) -> str:
  """'cpu', 'gpu' or 'tpu': the platform of a mesh.

  Args:
    mesh: the devices, which need not be here; None where arrays are those of
      one device of this process.
  """
  device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
  return device.platform


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of an array that every device holds whole."""
  return NamedSharding(mesh, P())


def sharded(mesh: Mesh) -> NamedSharding:
  """The sharding of an array whose leading axis is split over the devices."""
  return NamedSharding(mesh, P(_batch_axes(mesh)))


def each_sharded(mesh: Mesh) -> NamedSharding:
  """The sharding of batches along an axis, each split over the devices."""
  return NamedSharding(mesh, P(None, _batch_axes(mesh)))


def fsdp_spec(
  shape: tuple[int, ...], num_devices: int, min_size: int = MIN_SHARDED_SIZE
) -> P:
  """How an array of the state is spread over the devices under FSDP.

  Args:
    shape: of the array.
    num_devices: over which it is spread.
    min_size: elements below which it stays whole.

  Returns:
    A split of the longest axis that the devices divide, the first of equals;
    `P()` where there is none or the array is small.
  """
  divisible = [i for i, n in enumerate(shape) if n and not n % num_devices]
  if math.prod(shape) < min_size or not divisible:
    return P()
  longest = max(divisible, key=lambda i: shape[i])
  return P(*(DATA_AXIS if i == longest else None for i in range(len(shape))))


def fsdp_shardings(
  tree: Any, mesh: Mesh, min_size: int = MIN_SHARDED_SIZE
) -> Any:
  """The `NamedSharding` of every array of a tree under FSDP.

  Each slice has all of it.
  """
  num_devices = mesh.shape[DATA_AXIS]
  return jax.tree.map(
    lambda x: NamedSharding(mesh, fsdp_spec(x.shape, num_devices, min_size)),
    tree,
  )


def bytes_per_device(tree: Any) -> int:
  """Bytes that one device keeps of arrays, or of shapes with shardings."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def check_state(state: str, mode: str) -> None:
  """Raises UserError for an unknown choice, or for FSDP under pmap."""
  if state not in STATES:
    raise UserError(
      f'config.parallel.state is {state!r}: choose one of {", ".join(STATES)}'
    )
  if state == 'fsdp' and mode != 'jit':
    raise UserError(
      f"config.parallel.state is 'fsdp', which config.parallel.mode={mode} "
      'cannot do: set config.parallel.mode=jit'
    )


def wants_fsdp(state: str, *, mode: str, num_bytes: int, mesh: Mesh) -> bool:
  """Whether the state is spread over the devices.

  Args:
    state: one of `STATES`.
    mode: one of `MODES`.
    num_bytes: of the whole state.
    mesh: the devices.
  """
  if state != 'auto':
    return state == 'fsdp'
  device = mesh.devices.flat[0]
  if mode != 'jit' or mesh.size == 1:
    return False
  limit = chips.memory_limit(device)
  return limit is not None and num_bytes > _STATE_SHARE * limit


def gather(tree: Any, mesh: Mesh) -> Any:
  """Arrays that every device holds whole, wherever they were."""
  return jax.device_put(tree, replicated(mesh))


def constrain(tree: Any, shardings: Any) -> Any:
  """Arrays laid out as told; the argument itself without shardings."""
  if shardings is None:
    return tree
  return jax.lax.with_sharding_constraint(tree, shardings)


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
  """Raises UserError unless the devices can share the batch evenly."""
  if batch_size % mesh.size:
    lower = batch_size // mesh.size * mesh.size
    nearest = f'{lower} or {lower + mesh.size}' if lower else f'{mesh.size}'
    raise UserError(
      f'config.batch_size is {batch_size}, which {mesh.size} devices cannot '
      f'share evenly: use {nearest}, or set config.parallel.num_devices'
    )


def split_microbatches(
  tree: Any, num_microbatches: int, mesh: Mesh | None
) -> Any:
  """[B, ...] -> [M, B / M, ...], each device its own share.

  Args:
    tree: arrays, with one batch axis.
    num_microbatches: that divides the share of a device.
    mesh: the devices over which the batch is spread; None where the arrays are
      one device's share already.
  """
  shares = 1 if mesh is None else mesh.size

  def split(x):
    size = len(x) // (shares * num_microbatches)
    x = x.reshape(shares, num_microbatches, size, *x.shape[1:]).swapaxes(0, 1)
    return x.reshape(num_microbatches, shares * size, *x.shape[3:])

  return constrain(jax.tree.map(split, tree), mesh and each_sharded(mesh))


def pmean(tree, axis_name: Axes):
  """Mean over the devices; the argument itself without an axis name."""
  return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def psum(tree, axis_name: Axes):
  """Sum over the devices; the argument itself without an axis name."""
  return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def logsumexp(x: jax.Array, axis_name: Axes) -> jax.Array:
  """log of the sum of exp over the devices, elementwise."""
  if axis_name is None:
    return x
  peak = jax.lax.pmax(x, axis_name)
  return peak + jnp.log(jax.lax.psum(jnp.exp(x - peak), axis_name))


def all_gather(x: jax.Array, axis_name: Axes) -> jax.Array:
  """All devices' shares of the leading axis, in the order of the devices."""
  if axis_name is None:
    return x
  return jax.lax.all_gather(x, axis_name, tiled=True)


def axis_index(axis_name: Axes) -> jax.Array | int:
  """Number of this device along the axis; 0 without an axis name."""
  return 0 if axis_name is None else jax.lax.axis_index(axis_name)


def on_each_device(
  fn: Callable, mesh: Mesh | None, axis_name: Axes = None
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
  axes = _batch_axes(mesh)
  return jax.shard_map(
    lambda shared, examples: fn(shared, examples, axes),
    mesh=mesh,
    in_specs=(P(), P(axes)),
    out_specs=(P(), P(axes)),
    check_vma=False,
  )


def compile_step(
  make_step: Callable[..., Callable],
  *,
  mode: str,
  mesh: Mesh,
  state_shardings: Any = None,
  batch_shardings: Any = None,
  has_constants: bool = False,
) -> Callable:
  """Compiles a step for the devices of a mesh.

  The state has no device axis in either mode, so checkpoints and evaluators do
  not know which one ran. `jax.pmap` is in maintenance mode since JAX 0.8 and
  implemented by jit and shard_map; it is offered because it was asked for.

  Args:
    make_step: (axis_name, mesh) -> step(state, batch, rng, constants) ->
      (state, metrics), pure; there is an axis name under pmap, and a mesh under
      jit.
    mode: 'jit' or 'pmap'.
    mesh: the devices.
    state_shardings: of the state, under jit; None keeps it whole on each
      device.
    batch_shardings: of the batch, under jit; None splits its leading axis.
    has_constants: whether the step is given constants, which every device keeps
      whole.

  Returns:
    step(state, batch, rng) or step(state, batch, rng, constants) for global
    batches; the state is donated.

  Raises:
    UserError: unknown mode.
  """
  if mode == 'jit':
    whole = replicated(mesh)
    constants = (whole,) * has_constants
    of_state = whole if state_shardings is None else state_shardings
    of_batch = batch_shardings or sharded(mesh)
    return jax.jit(
      make_step(axis_name=None, mesh=mesh),
      in_shardings=(of_state, of_batch, whole, *constants),
      out_shardings=(of_state, whole),
      donate_argnums=0,
    )
  if mode == 'pmap':
    step = jax.pmap(
      make_step(axis_name=DATA_AXIS, mesh=None),
      axis_name=DATA_AXIS,
      in_axes=(None, 0, None) + (None,) * has_constants,
      out_axes=(None, None),
      devices=list(mesh.devices.flat),
      donate_argnums=0,
    )

    def with_device_axis(state, batch, *others):
      shares = jax.tree.map(
        lambda x: jnp.reshape(x, (mesh.size, -1, *x.shape[1:])), batch
      )
      return step(state, shares, *others)

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
