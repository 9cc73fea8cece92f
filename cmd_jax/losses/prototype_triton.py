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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from cmd_jax.devices import chunking
from cmd_jax.losses.blockwise import add_to_block, cut_block
from cmd_jax.losses.prototype_blocks import Images, Kernel

# Views of a block; products of tensor cores have at least 16 rows.
_VIEWS = (64, 32, 16)
# Prototypes of a tile: two of them and 64 rows are in a core's memory at once,
# of which the smallest GPUs have 99 KiB.
_TILE_BYTES = 32 * 2**10
_MAX_TILE = 128
_MAX_DIM = 256
_SLAB_BYTES = 128 * 2**20
_WARPS = 8


class Shape(NamedTuple):
  """How rows are cut.

  Attributes:
    tokens: N.
    views: g, of a block.
  """

  tokens: int
  views: int


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


def _probs(x, normalisers, columns, bias, scale, at) -> jax.Array:
  """[rows, k] float32 of the prototypes at a slice."""
  return jnp.exp2(_logits(x, columns, bias, scale, at) - normalisers[:, None])


def _logits(x, columns, bias, scale, at) -> jax.Array:
  return _times(x, columns[:, at]) * scale[0] - bias[0, at][None]


def _times(x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.dot(x, y, preferred_element_type=jnp.float32)


def _over_tiles(tile: int, columns: Any, body: Callable, start: Any) -> Any:
  """Calls body(slice of the prototypes, carry) for all tiles."""
  return lax.fori_loop(
    0,
    columns.shape[1] // tile,
    lambda number, carry: body(pl.ds(number * tile, tile), carry),
    start,
  )


def _normalise_rows(tile, rows, columns, bias, scale, out):
  x = rows[...]

  def step(at, carry):
    peak, total = carry
    logits = _logits(x, columns, bias, scale, at)
    after = jnp.maximum(peak, logits.max(1))
    more = jnp.exp2(logits - after[:, None]).sum(1)
    return after, total * jnp.exp2(peak - after) + more

  start = jnp.full(x.shape[:1], -jnp.inf), jnp.zeros(x.shape[:1])
  peak, total = _over_tiles(tile, columns, step, start)
  out[...] = peak + jnp.log2(total)


def normalise(
  shape: Shape, rows: jax.Array, kernel: Kernel, *, interpret: bool = False
) -> jax.Array:
  """See `prototype_kernels.normalise`."""
  blocks, size, dim = rows.shape
  (found,) = _call(
    functools.partial(_normalise_rows, _tile(rows)),
    (blocks, shape.tokens),
    [(rows, _token(shape, dim)), *map(_whole, kernel)],
    [((blocks, size), _token(shape))],
    interpret=interpret,
  )
  return found


def _pool_bags(shape, rows, normalisers, weights, columns, bias, scale, out):
  def step(token, bag):
    at = pl.ds(token * shape.views, shape.views)
    probs = _probs(rows[at], normalisers[at], columns, bias, scale, slice(None))
    return bag + weights[at][:, None] * probs

  start = jnp.zeros(out.shape, jnp.float32)
  out[...] = lax.fori_loop(0, shape.tokens, step, start)


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
    functools.partial(_pool_bags, shape),
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
  logits = _times(images.rows, columns) * scale[0] - bias
  return jnp.exp2(logits - images.lanes[..., :1])


def _compare_slab(
  shape: Shape,
  rows: jax.Array,
  lanes: jax.Array,
  kernel: Kernel,
  images: Images,
  compare_bags: Callable,
  interpret: bool,
) -> tuple[tuple[jax.Array, ...], Callable]:
  """Sums [blocks, g], and their cotangents -> g [blocks, g, k]."""
  bag = _pool(shape, rows, lanes[..., 0], lanes[..., 1], kernel, interpret)
  flat = (-1, bag.shape[-1])
  image = _of_images(images).reshape(flat)
  sums, pull_back = jax.vjp(lambda x: compare_bags(image, x), bag.reshape(flat))

  def of_bags(cotangents):
    given = tuple(x.reshape(-1) for x in cotangents)
    return pull_back(given)[0].reshape(bag.shape)

  return tuple(x.reshape(bag.shape[:2]) for x in sums), of_bags


def _reduce_rows(tile, count, expects, rows, normalisers, *refs):
  columns, bias, scale, *refs = refs
  gradients, values = refs[:count], refs[count : count + expects]
  outs = refs[count + expects :]
  x, n = rows[...], normalisers[...]

  def step(at, carry):
    probs = _probs(x, n, columns, bias, scale, at)
    more = [(probs * g[:, at]).sum(1) for g in gradients]
    more += [_times(probs.astype(x.dtype), v[at]) for v in values]
    return [a + b for a, b in zip(carry, more, strict=True)]

  start = [jnp.zeros(out.shape, jnp.float32) for out in outs]
  for out, total in zip(
    outs, _over_tiles(tile, columns, step, start), strict=True
  ):
    out[...] = total


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
    functools.partial(_reduce_rows, tile, len(gradients), len(given)),
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


def _cut(tree: Any, number: jax.Array, size: int) -> Any:
  """A slab of `Kernel` or `Images`, of whose arrays some have no prototypes."""
  if isinstance(tree, Images):
    return tree._replace(kernel=_cut(tree.kernel, number, size))
  columns, bias = cut_block((tree.columns, tree.bias), number, size)
  return tree._replace(columns=columns, bias=bias)


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
  size = _slab(len(rows) * shape.views, num_prototypes)

  def of_slab(number):
    of_slab = _cut(kernel, number, size)
    sums, of_bags = _compare_slab(
      shape,
      rows,
      lanes,
      of_slab,
      _cut(images, number, size),
      compare_bags,
      interpret,
    )
    gradients = [
      of_bags(jnp.full_like(x, i == index) for i, x in enumerate(sums))
      for index in range(len(sums))
    ]
    of_values = values
    if values is not None:
      of_values = lax.dynamic_slice_in_dim(values, number * size, size)
    return sums, reduce(of_slab, gradients, of_values, interpret)

  sums, found = _over_slabs(of_slab, num_prototypes // size)
  return sums, tuple(found[: len(sums)]), None if values is None else found[-1]


def _over_slabs(fn: Callable, count: int) -> Any:
  """Sum of what a function returns for the numbers of all slabs."""

  def step(total, number):
    return jax.tree.map(jnp.add, total, fn(number)), None

  return lax.scan(step, fn(0), jnp.arange(1, count))[0]


def _student_rows(tile, bags, rows, normalisers, of_n, *refs):
  of_bag, *refs = refs if bags else (None, *refs)
  columns, bias, scale, *gradient, out = refs
  x, n, factor = rows[...], normalisers[...], of_n[...][:, None]

  def step(at, total):
    probs = _probs(x, n, columns, bias, scale, at)
    by = factor
    if bags:
      by = factor + of_bag[...][:, None] * gradient[0][:, at]
    return total + _times((probs * by).astype(x.dtype), columns[:, at].T)

  start = jnp.zeros(out.shape, jnp.float32)
  out[...] = _over_tiles(tile, columns, step, start)


def _over_rows(shape: Shape, blocks: int, body: Callable, start: Any) -> Any:
  """Calls body(block, slice of its rows, carry) for the rows of all tokens."""

  def step(number, carry):
    token = lax.rem(number, shape.tokens)
    at = pl.ds(token * shape.views, shape.views)
    return body(lax.div(number, shape.tokens), at, carry)

  return lax.fori_loop(0, blocks * shape.tokens, step, start)


def _student_columns(shape, bags, rows, normalisers, of_n, *refs):
  of_bag, *refs = refs if bags else (None, *refs)
  columns, bias, scale, *gradient, so_far, out = refs

  def step(block, at, total):
    x, by = rows[block, at], of_n[block, at][:, None]
    if bags:
      by += of_bag[block, at][:, None] * gradient[0][block]
    by *= _probs(x, normalisers[block, at], columns, bias, scale, slice(None))
    return total + _times(x.T, by.astype(x.dtype))

  out[...] = _over_rows(shape, rows.shape[0], step, so_far[...])


def _expected_columns(shape, rows, normalisers, across, *refs):
  *kernel, so_far, out = refs

  def step(block, at, total):
    x = rows[block, at]
    probs = _probs(x, normalisers[block, at], *kernel, slice(None))
    return total + _times(across[block, at].T, probs.astype(x.dtype))

  out[...] = _over_rows(shape, rows.shape[0], step, so_far[...])


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
    functools.partial(_student_columns, shape, gradient is not None),
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
    functools.partial(_student_rows, _tile(rows), bool(bags)),
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
  size = _slab(len(rows) * shape.views, num_prototypes)

  def step(carry, number):
    of_rows, columns = carry
    of_slab = _cut(kernel, number, size)
    sums, of_bags = _compare_slab(
      shape,
      rows,
      lanes,
      of_slab,
      _cut(images, number, size),
      compare_bags,
      interpret,
    )
    gradient = of_bags(images.lanes[..., 1 + i] for i in range(len(sums)))
    of_rows += _pull_back_rows(shape, rows, given, of_slab, gradient, interpret)
    zeros = jnp.zeros_like(of_slab.columns, jnp.float32)
    more = _pull_back_columns(
      shape, rows, given, of_slab, gradient, zeros, interpret
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
    functools.partial(_expected_columns, shape),
    (rows, lanes[..., 0], cotangents.astype(rows.dtype)),
    kernel,
    None,
    so_far,
    interpret=interpret,
    # Rows are read twice in a loop: two stages would not fit.
    stages=1,
  )
