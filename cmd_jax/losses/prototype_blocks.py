"""What the kernels of `prototype_kernels` do with a block of rows and a tile.

Rows come in blocks of whole bags, [blocks, N g, d] for g views of N tokens,
tokens first; what there is of each row is a lane of one array [.., 128].
Logits are in units of log 2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

LANES = 128
LOG2_E = float(np.log2(np.e))
# Views of a block; 16 rows of 16 bits are a register.
_VIEWS = (64, 32, 16)
_ROWS_OF_A_BLOCK = 3328
_ROWS_OF_A_CHUNK = 640
_TILES = (1024, 512, 256, 128)
_TILE_BYTES = 7 * 2**20


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


def normalise_block(shape, rows, columns, bias, scale, out, peak, total):
  """Adds a tile to the sums of a block, and joins them after the last one."""
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


def compare_block(shape, compare, count, expects, *refs):
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


def pull_back_block(shape, compare, *refs):
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


def expected_block(shape, rows, across, lanes, *refs):
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
