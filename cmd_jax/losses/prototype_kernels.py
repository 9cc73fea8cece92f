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

What each of them does is in `prototype_blocks`. By a count of the instructions
that are compiled for a v5e, they keep the matrix units busy for 70 to 99 % of
the time (benchmarks/README.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cmd_jax.losses import prototype_blocks as bodies
from cmd_jax.losses.prototype_blocks import LANES, Images, Kernel, Shape

# Of a chip's 128 MiB of fast memory.
_VMEM_BYTES = 100 * 2**20


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


def _back_specs(kernel: Kernel, shape: Shape) -> list:
  """Of rows, of what they are multiplied with across, and of their lanes."""
  dim, size = len(kernel.columns), shape.tokens * shape.views
  spec = functools.partial(_block, tiles_first=True)
  return [
    spec(size, dim),
    spec(dim, size),
    spec(size, LANES),
    *_kernel_specs(kernel, shape, True),
  ]


def _flat(images: Images | None) -> list[jax.Array]:
  return jax.tree.leaves(images)


def _call(
  body: Callable,
  arguments: Sequence[jax.Array],
  kernel: Kernel,
  products: int,
  **keywords: Any,
) -> Any:
  """`pallas_call` with what it costs.

  Args:
    body: of the kernel.
    arguments: of the call, the rows first.
    kernel: prototypes of the rows.
    products: matrix products of all rows with all prototypes.
    **keywords: of `pallas_call`.
  """
  dim, num_prototypes = kernel.columns.shape
  rows = arguments[0].size // dim
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
    functools.partial(bodies.normalise_block, shape),
    (rows, *kernel),
    kernel,
    1,
    grid=(blocks, num_prototypes // shape.tile),
    in_specs=[spec(size, dim), *_kernel_specs(kernel, shape, False)],
    out_specs=spec(size, LANES),
    out_shape=_like(blocks, size, LANES),
    scratch_shapes=[_scratch(shape, LANES), _scratch(shape, LANES)],
    interpret=interpret,
  )
  return found[..., 0]


def _count_sums(shape: Shape, compare_bags: Callable | None) -> int:
  if compare_bags is None:
    return 0
  bag = _like(shape.views, shape.tile)
  return len(jax.eval_shape(compare_bags, bag, bag))


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
  count = _count_sums(shape, compare_bags)
  spec = functools.partial(_block, tiles_first=False)
  widths = [(shape.views, LANES)] * count + [(size, LANES)] * count
  given = () if values is None else (values,)
  widths += [(size, dim) for _ in given]
  tile = _tile(shape.tile, dim, axis=0, tiles_first=False)
  found = _call(
    functools.partial(
      bodies.compare_block, shape, compare_bags, count, values is not None
    ),
    (rows, lanes, *kernel, *_flat(images), *given),
    kernel,
    1 + len(given),
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
    functools.partial(bodies.pull_back_block, shape, compare_bags),
    arguments,
    kernel,
    3,
    grid=(num_prototypes // shape.tile, blocks),
    in_specs=[
      *_back_specs(kernel, shape),
      *_image_specs(images, shape, True),
      _tile(shape.tile, dim, axis=0, tiles_first=True),
      columns,
    ],
    # All rows' gradients stay on the chip, as each tile adds to them: 64 MiB
    # for the rows whose tiles `blockwise.budget_for` allows.
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
  columns = _tile(dim, shape.tile, axis=1, tiles_first=True)
  across = cotangents.astype(rows.dtype).swapaxes(1, 2)
  arguments = (rows, across, lanes, *kernel, so_far)
  return _call(
    functools.partial(bodies.expected_block, shape),
    arguments,
    kernel,
    2,
    grid=(num_prototypes // shape.tile, blocks),
    in_specs=[*_back_specs(kernel, shape), columns],
    out_specs=columns,
    out_shape=_like(dim, num_prototypes),
    scratch_shapes=[_scratch(shape, shape.tile, rows.dtype)],
    input_output_aliases={len(arguments) - 1: 0},
    interpret=interpret,
  )
