"""The attention over prototypes of regions, as Pallas kernels for NVIDIA GPUs.

The functions of `prototype_kernels`, of the same blocks of rows, by Triton.
Programs of a GPU run in any order and share nothing, so that each has outputs
of its own, and there are more kernels:

  normalise    n_i = logsumexp_k z_ik, of the rows of a token
  pool         m_k = sum_i a_i P_ik, of the bags of a block and a tile
  reduce       sum_k P_ik g_k and e_i, of the rows of a token
  to rows      dL/ds_i, of the rows of a token
  to columns   dL/dw_k, of a tile: all rows are passed over

A bag is compared with its image between them, by XLA, for as many prototypes
at a time as `_SLAB_BYTES` allows. Logits are in units of log 2 and are never
written to memory. Compiled for GPUs and checked (benchmarks/README.md), but
not yet measured on one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from cmd_jax.devices import chunking
from cmd_jax.losses import prototype_triton_bodies as bodies
from cmd_jax.losses.blockwise import add_to_block, cut_block
from cmd_jax.losses.prototype_blocks import Images, Kernel
from cmd_jax.losses.prototype_triton_bodies import Shape

# Views of a block; products of tensor cores have at least 16 rows.
_VIEWS = (64, 32, 16)
# Prototypes of a tile: two of them and 64 rows are in a core's memory at once,
# of which the smallest GPUs have 99 KiB.
_TILE_BYTES = 32 * 2**10
_MAX_TILE = 128
_MAX_DIM = 256
_SLAB_BYTES = 128 * 2**20
_WARPS = 8


def make_shape(tokens: int, num_views: int, num_prototypes: int) -> Shape:
  """The blocks for [N, G] rows, with as few that lack as can be."""
  del num_prototypes
  return Shape(tokens, min(_VIEWS, key=lambda x: (-num_views % x, -x)))


def serves(dim: int) -> bool:
  """Whether the kernels take rows of d numbers.

  Triton wants a power of 2, and a core's memory is made for rows of 256.
  """
  return dim <= _MAX_DIM and dim & (dim - 1) == 0


def _tile(rows: jax.Array) -> int:
  """Prototypes of a tile."""
  room = _TILE_BYTES
  if rows.dtype == jnp.float32:
    # Rows of 32 bits leave half of what those of 16 do.
    room //= 2
  return min(_MAX_TILE, room // (rows.shape[-1] * rows.dtype.itemsize))


def _call(
  body: Callable,
  grid: tuple[int, ...],
  arguments: Sequence[tuple[jax.Array, pl.BlockSpec]],
  outputs: Sequence[tuple[tuple[int, ...], pl.BlockSpec]],
  *,
  interpret: bool,
  stages: int = 2,
  **keywords: Any,
) -> list[jax.Array]:
  """`pallas_call` of float32 outputs.

  Args:
    body: of the kernel.
    grid: its programs.
    arguments: arrays and their blocks.
    outputs: shapes and their blocks.
    interpret: whether it is run step by step, on any device.
    stages: of a loop that are in memory at once, if their numbers have 16 bits.
    **keywords: of `pallas_call`.
  """
  if arguments[0][0].dtype == jnp.float32:
    stages = 1
  return pl.pallas_call(
    body,
    grid=grid,
    in_specs=[spec for _, spec in arguments],
    out_specs=[spec for _, spec in outputs],
    out_shape=[jax.ShapeDtypeStruct(x, jnp.float32) for x, _ in outputs],
    compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=stages),
    interpret=interpret,
    **keywords,
  )(*(x for x, _ in arguments))


# Blocks of a grid of (block, token), and of one of (block, tile).


def _whole(x: jax.Array) -> tuple[jax.Array, pl.BlockSpec]:
  zeros = (0,) * x.ndim
  return x, pl.BlockSpec(x.shape, lambda *_: zeros)


def _token(shape: Shape, *rest: int) -> pl.BlockSpec:
  """A token's rows of [blocks, N g, ...]."""
  zeros = (0,) * len(rest)
  return pl.BlockSpec(
    (None, shape.views, *rest), lambda block, token: (block, token, *zeros)
  )


def _block(x: jax.Array) -> tuple[jax.Array, pl.BlockSpec]:
  """A block of [blocks, ...]."""
  zeros = (0,) * (x.ndim - 1)
  return x, pl.BlockSpec((None, *x.shape[1:]), lambda one, _: (one, *zeros))


def normalise(
  shape: Shape, rows: jax.Array, kernel: Kernel, *, interpret: bool = False
) -> jax.Array:
  """See `prototype_kernels.normalise`."""
  blocks, size, dim = rows.shape
  (found,) = _call(
    functools.partial(bodies.normalise_rows, _tile(rows)),
    (blocks, shape.tokens),
    [(rows, _token(shape, dim)), *map(_whole, kernel)],
    [((blocks, size), _token(shape))],
    interpret=interpret,
  )
  return found


def _pool(
  shape: Shape,
  rows: jax.Array,
  normalisers: jax.Array,
  weights: jax.Array,
  kernel: Kernel,
  interpret: bool,
) -> jax.Array:
  """Bags' distributions over a slab, [blocks, g, k]."""
  blocks, _, dim = rows.shape
  tile, num_prototypes = _tile(rows), kernel.columns.shape[1]
  (found,) = _call(
    functools.partial(bodies.pool_bags, shape),
    (blocks, num_prototypes // tile),
    [
      *map(_block, (rows, normalisers, weights)),
      (kernel.columns, pl.BlockSpec((dim, tile), lambda _, one: (0, one))),
      (kernel.bias, pl.BlockSpec((1, tile), lambda _, one: (0, one))),
      _whole(kernel.scale),
    ],
    [
      (
        (blocks, shape.views, num_prototypes),
        pl.BlockSpec(
          (None, shape.views, tile), lambda block, one: (block, 0, one)
        ),
      )
    ],
    interpret=interpret,
  )
  return found


def _of_images(images: Images) -> jax.Array:
  """Probabilities of the blocks' images, [blocks, g, k]."""
  columns, bias, scale = images.kernel
  logits = bodies.times(images.rows, columns) * scale[0] - bias
  return jnp.exp2(logits - images.lanes[..., :1])


def _cut(kernel: Kernel, number: jax.Array, size: int) -> Kernel:
  """The prototypes of a slab."""
  columns, bias = cut_block((kernel.columns, kernel.bias), number, size)
  return kernel._replace(columns=columns, bias=bias)


def _compare_slab(
  shape: Shape,
  rows: jax.Array,
  lanes: jax.Array,
  kernel: Kernel,
  images: Images,
  compare_bags: Callable,
  interpret: bool,
  size: int,
  number: jax.Array,
) -> tuple[Kernel, tuple[jax.Array, ...], Callable]:
  """The slab, sums [blocks, g], and their cotangents -> g [blocks, g, k]."""
  kernel = _cut(kernel, number, size)
  images = images._replace(kernel=_cut(images.kernel, number, size))
  bag = _pool(shape, rows, lanes[..., 0], lanes[..., 1], kernel, interpret)
  flat = (-1, bag.shape[-1])
  image = _of_images(images).reshape(flat)
  sums, pull_back = jax.vjp(lambda x: compare_bags(image, x), bag.reshape(flat))

  def of_bags(cotangents):
    given = tuple(x.reshape(-1) for x in cotangents)
    return pull_back(given)[0].reshape(bag.shape)

  return kernel, tuple(x.reshape(bag.shape[:2]) for x in sums), of_bags


def _reduce(
  shape: Shape,
  rows: jax.Array,
  normalisers: jax.Array,
  kernel: Kernel,
  gradients: Sequence[jax.Array],
  values: jax.Array | None,
  interpret: bool,
) -> list[jax.Array]:
  """sum_k P_ik g_k [blocks, N g] of each g, then e of values [k, d]."""
  blocks, size, dim = rows.shape
  given = [] if values is None else [values]
  # Tiles of the values need room beside those of the prototypes.
  tile = max(16, _tile(rows) // (1 + len(given)))
  outputs = [((blocks, size), _token(shape)) for _ in gradients]
  outputs += [((blocks, size, dim), _token(shape, dim)) for _ in given]
  return _call(
    functools.partial(bodies.reduce_rows, tile, len(gradients), len(given)),
    (blocks, shape.tokens),
    [
      (rows, _token(shape, dim)),
      (normalisers, _token(shape)),
      *map(_whole, kernel),
      *map(_block, gradients),
      *map(_whole, given),
    ],
    outputs,
    interpret=interpret,
  )


def _slab(rows: int, num_prototypes: int) -> int:
  """Prototypes for which bags are compared at a time."""
  most = _SLAB_BYTES // (4 * rows)
  return _MAX_TILE * chunking.largest_divisor(
    num_prototypes // _MAX_TILE, most // _MAX_TILE
  )


def _slabs(
  shape: Shape,
  rows: jax.Array,
  lanes: jax.Array,
  kernel: Kernel,
  *others,
) -> tuple[int, Callable]:
  """Prototypes of a slab, and its number -> what `_compare_slab` says of it."""
  size = _slab(len(rows) * shape.views, kernel.columns.shape[1])
  return size, functools.partial(
    _compare_slab, shape, rows, lanes, kernel, *others, size
  )


def compare(
  shape: Shape,
  rows: jax.Array,
  lanes: jax.Array,
  kernel: Kernel,
  images: Images | None,
  values: jax.Array | None,
  compare_bags: Callable | None,
  *,
  interpret: bool = False,
) -> tuple[tuple, tuple, jax.Array | None]:
  """See `prototype_kernels.compare`."""
  normalisers, num_prototypes = lanes[..., 0], kernel.columns.shape[1]
  reduce = functools.partial(_reduce, shape, rows, normalisers)
  if compare_bags is None:
    return (), (), reduce(kernel, (), values, interpret)[-1]
  size, compare_slab = _slabs(
    shape, rows, lanes, kernel, images, compare_bags, interpret
  )

  def of_slab(number):
    slab, sums, of_bags = compare_slab(number)
    gradients = [
      of_bags(jnp.full_like(x, i == index) for i, x in enumerate(sums))
      for index in range(len(sums))
    ]
    of_values = values
    if values is not None:
      of_values = lax.dynamic_slice_in_dim(values, number * size, size)
    return sums, reduce(slab, gradients, of_values, interpret)

  sums, found = _over_slabs(of_slab, num_prototypes // size)
  return sums, tuple(found[: len(sums)]), None if values is None else found[-1]


def _over_slabs(fn: Callable, count: int) -> Any:
  """Sum of what a function returns for the numbers of all slabs."""

  def step(total, number):
    return jax.tree.map(jnp.add, total, fn(number)), None

  return lax.scan(step, fn(0), jnp.arange(1, count))[0]


def _add_to_columns(
  body: Callable,
  given: Sequence[jax.Array],
  kernel: Kernel,
  gradient: jax.Array | None,
  so_far: jax.Array,
  **keywords: Any,
) -> jax.Array:
  """[d, k]: a sum over all rows, added to what there is.

  Args:
    body: of the kernel.
    given: what there is of rows, [blocks, N g, ...] each, these first.
    kernel: of the prototypes.
    gradient: of bags, [blocks, g, k]; None without.
    so_far: [d, k].
    **keywords: of `_call`.
  """
  dim, num_prototypes = kernel.columns.shape
  tile = _tile(given[0])
  columns = pl.BlockSpec((dim, tile), lambda one: (0, one))
  bags = [] if gradient is None else [gradient]
  arguments = [
    *map(_whole, given),
    (kernel.columns, columns),
    (kernel.bias, pl.BlockSpec((1, tile), lambda one: (0, one))),
    _whole(kernel.scale),
    *(
      (x, pl.BlockSpec((*x.shape[:2], tile), lambda one: (0, 0, one)))
      for x in bags
    ),
    (so_far, columns),
  ]
  (found,) = _call(
    body,
    (num_prototypes // tile,),
    arguments,
    [((dim, num_prototypes), columns)],
    input_output_aliases={len(arguments) - 1: 0},
    **keywords,
  )
  return found


def _pull_back_columns(
  shape: Shape,
  rows: jax.Array,
  lanes: Sequence[jax.Array],
  kernel: Kernel,
  gradient: jax.Array | None,
  so_far: jax.Array,
  interpret: bool,
) -> jax.Array:
  """[d, k]: adds sum_i P_ik (A_i + a_i g_k) s_i; see `_pull_back_rows`."""
  return _add_to_columns(
    functools.partial(bodies.student_columns, shape, gradient is not None),
    (rows, *lanes),
    kernel,
    gradient,
    so_far,
    interpret=interpret,
  )


def _pull_back_rows(
  shape: Shape,
  rows: jax.Array,
  lanes: Sequence[jax.Array],
  kernel: Kernel,
  gradient: jax.Array | None,
  interpret: bool,
) -> jax.Array:
  """[blocks, N g, d]: sum_k P_ik (A_i + a_i g_k) w_k.

  Args:
    shape: how they are cut.
    rows: [blocks, N g, d].
    lanes: n, A, and a if there are bags; [blocks, N g] of each.
    kernel: of the prototypes.
    gradient: g, [blocks, g, k]; None without bags.
    interpret: see `_call`.
  """
  bags = [] if gradient is None else [gradient]
  spec = _token(shape, rows.shape[-1])
  (found,) = _call(
    functools.partial(bodies.student_rows, _tile(rows), bool(bags)),
    (len(rows), shape.tokens),
    [
      (rows, spec),
      *((x, _token(shape)) for x in lanes),
      *map(_whole, kernel),
      *map(_block, bags),
    ],
    [(rows.shape, spec)],
    interpret=interpret,
  )
  return found


def pull_back(
  shape: Shape,
  rows: jax.Array,
  lanes: jax.Array,
  kernel: Kernel,
  images: Images | None,
  so_far: jax.Array,
  compare_bags: Callable | None,
  *,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """See `prototype_kernels.pull_back`."""
  normalisers, _, of_n, of_bag = (lanes[..., i] for i in range(4))
  num_prototypes = kernel.columns.shape[1]
  if compare_bags is None:
    given = (normalisers, of_n)
    return (
      _pull_back_rows(shape, rows, given, kernel, None, interpret),
      _pull_back_columns(shape, rows, given, kernel, None, so_far, interpret),
    )
  given = (normalisers, of_n, of_bag)
  size, compare_slab = _slabs(
    shape, rows, lanes, kernel, images, compare_bags, interpret
  )

  def step(carry, number):
    of_rows, columns = carry
    slab, sums, of_bags = compare_slab(number)
    gradient = of_bags(images.lanes[..., 1 + i] for i in range(len(sums)))
    of_rows += _pull_back_rows(shape, rows, given, slab, gradient, interpret)
    zeros = jnp.zeros_like(slab.columns, jnp.float32)
    more = _pull_back_columns(
      shape, rows, given, slab, gradient, zeros, interpret
    )
    return (of_rows, add_to_block(columns, more, number)), None

  start = jnp.zeros(rows.shape, jnp.float32), so_far
  return lax.scan(step, start, jnp.arange(num_prototypes // size))[0]


def pull_back_expected(
  shape: Shape,
  rows: jax.Array,
  cotangents: jax.Array,
  lanes: jax.Array,
  kernel: Kernel,
  so_far: jax.Array,
  *,
  interpret: bool = False,
) -> jax.Array:
  """See `prototype_kernels.pull_back_expected`."""
  return _add_to_columns(
    functools.partial(bodies.expected_columns, shape),
    (rows, lanes[..., 0], cotangents.astype(rows.dtype)),
    kernel,
    None,
    so_far,
    interpret=interpret,
    # Rows are read twice in a loop: two stages would not fit.
    stages=1,
  )
