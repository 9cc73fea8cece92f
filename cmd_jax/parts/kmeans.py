"""k-means on the device, over many images.

Lloyd's iteration ends on all points with all their features, to scikit-learn's
tolerance. What comes before it only chooses where it starts: k-means++ with
several restarts on a sample of the points, projected onto a few directions
that hold most of their variance. The inertia is that of all points with all
features.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cmd_jax.parts.points import (
  Points,
  centre,
  dense_points,
  einsum,
  make_points,
)


class KMeans(NamedTuple):
  """A clustering of n points; with a leading axis B, of each of B images.

  Attributes:
    labels: [n] int32 index of the nearest centre.
    centres: [k, D] float32.
    inertia: scalar, sum of the squared distances to the nearest centre.
    num_steps: scalar int32, Lloyd steps taken on all points and features.
  """

  labels: jax.Array
  centres: jax.Array
  inertia: jax.Array
  num_steps: jax.Array


class _Target(NamedTuple):
  """Points to be clustered, and what the iteration needs beside them.

  Attributes:
    points: the points less their mean.
    squares: [n] their squared norms.
    active: [k] bool, the clusters that there are.
    tolerance: squared movement of the centres below which they stand still.
    max_steps: bound of the steps.
  """

  points: Points
  squares: jax.Array
  active: jax.Array
  tolerance: jax.Array
  max_steps: int

  def distances(self, centres: jax.Array) -> jax.Array:
    """[k, D] -> [n, k] squared distances, at least 0."""
    norms = jnp.sum(jnp.square(centres), -1)
    products = self.points.products(centres)
    return jnp.maximum(self.squares[:, None] - 2 * products + norms, 0.0)

  def means(self, labels: jax.Array, empty: jax.Array) -> jax.Array:
    """Mean [k, D] of each cluster; `empty` [k, D] for one without points."""
    one_hot = jax.nn.one_hot(labels, len(self.active))
    counts = one_hot.sum(0)[:, None]
    means = self.points.sums(one_hot) / jnp.maximum(counts, 1)
    return jnp.where(counts > 0, means, empty)


def _seed(target: _Target, key: jax.Array) -> jax.Array:
  """Greedy k-means++ (Arthur & Vassilvitskii 2007; as in scikit-learn).

  A centre is the best of 2 + log(k) points, each drawn with a probability
  proportional to its squared distance to the nearest centre so far.

  Returns:
    [k, D].
  """
  points, num_clusters = target.points, len(target.active)
  num_trials = 2 + int(math.log(num_clusters))
  first_key, key = jax.random.split(key)
  first = points.take(jax.random.randint(first_key, (1,), 0, points.count))
  centres = jnp.zeros((num_clusters, first.shape[1])).at[0].set(first[0])

  def add(index, state):
    centres, closest = state
    draws = jax.random.uniform(jax.random.fold_in(key, index), (num_trials,))
    cumulated = jnp.cumsum(closest)
    drawn = jnp.searchsorted(cumulated, draws * cumulated[-1])
    candidates = points.take(jnp.minimum(drawn, points.count - 1))
    distances = jnp.minimum(target.distances(candidates), closest[:, None])
    best = jnp.argmin(distances.sum(0))
    return centres.at[index].set(candidates[best]), distances[:, best]

  closest = target.distances(first)[:, 0]
  centres, _ = jax.lax.fori_loop(1, num_clusters, add, (centres, closest))
  return centres


def _repair(
  labels: jax.Array, distances: jax.Array, empty: jax.Array
) -> jax.Array:
  """Gives each empty cluster one of the points farthest from their centres.

  Args:
    labels: [n].
    distances: [n] squared distances to the own centre.
    empty: [k] bool.

  Returns:
    [n] labels.
  """
  count = min(len(empty), len(labels))
  _, farthest = jax.lax.top_k(distances, count)
  rank = jnp.minimum(jnp.cumsum(empty) - 1, count - 1)
  # Out of bounds, so dropped, for clusters that need nothing.
  index = jnp.where(empty, farthest[rank], len(labels))
  return labels.at[index].set(jnp.arange(len(empty)), mode='drop')


class _State(NamedTuple):
  centres: jax.Array
  labels: jax.Array
  step: jax.Array
  done: jax.Array


def _lloyd(target: _Target, centres: jax.Array) -> KMeans:
  """Lloyd's iteration until no label changes or the centres stand still."""
  num_clusters = len(centres)

  def nearest(centres):
    distances = target.distances(centres)
    distances = jnp.where(target.active, distances, jnp.inf)
    return jnp.argmin(distances, -1).astype(jnp.int32), distances.min(-1)

  def step(state):
    labels, distances = nearest(state.centres)
    counts = jnp.bincount(labels, length=num_clusters)
    empty = target.active & (counts == 0)
    labels = jax.lax.cond(
      jnp.any(empty),
      lambda: _repair(labels, distances, empty),
      lambda: labels,
    )
    centres = target.means(labels, empty=state.centres)
    moved = jnp.sum(jnp.square(centres - state.centres))
    done = jnp.all(labels == state.labels) | (moved <= target.tolerance)
    return _State(centres, labels, state.step + 1, done)

  state = _State(
    centres,
    jnp.full(len(target.squares), -1, jnp.int32),
    jnp.int32(0),
    jnp.bool_(False),
  )
  state = jax.lax.while_loop(
    lambda state: ~state.done & (state.step < target.max_steps), step, state
  )
  labels, distances = nearest(state.centres)
  return KMeans(labels, state.centres, distances.sum(), state.step)


def _project(points: Points, num_dims: int, key: jax.Array) -> jax.Array:
  """Points on directions that hold most of their variance, [n, num_dims].

  The directions span X^T X S^T for a random sample S of the points: one step
  of subspace iteration (Halko, Martinsson & Tropp 2011, Algorithm 4.4) that
  starts at points, for Gaussian directions take longer to draw than to use.
  """
  drawn = jax.random.randint(key, (num_dims,), 0, points.count)
  directions = points.sums(points.products(points.take(drawn)))
  norms = jnp.linalg.norm(directions, axis=1, keepdims=True)
  directions = directions / jnp.maximum(norms, 1e-30)
  # Orthonormal but for the ridge, which shortens what depends on the others.
  gram = einsum('id,jd->ij', directions, directions)
  root = jnp.linalg.cholesky(gram + 1e-5 * jnp.eye(num_dims))
  directions = jax.scipy.linalg.solve_triangular(root, directions, lower=True)
  return points.products(directions)


def _warm_start(
  target: _Target,
  key: jax.Array,
  *,
  num_dims: int,
  num_sampled: int,
  num_restarts: int,
) -> jax.Array:
  """Centres [k, D] from a projection of a sample of the points."""
  dims_key, sample_key, seed_key = jax.random.split(key, 3)
  count = target.points.count
  projected = _project(target.points, num_dims, dims_key)
  kept = jax.random.permutation(sample_key, count)[:num_sampled]

  def within(vectors):
    points = dense_points(vectors)
    return target._replace(points=points, squares=points.squares())

  sample = within(projected[kept])
  results = jax.vmap(lambda key: _lloyd(sample, _seed(sample, key)))(
    jax.random.split(seed_key, num_restarts)
  )
  best = jnp.argmin(results.inertia)
  labels = _lloyd(within(projected), results.centres[best]).labels
  # A cluster left without points starts at the mean, and is repaired.
  num_features = sum(layer.map.shape[-1] for layer in target.points.layers)
  empty = jnp.zeros((len(target.active), num_features))
  return target.means(labels, empty)


@functools.partial(
  jax.jit,
  static_argnames=(
    'grid',
    'num_clusters',
    'max_steps',
    'tolerance',
    'num_dims',
    'num_sampled',
    'num_restarts',
    'warm_start',
    'chunk',
  ),
)
def kmeans_of_maps(
  maps: Sequence[jax.Array],
  keys: jax.Array,
  *,
  grid: tuple[int, int],
  num_clusters: int,
  num_active: jax.Array | None = None,
  max_steps: int = 300,
  tolerance: float = 1e-4,
  num_dims: int = 64,
  num_sampled: int = 1024,
  num_restarts: int = 4,
  warm_start: bool = True,
  chunk: int = 1,
) -> KMeans:
  """Clusters the points of each image by themselves.

  The points are the maps resized to a grid (`features.hypercolumn`), which are
  never formed. An image's result depends on its maps and its key alone.

  Args:
    maps: [B, h, w, C] each, of any size.
    keys: [B] random keys.
    grid: H and W of the points; n = H W.
    num_clusters: k.
    num_active: [B] number of clusters that are used, at most k; None for all.
      It lets one compiled function try many.
    max_steps: bound of the Lloyd steps of each stage.
    tolerance: the iteration ends where the centres' squared movement is below
      this times the mean variance of a feature (scikit-learn's `tol`).
    num_dims: dimension of the projection for the start.
    num_sampled: points that the restarts see.
    num_restarts: k-means++ seedings, of which the best goes on.
    warm_start: False starts from one k-means++ seeding of all points with all
      features; slower, and the inertia is higher on average.
    chunk: images clustered side by side, which bounds the memory; 1 is best on
      a CPU.

  Returns:
    The clusterings, with a leading axis B; with `num_active` the other centres
    mean nothing.
  """
  if num_active is None:
    num_active = jnp.full(len(keys), num_clusters)

  def cluster(maps, key, num_active):
    points, mean = centre(make_points(maps, grid))
    squares = points.squares()
    target = _Target(
      points,
      squares,
      jnp.arange(num_clusters) < num_active,
      tolerance * squares.mean() / len(mean),
      max_steps,
    )
    if warm_start:
      centres = _warm_start(
        target,
        key,
        num_dims=min(num_dims, len(mean)),
        num_sampled=num_sampled,
        num_restarts=num_restarts,
      )
    else:
      centres = _seed(target, key)
    result = _lloyd(target, centres)
    return result._replace(centres=result.centres + mean)

  return jax.lax.map(
    lambda inputs: cluster(*inputs),
    (tuple(maps), keys, num_active),
    batch_size=None if chunk == 1 else chunk,
  )


def kmeans(
  points: jax.Array, keys: jax.Array, *, num_clusters: int, **options
) -> KMeans:
  """Clusters points that are at hand, [B, n, D]; see `kmeans_of_maps`."""
  return kmeans_of_maps(
    (points[:, :, None],),
    keys,
    grid=(points.shape[1], 1),
    num_clusters=num_clusters,
    **options,
  )
