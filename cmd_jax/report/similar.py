"""Which photographs look alike to an encoder, which classes it confuses."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.evaluators.features import Features, in_chunks, unit_rows

# Those of the protocol knn/20.
NUM_NEIGHBOURS, _TEMPERATURE = 20, 0.07
_MAX_SIMILARITIES = 2**23


class Nearest(NamedTuple):
  """The nearest gallery images of Q queries, the nearest first.

  Attributes:
    index: [Q, k] int32 rows of the gallery.
    similarity: [Q, k] float32 cosines.
  """

  index: np.ndarray
  similarity: np.ndarray


class Pair(NamedTuple):
  """Two classes that are taken for each other.

  Attributes:
    first: label of the one.
    second: label of the other.
    first_as_second: test images of the first that are voted into the second.
    second_as_first: test images of the second that are voted into the first.
  """

  first: int
  second: int
  first_as_second: int
  second_as_first: int


@functools.partial(jax.jit, static_argnames='k')
def _top(
  gallery: jax.Array, queries: jax.Array, own: jax.Array, *, k: int
) -> tuple[jax.Array, jax.Array]:
  similarity = jnp.matmul(
    queries, gallery.T, precision=jax.lax.Precision.HIGHEST
  )
  is_own = jnp.arange(len(gallery)) == own[:, None]
  similarity, index = jax.lax.top_k(jnp.where(is_own, -2.0, similarity), k)
  return index, similarity


def find_nearest(
  gallery: np.ndarray,
  queries: np.ndarray,
  own: np.ndarray | None = None,
  k: int = NUM_NEIGHBOURS,
) -> Nearest:
  """Finds the nearest gallery images by cosine similarity, block by block.

  Args:
    gallery: [N, D] features.
    queries: [Q, D] features.
    own: [Q] row of the query itself in the gallery, which is no neighbour of
      its own; -1 where it is not in it. None: no query is in the gallery.
    k: neighbours; fewer where the gallery has fewer.

  Returns:
    The neighbours of each query.
  """
  if own is None:
    own = np.full(len(queries), -1)
  k = min(k, len(gallery) - bool((own >= 0).any()))
  if k < 1 or not len(queries):
    empty = np.zeros((len(queries), 0))
    return Nearest(empty.astype(np.int32), empty.astype(np.float32))
  chunk = min(max(_MAX_SIMILARITIES // len(gallery), 1), len(queries))
  top = functools.partial(_top, jax.device_put(unit_rows(gallery)), k=k)
  index, similarity = in_chunks(
    top, chunk, unit_rows(queries), own.astype(np.int32)
  )
  return Nearest(index.astype(np.int32), similarity.astype(np.float32))


def predict(train: Features, test: Features) -> np.ndarray | None:
  """The classes that `knn/20` votes for.

  Votes are exp(s / 0.07) of the 20 nearest labelled training images; see
  `cmd_jax.evaluators.knn.make_knn`.

  Args:
    train: features that vote.
    test: features that are voted on.

  Returns:
    [Q] int32 labels; None if no training image has one.
  """
  train = train.take(np.flatnonzero(train.labels >= 0))
  if not len(train.labels):
    return None
  nearest = find_nearest(train.vectors, test.vectors)
  if not nearest.index.size:
    return np.zeros(0, np.int32)
  # Relative to the nearest, which changes no order and cannot overflow.
  relative = nearest.similarity - nearest.similarity[:, :1]
  votes = np.zeros((len(test.labels), len(train.class_names)), np.float32)
  rows = np.arange(len(votes))[:, None]
  np.add.at(
    votes, (rows, train.labels[nearest.index]), np.exp(relative / _TEMPERATURE)
  )
  return votes.argmax(1).astype(np.int32)


def count_confusions(
  labels: np.ndarray, predicted: np.ndarray, num_classes: int
) -> np.ndarray:
  """Counts which class is voted into which.

  Args:
    labels: [Q] true labels; rows below 0 are left out.
    predicted: [Q] labels.
    num_classes: C.

  Returns:
    [C, C] int64, true classes by predicted ones.
  """
  known = labels >= 0
  counts = np.zeros((num_classes, num_classes), np.int64)
  np.add.at(counts, (labels[known], predicted[known]), 1)
  return counts


def most_confused(counts: np.ndarray, limit: int) -> list[Pair]:
  """The pairs of classes that are taken for each other most often.

  Args:
    counts: [C, C] from `count_confusions`.
    limit: pairs at most.

  Returns:
    The most confused pair first; none that is never confused.
  """
  both = np.triu(counts + counts.T, 1)
  order = np.argsort(-both, axis=None, kind='stable')[:limit]
  return [
    Pair(int(a), int(b), int(counts[a, b]), int(counts[b, a]))
    for a, b in zip(*np.unravel_index(order, both.shape))
    if both[a, b]
  ]
