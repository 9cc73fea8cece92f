"""The attention over prototypes of regions, as Pallas kernels for TPUs.

Each kernel multiplies a block of rows with a tile of prototypes and uses the
logits at once, so that they are never written to memory:

  normalisers    n_i = logsumexp_k z_ik
  compare        bags with their images, sum_k P_ik g_k, and e_j
  pull_back      dL/ds_i and dL/dw_k of the student, bags included
  pull_back_expected   dL/dw_k by e_j

with the names of `prototype_attention`, whose tiles in XLA are the reference.
All passes know the normalisers but the first, which keeps a running maximum for
each lane (flash attention's, Dao et al. 2022, for 128 parts of the prototypes)
and joins the lanes at the end. Logits are in units of log 2.

Rows come in blocks of whole bags, [blocks, N g, d] for g views of N tokens,
tokens first; what there is of each row is a lane of one array [.., 128].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
LOG2_E = float(np.log2(np.e))
# Views of a block; 16 rows of 16 bits are a register.
_VIEWS = (64, 32, 16)
_ROWS_OF_A_BLOCK = 3328
_ROWS_OF_A_CHUNK = 640
_TILES = (1024, 512, 256, 128)
_TILE_BYTES = 7 * 2**20
# Of a chip's 128 MiB of fast memory.
_VMEM_BYTES = 100 * 2**20


class Kernel(NamedTuple):
  """Prototypes of a network and a level, and what makes them logits.

  Attributes:
    columns: [d, K], in the type of the rows.
    bias: [1, K] float32, to be taken from the scaled products.
    scale: [1] float32, of the products; log2(e) / tau.
  """

  columns: jax.Array
  bias: jax.Array
  scale: jax.Array


class Images(NamedTuple):
  """The images' side of bags.

  Attributes:
    rows: [blocks, g, d].
    lanes: [blocks, g, 128]: normalisers, then cotangents of each sum.
    kernel: their prototypes.
  """

  rows: jax.Array
  lanes: jax.Array
  kernel: Kernel


class Shape(NamedTuple):
  """How rows and prototypes are cut.

  Attributes:
    tokens: N.
    views: g, of a block.
    tile: prototypes of a tile.
    chunk: tokens that are multiplied at once.
  """

  tokens: int
  views: int
  tile: int
  chunk: int


def make_shape(tokens: int, num_views: int, num_prototypes: int) -> Shape:
  """The blocks for [N, G] rows and K prototypes, a multiple of 128."""
  fitting = [x for x in _VIEWS if tokens * x <= _ROWS_OF_A_BLOCK]
  exact = [x for x in fitting if num_views % x == 0]
  views = (exact or fitting[-1:] or _VIEWS[-1:])[0]
  tile = next(
    x
    for x in _TILES
    if num_prototypes % x == 0
    and (4 * tokens * views * x <= _TILE_BYTES or x == LANES)
  )
  most = max(1, _ROWS_OF_A_CHUNK // views)
  chunk = max(x for x in range(1, tokens + 1) if not tokens % x and x <= most)
  return Shape(tokens, views, tile, chunk)


def to_blocks(x: jax.Array, views: int) -> jax.Array:
  """[N, G, ...] -> [blocks, N g, ...]; views that lack are zeros."""
  tokens, given, *rest = x.shape
  lacking = -given % views
  x = jnp.pad(x, ((0, 0), (0, lacking), *((0, 0) for _ in rest)))
  x = x.reshape(tokens, -1, views, *rest).swapaxes(0, 1)
  return x.reshape(len(x), tokens * views, *rest)


def from_blocks(x: jax.Array, tokens: int, num_views: int) -> jax.Array:
  """Undoes `to_blocks`."""
  x = x.reshape(len(x), tokens, -1, *x.shape[2:]).swapaxes(0, 1)
  return x.reshape(tokens, -1, *x.shape[3:])[:, :num_views]


def to_lanes(*columns: jax.Array) -> jax.Array:
  """[...] each -> [..., 128] float32 with one in each of the first lanes."""
  x = jnp.stack(columns, axis=-1).astype(jnp.float32)
  lacking = LANES - x.shape[-1]
  return jnp.pad(x, (*((0, 0) for _ in x.shape[:-1]), (0, lacking)))


def _times(x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.dot(x, y, preferred_element_type=jnp.float32)


def _logits(x: jax.Array, columns, bias, scale) -> jax.Array:
  return _times(x, columns[...]) * scale[0] - bias[...]


def _in_lanes(x: jax.Array) -> list[jax.Array]:
  return [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)]


def _over_chunks(shape: Shape, body: Callable, carry: Any) -> Any:
  """Calls body(rows, carry) for slices of a block's rows."""
  size = shape.chunk * shape.views
  count = shape.tokens // shape.chunk

  def step(number, carry):
    return body(pl.ds(pl.multiple_of(number * size, size), size), carry)

  return lax.fori_loop(0, count, step, carry)


def _normalise_body(shape, rows, columns, bias, scale, out, peak, total):
  number = pl.program_id(1)

  @pl.when(number == 0)
  def _():
    peak[...] = jnp.full_like(peak, -jnp.inf)
    total[...] = jnp.zeros_like(total)

  def chunk(at, _):
    logits = _in_lanes(_logits(rows[at], columns, bias, scale))
    before = peak[at]
    after = functools.reduce(jnp.maximum, logits, before)
    more = sum(jnp.exp2(x - after) for x in logits)
    total[at] = total[at] * jnp.exp2(before - after) + more
    peak[at] = after

  _over_chunks(shape, chunk, None)

  @pl.when(number == pl.num_programs(1) - 1)
  def _():
    highest = peak[...].max(1, keepdims=True)
    summed = total[...] * jnp.exp2(peak[...] - highest)
    whole = highest + jnp.log2(summed.sum(1, keepdims=True))
    out[...] = jnp.broadcast_to(whole, out.shape)


def _bag_of(shape, rows, lanes, kernel, kept, pools) -> jax.Array | None:
  """Keeps the probabilities of a block, and pools them, [g, k]."""
  columns, bias, scale = kernel

  def chunk(at, bag):
    logits = _logits(rows[at], columns, bias, scale)
    probs = jnp.exp2(logits - lanes[at, 0:1])
    kept[at] = probs
    if bag is None:
      return None
    weighted = probs * lanes[at, 1:2]
    return bag + weighted.reshape(-1, shape.views, shape.tile).sum(0)

  start = jnp.zeros((shape.views, shape.tile), jnp.float32) if pools else None
  return _over_chunks(shape, chunk, start)


def _of_images(rows, lanes, columns, bias, scale) -> jax.Array:
  """Probabilities of a block's images, [g, k]."""
  logits = _logits(rows[...], columns, bias, scale)
  return jnp.exp2(logits - lanes[:, 0:1])


def _for_tokens(x: jax.Array, tokens: int) -> jax.Array:
  """[g, k] -> [tokens g, k]."""
  return jnp.broadcast_to(x, (tokens, *x.shape)).reshape(-1, x.shape[1])


def _compare_body(shape, compare, count, expects, *refs):
  """Adds a tile to sums, moments and expected prototypes of a block."""
  rows, lanes, *kernel = refs[:5]
  images = refs[5 : 10 if compare else 5]
  values = refs[5 + len(images)] if expects else None
  *outs, kept = refs[5 + len(images) + expects :]

  @pl.when(pl.program_id(1) == 0)
  def _():
    for out in outs:
      out[...] = jnp.zeros_like(out)

  bag = _bag_of(shape, rows, lanes, kernel, kept, compare is not None)
  gradients = []
  if compare is not None:
    image = _of_images(*images)
    sums, pull_back = jax.vjp(lambda x: compare(image, x), bag)
    for index in range(count):
      unit = tuple(jnp.full_like(x, i == index) for i, x in enumerate(sums))
      gradients += pull_back(unit)
      outs[index][...] += jnp.broadcast_to(
        sums[index][:, None], outs[index].shape
      )

  def chunk(at, _):
    probs = kept[at]
    for index, gradient in enumerate(gradients):
      product = probs * _for_tokens(gradient, shape.chunk)
      outs[count + index][at] += sum(_in_lanes(product))
    if expects:
      outs[-1][at] += _times(probs.astype(rows.dtype), values[...])

  _over_chunks(shape, chunk, None)


def _pull_back_body(shape, compare, *refs):
  """Adds a block's and a tile's share to both gradients."""
  rows, across, lanes, *kernel = refs[:6]
  images = refs[6 : 11 if compare else 6]
  back, so_far, of_rows, of_columns, kept, scaled = refs[6 + len(images) :]
  tile, block = pl.program_id(0), pl.program_id(1)

  @pl.when(block == 0)
  def _():
    of_columns[...] = so_far[...]

  @pl.when(tile == 0)
  def _():
    of_rows[block] = jnp.zeros(of_rows.shape[1:], of_rows.dtype)

  bag = _bag_of(shape, rows, lanes, kernel, kept, compare is not None)
  gradient = None
  if compare is not None:
    image = _of_images(*images)
    sums, vjp = jax.vjp(lambda x: compare(image, x), bag)
    cotangents = tuple(
      images[1][:, 1 + i : 2 + i].reshape(x.shape) for i, x in enumerate(sums)
    )
    (gradient,) = vjp(cotangents)

  def chunk(at, _):
    factor = lanes[at, 2:3]
    if gradient is not None:
      factor += lanes[at, 3:4] * _for_tokens(gradient, shape.chunk)
    scaled[at] = (kept[at] * factor).astype(scaled.dtype)
    of_rows[block, at] += _times(scaled[at], back[...])

  _over_chunks(shape, chunk, None)
  of_columns[...] += _times(across[...], scaled[...])


def _expected_body(shape, rows, across, lanes, *refs):
  """Adds a block's share to the gradient of a tile by e_j."""
  columns, bias, scale, so_far, of_columns, kept = refs

  @pl.when(pl.program_id(1) == 0)
  def _():
    of_columns[...] = so_far[...]

  def chunk(at, _):
    logits = _logits(rows[at], columns, bias, scale)
    kept[at] = jnp.exp2(logits - lanes[at, 0:1]).astype(kept.dtype)

  _over_chunks(shape, chunk, None)
  of_columns[...] += _times(across[...], kept[...])


def _block(*shape: int, tiles_first: bool) -> pl.BlockSpec:
  """[blocks, ...] by blocks."""
  zeros = (0,) * len(shape)

  def index(one, two):
    return (two if tiles_first else one, *zeros)

  return pl.BlockSpec((None, *shape), index)


def _tile(*shape: int, axis: int, tiles_first: bool) -> pl.BlockSpec:
  """Prototypes by tiles, along one of two axes."""

  def index(one, two):
    number = one if tiles_first else two
    return (0, number) if axis else (number, 0)

  return pl.BlockSpec(shape, index)


def _kernel_specs(kernel: Kernel, shape: Shape, tiles_first: bool) -> list:
  dim = len(kernel.columns)
  tile = functools.partial(_tile, axis=1, tiles_first=tiles_first)
  return [
    tile(dim, shape.tile),
    tile(1, shape.tile),
    pl.BlockSpec(memory_space=pltpu.SMEM),
  ]


def _image_specs(images: Images | None, shape, tiles_first: bool) -> list:
  if images is None:
    return []
  dim = images.rows.shape[-1]
  return [
    _block(shape.views, dim, tiles_first=tiles_first),
    _block(shape.views, LANES, tiles_first=tiles_first),
    *_kernel_specs(images.kernel, shape, tiles_first),
  ]


def _flat(images: Images | None) -> list[jax.Array]:
  return jax.tree.leaves(images)


def _call(
  body: Callable,
  arguments: Sequence[jax.Array],
  products: int,
  *,
  size: tuple[int, int, int],
  **keywords: Any,
) -> Any:
  """`pallas_call` with what it costs.

  Args:
    body: of the kernel.
    arguments: of the call.
    products: matrix products of all rows with all prototypes.
    size: rows, d and K.
    **keywords: of `pallas_call`.
  """
  rows, dim, num_prototypes = size
  out = jax.tree.leaves(keywords['out_shape'])
  return pl.pallas_call(
    body,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('arbitrary', 'arbitrary'),
      vmem_limit_bytes=_VMEM_BYTES,
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * products * rows * dim * num_prototypes,
      transcendentals=rows * num_prototypes,
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arguments, *out)),
    ),
    **keywords,
  )(*arguments)


def _like(*shape: int, dtype: jnp.dtype = jnp.float32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def _scratch(shape: Shape, columns: int, dtype: jnp.dtype = jnp.float32):
  return pltpu.VMEM((shape.tokens * shape.views, columns), dtype)


def normalise(
  shape: Shape, rows: jax.Array, kernel: Kernel, *, interpret: bool = False
) -> jax.Array:
  """n of each row in units of log 2, [blocks, N g].

  Args:
    shape: how they are cut.
    rows: [blocks, N g, d].
    kernel: their prototypes.
    interpret: whether it is run step by step, on any device.
  """
  blocks, size, dim = rows.shape
  num_prototypes = kernel.columns.shape[1]
  spec = functools.partial(_block, tiles_first=False)
  found = _call(
    functools.partial(_normalise_body, shape),
    (rows, *kernel),
    1,
    size=(blocks * size, dim, num_prototypes),
    grid=(blocks, num_prototypes // shape.tile),
    in_specs=[spec(size, dim), *_kernel_specs(kernel, shape, False)],
    out_specs=spec(size, LANES),
    out_shape=_like(blocks, size, LANES),
    scratch_shapes=[_scratch(shape, LANES), _scratch(shape, LANES)],
    interpret=interpret,
  )
  return found[..., 0]


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
  """What is summed over the prototypes once the normalisers are known.

  Args:
    shape: how they are cut.
    rows: [blocks, N g, d].
    lanes: [blocks, N g, 128]: n and a.
    kernel: their prototypes.
    images: of bags; None without bags.
    values: [K, d], whose expectation is wanted; None if it is not.
    compare_bags: `prototype_tiles.Bag.compare`; None without bags.
    interpret: see `normalise`.

  Returns:
    The sums, [blocks, g] each; sum_k P_ik g_k, [blocks, N g] of each; and the
    expected, [blocks, N g, d] or None.
  """
  blocks, size, dim = rows.shape
  num_prototypes = kernel.columns.shape[1]
  count = 0
  if compare_bags is not None:
    bag = _like(shape.views, shape.tile)
    count = len(jax.eval_shape(compare_bags, bag, bag))
  spec = functools.partial(_block, tiles_first=False)
  widths = [(shape.views, LANES)] * count + [(size, LANES)] * count
  given = () if values is None else (values,)
  widths += [(size, dim) for _ in given]
  tile = _tile(shape.tile, dim, axis=0, tiles_first=False)
  found = _call(
    functools.partial(
      _compare_body, shape, compare_bags, count, values is not None
    ),
    (rows, lanes, *kernel, *_flat(images), *given),
    1 + len(given),
    size=(blocks * size, dim, num_prototypes),
    grid=(blocks, num_prototypes // shape.tile),
    in_specs=[
      spec(size, dim),
      spec(size, LANES),
      *_kernel_specs(kernel, shape, False),
      *_image_specs(images, shape, False),
      *(tile for _ in given),
    ],
    out_specs=[spec(*x) for x in widths],
    out_shape=[_like(blocks, *x) for x in widths],
    scratch_shapes=[_scratch(shape, shape.tile)],
    interpret=interpret,
  )
  return (
    tuple(x[..., 0] for x in found[:count]),
    tuple(x.sum(-1) for x in found[count : 2 * count]),
    found[-1] if given else None,
  )


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
  """Gradients of the student's rows and prototypes.

  Args:
    shape: how they are cut.
    rows: [blocks, N g, d].
    lanes: [blocks, N g, 128]: n, a, (A_i - a_i sum_k P_ik g_k) / tau, a / tau.
    kernel: their prototypes.
    images: of bags, with the cotangents of their sums; None without bags.
    so_far: [d, K] float32 that the prototypes' gradient is added to.
    compare_bags: `prototype_tiles.Bag.compare`; None without bags.
    interpret: see `normalise`.

  Returns:
    [blocks, N g, d] and [d, K], float32.
  """
  blocks, size, dim = rows.shape
  num_prototypes = kernel.columns.shape[1]
  spec = functools.partial(_block, tiles_first=True)
  columns = _tile(dim, shape.tile, axis=1, tiles_first=True)
  arguments = (
    rows,
    rows.swapaxes(1, 2),
    lanes,
    *kernel,
    *_flat(images),
    kernel.columns.T,
    so_far,
  )
  return _call(
    functools.partial(_pull_back_body, shape, compare_bags),
    arguments,
    3,
    size=(blocks * size, dim, num_prototypes),
    grid=(num_prototypes // shape.tile, blocks),
    in_specs=[
      spec(size, dim),
      spec(dim, size),
      spec(size, LANES),
      *_kernel_specs(kernel, shape, True),
      *_image_specs(images, shape, True),
      _tile(shape.tile, dim, axis=0, tiles_first=True),
      columns,
    ],
    # All rows' gradients stay on the chip: each tile adds to them.
    out_specs=[
      pl.BlockSpec((blocks, size, dim), lambda *_: (0, 0, 0)),
      columns,
    ],
    out_shape=[_like(blocks, size, dim), _like(dim, num_prototypes)],
    scratch_shapes=[
      _scratch(shape, shape.tile),
      _scratch(shape, shape.tile, rows.dtype),
    ],
    input_output_aliases={len(arguments) - 1: 1},
    interpret=interpret,
  )


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
  """[d, K]: adds the gradient of the prototypes whose mean is expected.

  Args:
    shape: how they are cut.
    rows: the teacher's, [blocks, N g, d].
    cotangents: of the expected, [blocks, N g, d].
    lanes: [blocks, N g, 128]: n.
    kernel: the teacher's.
    so_far: see `pull_back`.
    interpret: see `normalise`.
  """
  blocks, size, dim = rows.shape
  num_prototypes = kernel.columns.shape[1]
  spec = functools.partial(_block, tiles_first=True)
  columns = _tile(dim, shape.tile, axis=1, tiles_first=True)
  across = cotangents.astype(rows.dtype).swapaxes(1, 2)
  arguments = (rows, across, lanes, *kernel, so_far)
  return _call(
    functools.partial(_expected_body, shape),
    arguments,
    2,
    size=(blocks * size, dim, num_prototypes),
    grid=(num_prototypes // shape.tile, blocks),
    in_specs=[
      spec(size, dim),
      spec(dim, size),
      spec(size, LANES),
      *_kernel_specs(kernel, shape, True),
      columns,
    ],
    out_specs=columns,
    out_shape=_like(dim, num_prototypes),
    scratch_shapes=[_scratch(shape, shape.tile, rows.dtype)],
    input_output_aliases={len(arguments) - 1: 0},
    interpret=interpret,
  )
