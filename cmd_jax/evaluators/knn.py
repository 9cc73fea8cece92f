"""Weighted k-nearest-neighbour classification of frozen features."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from cmd_jax.evaluators.features import (
  Features,
  in_chunks,
  unit_rows,
  usable,
)


def make_knn(
  k: int = 20, temperature: float = 0.07, max_similarities: int = 2**23
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
    count = len(train.labels)
    ranks_of = functools.partial(
      _label_ranks,
      jax.device_put(unit_rows(train.vectors)),
      jax.device_put(train.labels),
      temperature,
      k=min(k, count),
      num_classes=len(train.class_names),
    )
    # A row of the working memory is one of similarities and one of votes.
    row = max(count, len(train.class_names))
    chunk = min(max(max_similarities // row, 1), len(test.labels))
    (ranks,) = in_chunks(ranks_of, chunk, unit_rows(test.vectors), test.labels)
    return {
      'top1': float((ranks < 1).mean()),
      'top5': float((ranks < 5).mean()),
    }

  return evaluate


@functools.partial(jax.jit, static_argnames=('k', 'num_classes'))
def _label_ranks(
  gallery: jax.Array,
  gallery_labels: jax.Array,
  temperature: float,
  queries: jax.Array,
  labels: jax.Array,
  *,
  k: int,
  num_classes: int,
) -> tuple[jax.Array]:
  """Ranks [B] of the true classes by votes; `num_classes` without a vote."""
  similarities = jnp.matmul(
    queries, gallery.T, precision=jax.lax.Precision.HIGHEST
  )
  nearest, indices = jax.lax.top_k(similarities, k)  # [B, k]
  # A common factor of a query's votes changes no order: no overflow. Slicing
  # the maximum off would make XLA on CPU sort all similarities, which took 17
  # times as long.
  weights = jnp.exp((nearest - nearest.max(1, keepdims=True)) / temperature)
  rows = jnp.arange(len(queries))
  votes = jnp.zeros((len(queries), num_classes))
  votes = votes.at[rows[:, None], gallery_labels[indices]].add(weights)
  own = votes[rows, labels][:, None]
  earlier = jnp.arange(num_classes) < labels[:, None]
  ahead = (votes > own) | ((votes == own) & earlier)
  return (jnp.where(own[:, 0] > 0, ahead.sum(axis=1), num_classes),)
