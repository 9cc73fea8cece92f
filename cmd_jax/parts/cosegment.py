"""Co-segmentation into parts across images (Amir et al. 2021, Sec. 4.2).

Descriptors of all images are clustered; a cluster is foreground if enough
images find it salient; the foreground's descriptors are clustered into parts.
As PARTICLE's script uses it, without its refinement by a random field.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.errors import UserError
from cmd_jax.models.heads import l2_normalise
from cmd_jax.parts.features import log_bin as bin_maps
from cmd_jax.parts.kmeans import kmeans
from cmd_jax.parts.points import einsum


class Cosegmentation(NamedTuple):
  """How parts are found in the keys of a ViT.

  Attributes:
    num_parts: parts of the foreground, at most 255.
    stride_px: distance of neighbouring patches.
    saliency_heads: heads whose attention is averaged, none for all.
    log_bin: whether descriptors have their surroundings in them.
    num_clusters: clusters of the first round, 0 for the elbow.
    max_clusters: most clusters that the elbow tries.
    elbow: the first number of clusters whose inertia is above this times that
      of one cluster fewer is taken.
    saliency: mean saliency of its patches above which an image votes for a
      cluster.
    votes: share of the images whose votes make a cluster foreground.
    num_sampled: descriptors that are clustered, spread over the images.
  """

  num_parts: int = 9
  stride_px: int = 8
  saliency_heads: tuple[int, ...] = ()
  log_bin: bool = False
  num_clusters: int = 0
  max_clusters: int = 14
  elbow: float = 0.975
  saliency: float = 0.065
  votes: float = 0.75
  num_sampled: int = 20_000


def _descriptors(keys: jax.Array, log_bin: bool) -> jax.Array:
  """[B, h, w, D] keys as [B, h w, D'] unit vectors."""
  keys = keys.astype(jnp.float32)
  maps = bin_maps(keys) if log_bin else keys
  vectors = maps.reshape(len(maps), -1, maps.shape[-1])
  return l2_normalise(vectors)


@functools.partial(jax.jit, static_argnames=('log_bin', 'per_image'))
def sample_descriptors(
  maps: jax.Array, keys: jax.Array, *, log_bin: bool, per_image: int
) -> jax.Array:
  """Draws descriptors of each image without replacement.

  Args:
    maps: [B, h, w, D] keys of the patches.
    keys: [B] random keys.
    log_bin: whether descriptors have their surroundings in them.
    per_image: descriptors of an image; all if it has fewer.

  Returns:
    [B, m, D'] float32 unit vectors.
  """
  vectors = _descriptors(maps, log_bin)

  def draw(vectors, key):
    return vectors[jax.random.permutation(key, len(vectors))[:per_image]]

  return jax.vmap(draw)(vectors, keys)


@jax.jit
def nearest(vectors: jax.Array, centres: jax.Array) -> jax.Array:
  """[..., D] -> [...] int32 index of the nearest centre [k, D]."""
  products = einsum('...d,kd->...k', vectors, centres)
  norms = jnp.sum(jnp.square(centres), -1)
  return jnp.argmin(norms - 2 * products, -1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=('log_bin',))
def assign(maps: jax.Array, centres: jax.Array, *, log_bin: bool) -> jax.Array:
  """[B, h, w, D] keys -> [B, h, w] int32 index of the nearest centre."""
  labels = nearest(_descriptors(maps, log_bin), centres)
  return labels.reshape(maps.shape[:3])


def find_clusters(
  sample: np.ndarray, settings: Cosegmentation, seed: int
) -> np.ndarray:
  """Clusters a sample of the descriptors of all images.

  Args:
    sample: [n, D].
    settings: see `Cosegmentation`.
    seed: of the clustering.

  Returns:
    [k, D] centres.
  """
  most = settings.num_clusters or settings.max_clusters
  tried = [most] if settings.num_clusters else range(1, most + 1)
  key = jax.random.fold_in(jax.random.key(seed), 0)
  points, before = jnp.array(sample)[None], math.inf
  for count in tried:
    result = kmeans(
      points,
      key[None],
      num_clusters=most,
      num_active=jnp.array([count]),
      num_sampled=4096,
    )
    inertia = float(result.inertia[0])
    if inertia > settings.elbow * before:
      break
    before = inertia
  return np.asarray(result.centres[0, :count])


def vote(
  labels: np.ndarray,
  saliency: np.ndarray,
  num_clusters: int,
  settings: Cosegmentation,
) -> np.ndarray:
  """The clusters that are foreground.

  An image votes for a cluster whose patches have a mean saliency above a
  threshold there. Where no cluster has the votes, the one with most of them
  (then with most saliency) is taken, so that there is a foreground.

  Args:
    labels: [N, h, w] cluster of every patch.
    saliency: [N, h, w], from 0 to 1.
    num_clusters: k.
    settings: see `Cosegmentation`.

  Returns:
    [k] bool.
  """
  count = len(labels)
  cell = (np.arange(count)[:, None, None] * num_clusters + labels).ravel()
  sizes, sums = (
    np.bincount(cell, weights, count * num_clusters).reshape(count, -1)
    for weights in (None, saliency.ravel())
  )
  means = sums / np.maximum(sizes, 1)
  votes = (means > settings.saliency).sum(0)
  salient = votes >= math.ceil(settings.votes * count)
  if not salient.any():
    salient[np.lexsort((means.mean(0), votes))[-1]] = True
  return salient


def find_parts(
  sample: np.ndarray, settings: Cosegmentation, seed: int
) -> np.ndarray:
  """Clusters the foreground's descriptors into parts.

  Args:
    sample: [n, D] descriptors of the foreground.
    settings: see `Cosegmentation`.
    seed: of the clustering.

  Returns:
    [num_parts, D] centres.

  Raises:
    UserError: fewer descriptors than parts.
  """
  if len(sample) < settings.num_parts:
    raise UserError(
      f'the foreground has {len(sample)} of the sampled descriptors, fewer '
      f'than config.parts.settings.num_parts {settings.num_parts}: set '
      'num_sampled higher, or num_parts lower'
    )
  key = jax.random.fold_in(jax.random.key(seed), 1)
  result = kmeans(
    jnp.array(sample)[None],
    key[None],
    num_clusters=settings.num_parts,
    num_sampled=4096,
  )
  return np.asarray(result.centres[0])
