"""What the programs of `prototype_triton` do with a block of rows and a tile.

Each is one of the kernels that are listed there. Rows come in blocks of whole
bags, [blocks, N g, d] for g views of N tokens, tokens first. Logits are in
units of log 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl


class Shape(NamedTuple):
  """How rows are cut.

  Attributes:
    tokens: N.
    views: g, of a block.
  """

  tokens: int
  views: int


def times(x: jax.Array, y: jax.Array) -> jax.Array:
  """Products in float32."""
  return jnp.dot(x, y, preferred_element_type=jnp.float32)


def _logits(x, columns, bias, scale, at) -> jax.Array:
  return times(x, columns[:, at]) * scale[0] - bias[0, at][None]


def _probs(x, normalisers, columns, bias, scale, at) -> jax.Array:
  """[rows, k] float32 of the prototypes at a slice."""
  return jnp.exp2(_logits(x, columns, bias, scale, at) - normalisers[:, None])


def _over_tiles(tile: int, columns: Any, body: Callable, start: Any) -> Any:
  """Calls body(slice of the prototypes, carry) for all tiles."""
  return lax.fori_loop(
    0,
    columns.shape[1] // tile,
    lambda number, carry: body(pl.ds(number * tile, tile), carry),
    start,
  )


def _over_rows(shape: Shape, blocks: int, body: Callable, start: Any) -> Any:
  """Calls body(block, slice of its rows, carry) for the rows of all tokens."""

  def step(number, carry):
    token = lax.rem(number, shape.tokens)
    at = pl.ds(token * shape.views, shape.views)
    return body(lax.div(number, shape.tokens), at, carry)

  return lax.fori_loop(0, blocks * shape.tokens, step, start)


def normalise_rows(tile, rows, columns, bias, scale, out):
  """The normalisers of a token's rows, over all tiles."""
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


def pool_bags(shape, rows, normalisers, weights, columns, bias, scale, out):
  """The distributions of a block's bags over a tile, over all tokens."""

  def step(token, bag):
    at = pl.ds(token * shape.views, shape.views)
    probs = _probs(rows[at], normalisers[at], columns, bias, scale, slice(None))
    return bag + weights[at][:, None] * probs

  start = jnp.zeros(out.shape, jnp.float32)
  out[...] = lax.fori_loop(0, shape.tokens, step, start)


def reduce_rows(tile, count, expects, rows, normalisers, *refs):
  """Moments of `count` gradients, and the expected, of a token's rows."""
  columns, bias, scale, *refs = refs
  gradients, values = refs[:count], refs[count : count + expects]
  outs = refs[count + expects :]
  x, n = rows[...], normalisers[...]

  def step(at, carry):
    probs = _probs(x, n, columns, bias, scale, at)
    more = [(probs * g[:, at]).sum(1) for g in gradients]
    more += [times(probs.astype(x.dtype), v[at]) for v in values]
    return [a + b for a, b in zip(carry, more, strict=True)]

  start = [jnp.zeros(out.shape, jnp.float32) for out in outs]
  for out, total in zip(
    outs, _over_tiles(tile, columns, step, start), strict=True
  ):
    out[...] = total


def student_rows(tile, bags, rows, normalisers, of_n, *refs):
  """The gradient of a token's rows, over all tiles."""
  of_bag, *refs = refs if bags else (None, *refs)
  columns, bias, scale, *gradient, out = refs
  x, n, factor = rows[...], normalisers[...], of_n[...][:, None]

  def step(at, total):
    probs = _probs(x, n, columns, bias, scale, at)
    by = factor
    if bags:
      by = factor + of_bag[...][:, None] * gradient[0][:, at]
    return total + times((probs * by).astype(x.dtype), columns[:, at].T)

  start = jnp.zeros(out.shape, jnp.float32)
  out[...] = _over_tiles(tile, columns, step, start)


def student_columns(shape, bags, rows, normalisers, of_n, *refs):
  """Adds the share of all the student's rows to the gradient of a tile."""
  of_bag, *refs = refs if bags else (None, *refs)
  columns, bias, scale, *gradient, so_far, out = refs

  def step(block, at, total):
    x, by = rows[block, at], of_n[block, at][:, None]
    if bags:
      by += of_bag[block, at][:, None] * gradient[0][block]
    by *= _probs(x, normalisers[block, at], columns, bias, scale, slice(None))
    return total + times(x.T, by.astype(x.dtype))

  out[...] = _over_rows(shape, rows.shape[0], step, so_far[...])


def expected_columns(shape, rows, normalisers, across, *refs):
  """Adds the share of all expected prototypes to the gradient of a tile."""
  *kernel, so_far, out = refs

  def step(block, at, total):
    x = rows[block, at]
    probs = _probs(x, normalisers[block, at], *kernel, slice(None))
    return total + times(across[block, at].T, probs.astype(x.dtype))

  out[...] = _over_rows(shape, rows.shape[0], step, so_far[...])
