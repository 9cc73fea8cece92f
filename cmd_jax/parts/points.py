"""Points of an image as the feature maps that they are resized from.

A hypercolumn repeats every value of a coarse map many times. Products with
centres and sums over clusters are linear, so they are taken on the maps and
resized, or resized and taken on the maps: the same numbers as from the points,
which are never formed, for a tenth of the arithmetic and memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def resize_matrix(old: int, new: int) -> np.ndarray:
  """Weights [new, old] of torch's bilinear interpolation, no antialiasing.

  Source coordinate (i + 0.5) old / new - 0.5, clamped (align_corners false).
  """
  centre = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
  first = np.minimum(np.floor(centre).astype(int), max(old - 2, 0))
  matrix = np.zeros((new, old))
  np.add.at(matrix, (np.arange(new), first), 1 - (centre - first))
  after = np.minimum(first + 1, old - 1)
  np.add.at(matrix, (np.arange(new), after), centre - first)
  return matrix.astype(np.float32)


def einsum(subscripts: str, *operands: jax.Array) -> jax.Array:
  """`jnp.einsum` in full float32: distances are differences of products."""
  return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)


class Layer(NamedTuple):
  """Some channels of the points: a map, resized to the grid of the points.

  Attributes:
    map: [h, w, C].
    rows: [H, h] weights, None for a map that has the grid's size.
    columns: [W, w] weights, None likewise.
  """

  map: jax.Array
  rows: np.ndarray | None
  columns: np.ndarray | None

  def products(self, centres: jax.Array) -> jax.Array:
    """[k, C] -> [n, k], inner products with the points."""
    height, width, channels = self.map.shape
    flat = self.map.reshape(-1, channels)
    y = einsum('nc,kc->nk', flat, centres)
    if self.rows is None:
      return y
    y = einsum('yh,hf->yf', self.rows, y.reshape(height, -1))
    y = y.reshape(len(y), width, -1)
    y = einsum('xw,ywk->yxk', self.columns, y)
    return y.reshape(-1, len(centres))

  def sums(self, weights: jax.Array) -> jax.Array:
    """[n, k] -> [k, C], weighted sums of the points."""
    height, width, channels = self.map.shape
    if self.rows is not None:
      w = weights.reshape(len(self.rows), len(self.columns), -1)
      w = einsum('xw,yxk->ywk', self.columns, w)
      w = einsum('yh,yf->hf', self.rows, w.reshape(len(self.rows), -1))
      weights = w.reshape(height * width, -1)
    flat = self.map.reshape(-1, channels)
    return einsum('nk,nc->kc', weights, flat)

  def take(self, index: jax.Array) -> jax.Array:
    """[m] -> [m, C], some of the points."""
    flat = self.map.reshape(-1, self.map.shape[-1])
    if self.rows is None:
      return flat[index]
    y, x = jnp.divmod(index, len(self.columns))
    rows, columns = jnp.array(self.rows)[y], jnp.array(self.columns)[x]
    weights = rows[:, :, None] * columns[:, None]
    return einsum('mn,nc->mc', weights.reshape(len(index), -1), flat)

  def squares(self) -> jax.Array:
    """[n] squared norms of the points."""
    x = self.map
    ones = jnp.ones(x.shape[-1])

    def inner(first, second):
      # As a product: XLA's CPU backend adds up one number at a time.
      return einsum('hwc,c->hw', first * second, ones)

    if self.rows is None:
      return inner(x, x).reshape(-1)

    # A point mixes two neighbours along each axis: |point|^2 mixes the inner
    # products of a sample with itself and with its neighbours.
    right, below = inner(x[:, :-1], x[:, 1:]), inner(x[:-1], x[1:])
    across = inner(x[:-1, :-1], x[1:, 1:]) + inner(x[:-1, 1:], x[1:, :-1])
    rows, columns = np.square(self.rows), np.square(self.columns)
    row_pairs = 2 * self.rows[:, :-1] * self.rows[:, 1:]
    column_pairs = 2 * self.columns[:, :-1] * self.columns[:, 1:]
    return sum(
      einsum('yh,hw,xw->yx', *term)
      for term in (
        (rows, inner(x, x), columns),
        (rows, right, column_pairs),
        (row_pairs, below, columns),
        (row_pairs, across / 2, column_pairs),
      )
    ).reshape(-1)


class Points(NamedTuple):
  """n points of D features, as the layers that they are resized from."""

  layers: tuple[Layer, ...]
  count: int

  def products(self, centres: jax.Array) -> jax.Array:
    """[k, D] -> [n, k]."""
    return sum(
      layer.products(part)
      for layer, part in zip(self.layers, self.split(centres))
    )

  def sums(self, weights: jax.Array) -> jax.Array:
    """[n, k] -> [k, D]."""
    return jnp.concatenate([x.sums(weights) for x in self.layers], axis=1)

  def take(self, index: jax.Array) -> jax.Array:
    """[m] -> [m, D]."""
    return jnp.concatenate([x.take(index) for x in self.layers], axis=1)

  def squares(self) -> jax.Array:
    """[n]."""
    return sum(layer.squares() for layer in self.layers)

  def split(self, rows: jax.Array) -> list[jax.Array]:
    """[k, D] -> [k, C] of each layer."""
    sizes = [layer.map.shape[-1] for layer in self.layers]
    return jnp.split(rows, np.cumsum(sizes)[:-1], axis=-1)


def make_points(maps: Sequence[jax.Array], grid: tuple[int, int]) -> Points:
  """The points of an image: its maps resized to a grid and concatenated.

  Args:
    maps: [h, w, C] each, of any size.
    grid: H and W of the points, n = H W.
  """
  layers = []
  for x in maps:
    resized = x.shape[:2] != grid
    rows, columns = (
      resize_matrix(old, new) if resized else None
      for old, new in zip(x.shape[:2], grid)
    )
    layers.append(Layer(x.astype(jnp.float32), rows, columns))
  return Points(tuple(layers), grid[0] * grid[1])


def dense_points(points: jax.Array) -> Points:
  """Points [n, D] as they are."""
  return make_points((points[:, None],), (len(points), 1))


def centre(points: Points) -> tuple[Points, jax.Array]:
  """Points less their mean, and the mean [D]: fewer digits are lost.

  The weights of a resizing add up to one, so the mean can be taken off before.
  """
  weights = jnp.full((points.count, 1), 1 / points.count)
  mean = points.sums(weights)[0]
  layers = tuple(
    layer._replace(map=layer.map - part)
    for layer, part in zip(points.layers, points.split(mean))
  )
  return points._replace(layers=layers), mean
