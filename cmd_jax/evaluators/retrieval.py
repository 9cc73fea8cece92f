"""Retrieval of images of the same class by frozen features."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.evaluators.features import (
  Features,
  in_chunks,
  unit_rows,
  usable,
)

# Every how many-th test image queries under retrieval/cmd-ratio9.
_RATIO = 9
# The places that the released program's average precision looks at.
_CUTOFF = 100


def make_retrieval(
  max_similarities: int = 2**22,
) -> Callable[[Features, Features], dict[str, float]]:
  """`retrieval/test-vs-train`: test images query the train images by cosine.

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
    protocol = 'retrieval/test-vs-train'
    train, test = usable(protocol, train, test)
    ranking = _rank_all(protocol, test, train, max_similarities)
    precisions = ranking.precision[ranking.relevant > 0].astype(np.float64)
    return {
      **_ranks(ranking),
      'mAP': float(precisions.mean()) if precisions.size else 0.0,
    }

  return evaluate


def make_cmd_ratio9(
  max_similarities: int = 2**22,
) -> Callable[[Features, Features], dict[str, float]]:
  """`retrieval/cmd-ratio9`: as the released CMD program retrieves.

  Every ninth test image, from the first on, queries all train images and the
  other test images (retrieval.py). The average precision looks at the first
  100 places and divides by the relevant images among them, 0 if there are none,
  so it is no bound of the usual one.

  Args:
    max_similarities: as in `make_retrieval`.

  Returns:
    An evaluator giving `rank1`, `rank5` and `mAP100`.
  """

  def evaluate(train: Features, test: Features) -> dict[str, float]:
    protocol = 'retrieval/cmd-ratio9'
    train, test = usable(protocol, train, test)
    number = np.arange(len(test.labels))
    others = test.take(np.flatnonzero(number % _RATIO))
    gallery = train._replace(
      vectors=np.concatenate([train.vectors, others.vectors]),
      labels=np.concatenate([train.labels, others.labels]),
      file_names=train.file_names + others.file_names,
    )
    queries = test.take(np.flatnonzero(number % _RATIO == 0))
    ranking = _rank_all(protocol, queries, gallery, max_similarities)
    precisions = ranking.cut_precision.astype(np.float64)
    return {**_ranks(ranking), 'mAP100': float(precisions.mean())}

  return evaluate


class _Ranking(NamedTuple):
  """What is found for each of Q queries.

  Attributes:
    first: [Q] place of the first relevant image, from 0.
    relevant: [Q] number of relevant images.
    precision: [Q] average precision of the full ranking.
    cut_precision: [Q] that of the first `_CUTOFF` places.
  """

  first: np.ndarray
  relevant: np.ndarray
  precision: np.ndarray
  cut_precision: np.ndarray


def _rank_all(
  protocol: str, queries: Features, gallery: Features, max_similarities: int
) -> _Ranking:
  chunk = max(max_similarities // len(gallery.labels), 1)
  ranking = _Ranking(
    *in_chunks(
      functools.partial(
        _rank,
        jax.device_put(unit_rows(gallery.vectors)),
        jax.device_put(gallery.labels),
      ),
      min(chunk, len(queries.labels)),
      unit_rows(queries.vectors),
      queries.labels,
    )
  )
  unanswerable = int(np.sum(ranking.relevant == 0))
  if unanswerable:
    logging.getLogger(__name__).warning(
      '%s: %d of %d queries have no gallery image of their class; they are '
      'misses in rank1 and rank5 and are left out of mAP',
      protocol,
      unanswerable,
      len(queries.labels),
    )
  return ranking


def _ranks(ranking: _Ranking) -> dict[str, float]:
  answerable = ranking.relevant > 0
  return {
    f'rank{count}': float((answerable & (ranking.first < count)).mean())
    for count in (1, 5)
  }


@jax.jit
def _rank(
  gallery: jax.Array,
  gallery_labels: jax.Array,
  queries: jax.Array,
  labels: jax.Array,
) -> tuple[jax.Array, ...]:
  """The fields of `_Ranking` for some queries."""
  similarities = jnp.matmul(
    queries, gallery.T, precision=jax.lax.Precision.HIGHEST
  )
  hits = gallery_labels == labels[:, None]
  _, hits = jax.lax.sort((-similarities, hits), num_keys=1, is_stable=True)
  found = jnp.cumsum(hits, axis=1, dtype=jnp.int32)
  places = jnp.arange(1, hits.shape[1] + 1)

  def average_precision(places_seen):
    seen = slice(None, places_seen)
    hit_precision = jnp.where(hits, found / places, 0.0)[:, seen]
    return hit_precision.sum(1) / jnp.maximum(hits[:, seen].sum(1), 1)

  return (
    jnp.argmax(hits, axis=1),
    found[:, -1],
    average_precision(None),
    average_precision(_CUTOFF),
  )
