"""Weighted k-nearest-neighbour classification of frozen features."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.evaluators.features import Features, in_chunks, usable
from cmd_jax.evaluators.nearest import MAX_SIMILARITIES, find_nearest


def make_knn(
  k: int = 20,
  temperature: float = 0.07,
  max_similarities: int = MAX_SIMILARITIES,
) -> Callable[[Features, Features], dict[str, float]]:
  """The weighted kNN classifier of DINO and EsViT (`eval_knn.py`).

  The k train features of highest cosine similarity s vote for their class with
  weight exp(s / temperature). Where train features are equally similar, the
  earlier ones are taken; where classes have equal votes, the lower label comes
  first. A class without a vote is never predicted (the released code fills a
  top-5 list of fewer than five voted classes arbitrarily).

  Args:
    k: neighbours; all train examples where there are fewer.
    temperature: of the votes.
    max_similarities: entries of the similarity matrix held at once; bounds the
      memory (a few times 4 bytes each), doesn't change the result.

  Returns:
    An evaluator giving `top1` and `top5`, the shares of test examples whose
    class is the first, or among the first five.

  Raises:
    ValueError: `k` or `temperature` isn't positive.
  """
  if k < 1 or temperature <= 0:
    raise ValueError(
      f'k and temperature must be positive, got {k} and {temperature}'
    )

  def evaluate(train: Features, test: Features) -> dict[str, float]:
    train, test = usable(f'knn/{k}', train, test)
    ranks, _ = _votes(train, test, k, temperature, max_similarities)
    return {
      'top1': float((ranks < 1).mean()),
      'top5': float((ranks < 5).mean()),
    }

  return evaluate


def leave_one_out(
  features: Features, k: int = 20, temperature: float = 0.07
) -> float | None:
  """How often the k nearest other images vote for an image's own class.

  Args:
    features: of images, with or without labels; those without are left out, and
      an image that is alone in its class votes and is not asked.
    k: neighbours.
    temperature: of the votes.

  Returns:
    The share of those that are asked; None if there are none.
  """
  features = features.take(np.flatnonzero(features.labels >= 0))
  asked = np.bincount(features.labels)[features.labels] > 1
  if not asked.any():
    return None
  own = np.arange(len(features.labels))
  ranks, _ = _votes(features, features, k, temperature, MAX_SIMILARITIES, own)
  return float((ranks[asked] < 1).mean())


def predict(
  train: Features, test: Features, k: int = 20, temperature: float = 0.07
) -> np.ndarray | None:
  """The classes that `make_knn`'s neighbours vote for, by default `knn/20`'s.

  Args:
    train: features that vote, where they have a label.
    test: features that are voted on, whether they have a label or not.
    k: neighbours.
    temperature: of the votes.

  Returns:
    [Q] int32 labels; None if no training image has one.
  """
  train = train.take(np.flatnonzero(train.labels >= 0))
  if not len(train.labels):
    return None
  return _votes(train, test, k, temperature, MAX_SIMILARITIES)[1]


def _votes(
  train: Features,
  test: Features,
  k: int,
  temperature: float,
  max_similarities: int,
  own: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Ranks [Q] of the true classes, and the classes [Q] with the most votes."""
  nearest = find_nearest(
    test.vectors, train.vectors, k, max_similarities=max_similarities, own=own
  )
  num_classes = len(train.class_names)
  chunk = min(max(max_similarities // num_classes, 1), len(test.labels))
  return in_chunks(
    functools.partial(
      _count_votes, temperature=temperature, num_classes=num_classes
    ),
    chunk,
    nearest.similarities,
    train.labels[nearest.rows],
    test.labels,
  )


@functools.partial(jax.jit, static_argnames='num_classes')
def _count_votes(
  similarities: jax.Array,
  voted: jax.Array,
  labels: jax.Array,
  *,
  temperature: float,
  num_classes: int,
) -> tuple[jax.Array, jax.Array]:
  """Lets neighbours vote.

  Args:
    similarities: [B, k] of the neighbours.
    voted: [B, k] their labels.
    labels: [B] of the queries; -1 where unknown.
    temperature: of the votes.
    num_classes: C.

  Returns:
    Ranks [B] of the true classes, C without a vote and meaningless without a
    label; and the classes [B] with the most votes.
  """
  # A common factor of a query's votes changes no order: no overflow.
  relative = similarities - similarities.max(1, keepdims=True)
  weights = jnp.exp(relative / temperature)
  rows = jnp.arange(len(labels))
  votes = jnp.zeros((len(labels), num_classes))
  votes = votes.at[rows[:, None], voted].add(weights)
  own = votes[rows, labels][:, None]
  earlier = jnp.arange(num_classes) < labels[:, None]
  ahead = (votes > own) | ((votes == own) & earlier)
  ranks = jnp.where(own[:, 0] > 0, ahead.sum(axis=1), num_classes)
  return ranks, votes.argmax(1).astype(jnp.int32)
