"""Scores that may choose a checkpoint: they never see a test image.

Where there are labels, a share of the labelled training images asks the others,
or a validation split does. The embeddings of training images are looked at
without labels besides.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cmd_jax.data.sources.labelled import first_of_each_class
from cmd_jax.evaluators import knn, label_free
from cmd_jax.evaluators.features import Features

# Training images looked at, at most: effective ranks of fewer are too low, and
# more take long.
MAX_IMAGES = 4096

# What may choose a checkpoint, and whether it needs labels. That neighbours
# stay says how much moves, not how well. `top1` is that of a classifier that is
# trained with the encoder.
CHOOSING = {'knn': True, 'rank1': True, 'rankme': False, 'top1': True}


class Sample(NamedTuple):
  """The training images that are looked at.

  Attributes:
    rows: [N] their numbers.
    asks: [N] whether an image's label is held out and asked for.
  """

  rows: np.ndarray
  asks: np.ndarray


def choose_sample(labels: np.ndarray) -> Sample:
  """Chooses training images, the same ones for the same labels.

  Args:
    labels: [M] of all training images, -1 where unknown. Images with a label
      are taken before others.

  Returns:
    At most `MAX_IMAGES` of them. Of every class with two images in the sample
    or more, about a fifth and at least one are held out.
  """
  order = np.random.default_rng(0).permutation(len(labels))
  order = order[np.argsort(labels[order] < 0, kind='stable')][:MAX_IMAGES]
  asks = first_of_each_class(labels[order])
  by_number = np.argsort(order)
  return Sample(order[by_number], asks[by_number])


def score_labelled(train: Features, queries: Features) -> dict[str, float]:
  """The shares of queries whose class is found.

  Args:
    train: features that are searched.
    queries: features that ask.

  Returns:
    `knn`, by the vote of 20 neighbours as in the protocol knn/20, and `rank1`,
    by the nearest one; nothing where either side has no label.
  """
  if not ((train.labels >= 0).any() and (queries.labels >= 0).any()):
    return {}
  return {
    'knn': knn.make_knn()(train, queries)['top1'],
    'rank1': knn.make_knn(k=1)(train, queries)['top1'],
  }


def score_unlabelled(
  vectors: np.ndarray, nearest_before: np.ndarray | None
) -> tuple[dict[str, float], np.ndarray]:
  """What embeddings say without labels.

  Args:
    vectors: [N, D].
    nearest_before: [N] nearest neighbours at the last evaluation; None without.

  Returns:
    `rankme`, and `stable_neighbours`, the share of images whose nearest
    neighbour is still the same, if it is known; and the nearest neighbours [N].
  """
  scores = {'rankme': label_free.rankme(vectors)}
  nearest = label_free.nearest_neighbours(vectors)
  if nearest_before is not None and len(nearest_before) == len(nearest):
    scores['stable_neighbours'] = float(np.mean(nearest == nearest_before))
  return scores, nearest
