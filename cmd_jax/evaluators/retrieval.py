"""Retrieval of images of the same class by frozen features."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.evaluators.features import (
  Features,
  in_chunks,
  unit_rows,
  usable,
)

_PROTOCOL = 'retrieval/test-vs-train'


def make_retrieval(
  max_similarities: int = 2**22,
) -> Callable[[Features, Features], dict[str, float]]:
  """Every test image queries the train images by cosine similarity.

  Train images of the query's class are relevant. Equally similar ones keep
  their order in `train`. The average precision of a query is the mean, over all
  its R relevant images, of the precision at their places r_1 < ... < r_R of the
  full ranking: AP = 1/R sum_i i / r_i.

  Queries without a relevant image (a class that `train` lacks) count as misses
  in the ranks and are left out of the mean of AP; their number is logged.

  Args:
    max_similarities: entries of the similarity matrix held at once; bounds the
      memory (a few times 4 bytes each), doesn't change the result.

  Returns:
    An evaluator giving `rank1` and `rank5`, the shares of queries with a
    relevant image among the first one and five, and `mAP` (0 where no query
    has a relevant image).
  """

  def evaluate(train: Features, test: Features) -> dict[str, float]:
    train, test = usable(_PROTOCOL, train, test)
    chunk = max(max_similarities // len(train.labels), 1)
    first, precision, relevant = in_chunks(
      functools.partial(
        _rank,
        jax.device_put(unit_rows(train.vectors)),
        jax.device_put(train.labels),
      ),
      min(chunk, len(test.labels)),
      unit_rows(test.vectors),
      test.labels,
    )
    answerable = relevant > 0
    if not answerable.all():
      logging.getLogger(__name__).warning(
        '%s: %d of %d queries have no train image of their class; they are '
        'misses in rank1 and rank5 and are left out of mAP',
        _PROTOCOL,
        np.sum(~answerable),
        len(answerable),
      )
    precisions = precision[answerable].astype(np.float64)
    return {
      'rank1': float((answerable & (first < 1)).mean()),
      'rank5': float((answerable & (first < 5)).mean()),
      'mAP': float(precisions.mean()) if precisions.size else 0.0,
    }

  return evaluate


@jax.jit
def _rank(
  gallery: jax.Array,
  gallery_labels: jax.Array,
  queries: jax.Array,
  labels: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """First relevant place, average precision and relevant images, each [B]."""
  similarities = jnp.matmul(
    queries, gallery.T, precision=jax.lax.Precision.HIGHEST
  )
  hits = gallery_labels == labels[:, None]
  _, hits = jax.lax.sort((-similarities, hits), num_keys=1, is_stable=True)
  found = jnp.cumsum(hits, axis=1, dtype=jnp.int32)
  places = jnp.arange(1, hits.shape[1] + 1)
  relevant = found[:, -1]
  precision = jnp.sum(jnp.where(hits, found / places, 0.0), axis=1)
  return (
    jnp.argmax(hits, axis=1),
    precision / jnp.maximum(relevant, 1),
    relevant,
  )
