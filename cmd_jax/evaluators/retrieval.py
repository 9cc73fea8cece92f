"""Retrieval of images of the same class by frozen features."""

from __future__ import annotations

import concurrent.futures
import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.evaluators.features import (
  Features,
  centred,
  unit_rows,
  usable,
)
from cmd_jax.evaluators.whitening import apart_in

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
    relevant image among the first one and five, and `mAP`, which is left out
    where no query has a relevant image.
  """

  def evaluate(train: Features, test: Features) -> dict[str, float]:
    protocol = 'retrieval/test-vs-train'
    train, test = usable(protocol, train, test)
    ranking = _rank_all(protocol, test, train, max_similarities)
    return {**_ranks(ranking), **_mean_precision(ranking)}

  return evaluate


def make_centred(
  max_similarities: int = 2**22,
) -> Callable[[Features, Features], dict[str, float]]:
  """`retrieval/test-vs-train-centred`: as `make_retrieval`, features centred.

  The mean of the train features is taken off both before the cosine, which is
  near 1 for all images where features lie in a narrow cone.

  Args:
    max_similarities: as in `make_retrieval`.

  Returns:
    An evaluator giving `rank1`, `rank5` and `mAP`.
  """
  return _make_apart(
    'retrieval/test-vs-train-centred',
    lambda gallery: lambda vectors: centred(vectors, gallery),
    max_similarities,
  )


def make_as_searched(
  max_similarities: int = 2**22,
) -> Callable[[Features, Features], dict[str, float]]:
  """`retrieval/search`: train images ranked as `cmd-jax search` ranks them.

  As `make_retrieval`, of features whitened by what the neighbours among the
  train images differ in (`whitening.learn_whitening`, without a label); centred
  where these are too few.

  Args:
    max_similarities: as in `make_retrieval`.

  Returns:
    An evaluator giving `rank1`, `rank5` and `mAP`.
  """
  return _make_apart('retrieval/search', apart_in, max_similarities)


def _make_apart(
  protocol: str,
  learn: Callable[[np.ndarray], Callable[[np.ndarray], np.ndarray]],
  max_similarities: int,
) -> Callable[[Features, Features], dict[str, float]]:
  """As `make_retrieval`, after a map that is learned of the train vectors."""

  def evaluate(train: Features, test: Features) -> dict[str, float]:
    train, test = usable(protocol, train, test)
    told_apart = learn(train.vectors)
    gallery, queries = (
      x._replace(vectors=told_apart(x.vectors)) for x in (train, test)
    )
    ranking = _rank_all(protocol, queries, gallery, max_similarities)
    return {**_ranks(ranking), **_mean_precision(ranking)}

  return evaluate


def make_loo(
  max_similarities: int = 2**22,
) -> Callable[[Features, Features], dict[str, float]]:
  """`retrieval/loo-test`: every test image queries the other test images.

  Leave one out; otherwise as `make_retrieval`. Train is not looked at, so it
  tells how well the encoder does on images it was not trained on among
  themselves.

  Args:
    max_similarities: as in `make_retrieval`.

  Returns:
    An evaluator giving `rank1`, `rank5` and `mAP`.
  """

  def evaluate(train: Features, test: Features) -> dict[str, float]:
    protocol = 'retrieval/loo-test'
    _, test = usable(protocol, train, test)
    own = np.arange(len(test.labels))
    ranking = _rank_all(protocol, test, test, max_similarities, own)
    return {**_ranks(ranking), **_mean_precision(ranking)}

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
    An evaluator giving `rank1`, `rank5` and `mAP100`, which is left out where
    no query has a relevant image.
  """

  def evaluate(train: Features, test: Features) -> dict[str, float]:
    protocol = 'retrieval/cmd-ratio9'
    train, test = usable(protocol, train, test)
    number = np.arange(len(test.labels))
    others = test.take(np.flatnonzero(number % _RATIO))
    gallery = train._replace(
      vectors=np.concatenate([train.vectors, others.vectors]),
      labels=np.concatenate([train.labels, others.labels]),
      file_names=(*train.file_names, *others.file_names),
    )
    queries = test.take(np.flatnonzero(number % _RATIO == 0))
    ranking = _rank_all(protocol, queries, gallery, max_similarities)
    scores = _ranks(ranking)
    if ranking.relevant.any():
      scores['mAP100'] = float(ranking.cut_precision.mean())
    return scores

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
  protocol: str,
  queries: Features,
  gallery: Features,
  max_similarities: int,
  own: np.ndarray | None = None,
) -> _Ranking:
  """Ranks the gallery for every query, without its `own` image [Q] in it."""
  by_label = np.argsort(gallery.labels, kind='stable')
  counts = np.bincount(gallery.labels, minlength=queries.labels.max() + 1)
  members = np.split(by_label, np.cumsum(counts)[:-1])
  in_gallery = jax.device_put(unit_rows(gallery.vectors))
  vectors = unit_rows(queries.vectors)

  def rank(similarities: np.ndarray, start: int) -> list[tuple]:
    if own is not None:
      # At the end, where it changes nobody's place.
      rows = np.arange(len(similarities))
      similarities[rows, own[start + rows]] = -np.inf
    # NumPy sorts thirty times as fast as XLA does on a CPU, and lets other
    # threads run meanwhile.
    ordered = np.sort(similarities, axis=1)
    places = []
    for row, similar in enumerate(similarities):
      relevant = members[queries.labels[start + row]]
      if own is not None:
        relevant = relevant[relevant != own[start + row]]
      places.append(_summary(_places(similar, ordered[row], relevant)))
    return places

  num_threads = os.cpu_count() or 1
  chunk = max(max_similarities // len(gallery.labels), 1)
  ranked = []
  with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
    for start in range(0, len(vectors), chunk):
      block = _similarities(in_gallery, vectors[start : start + chunk])
      # A copy, because JAX's own memory is read-only.
      shares = np.array_split(np.array(block), min(num_threads, len(block)))
      starts = start + np.cumsum([0, *map(len, shares)])
      for results in pool.map(rank, shares, starts[:-1]):
        ranked += results
  ranking = _Ranking(*map(np.array, zip(*ranked)))
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


@jax.jit
def _similarities(gallery: jax.Array, queries: jax.Array) -> jax.Array:
  return jnp.matmul(queries, gallery.T, precision=jax.lax.Precision.HIGHEST)


def _places(
  similar: np.ndarray, ordered: np.ndarray, relevant: np.ndarray
) -> np.ndarray:
  """Places, from 0 and ascending, of the relevant images of one query.

  Args:
    similar: [N] similarity of every gallery image.
    ordered: the same in ascending order.
    relevant: [R] ascending numbers of relevant images.

  Returns:
    [R].
  """
  values = similar[relevant]
  right = np.searchsorted(ordered, values, 'right')
  if np.any(right - np.searchsorted(ordered, values) > 1):
    # Ties keep the order of the gallery.
    place_of = np.empty(len(similar), int)
    place_of[np.argsort(-similar, kind='stable')] = np.arange(len(similar))
    return np.sort(place_of[relevant])
  return np.sort(len(similar) - right)


def _summary(places: np.ndarray) -> tuple[int, int, float, float]:
  """The fields of `_Ranking` for one query."""
  if not len(places):
    return 0, 0, 0.0, 0.0
  precisions = np.arange(1, len(places) + 1) / (places + 1)
  seen = precisions[places < _CUTOFF]
  return (
    places[0],
    len(places),
    precisions.mean(),
    seen.mean() if len(seen) else 0.0,
  )


def _ranks(ranking: _Ranking) -> dict[str, float]:
  answerable = ranking.relevant > 0
  return {
    f'rank{count}': float((answerable & (ranking.first < count)).mean())
    for count in (1, 5)
  }


def _mean_precision(ranking: _Ranking) -> dict[str, float]:
  precisions = ranking.precision[ranking.relevant > 0]
  return {'mAP': float(precisions.mean())} if precisions.size else {}
