"""Scores that may choose a checkpoint: they never see a test image.

Where there are labels, a validation split asks the training images, or each of
these the others. The embeddings of training images are looked at
without labels besides.
"""

from __future__ import annotations

import numpy as np

from cmd_jax.evaluators import knn, label_free
from cmd_jax.evaluators.features import Features

# Training images looked at, at most: effective ranks of fewer are too low, and
# more take long.
MAX_IMAGES = 4096

# What may choose a checkpoint, and whether it needs labels. That neighbours
# stay says how much moves, not how well. `top1` is that of a classifier that is
# trained with the encoder.
CHOOSING = {'knn': True, 'rank1': True, 'rankme': False, 'top1': True}


def choose_images(labels: np.ndarray) -> np.ndarray:
  """Chooses images to look at, the same ones for the same labels.

  Args:
    labels: [M] of all images, -1 where unknown. Images with a label are taken
      before others.

  Returns:
    [N] their numbers in ascending order, at most `MAX_IMAGES`.
  """
  order = np.random.default_rng(0).permutation(len(labels))
  order = order[np.argsort(labels[order] < 0, kind='stable')][:MAX_IMAGES]
  return np.sort(order)


def can_ask(labels: np.ndarray) -> bool:
  """Whether two of the images that are looked at are known to be of a class."""
  chosen = labels[choose_images(labels)]
  return bool((np.bincount(chosen[chosen >= 0]) > 1).any())


def score_labelled(
  train: Features, queries: Features | None
) -> dict[str, float]:
  """The shares of queries whose class is found.

  Args:
    train: features that are searched.
    queries: features that ask; None lets each of train ask the others. Nothing
      is learned from labels, so that these hide nothing from training.

  Returns:
    `knn`, by the vote of 20 neighbours as in the protocol knn/20, and `rank1`,
    by the nearest one; nothing where there are no labels to ask for.
  """
  if queries is None:
    scores = {
      'knn': knn.leave_one_out(train),
      'rank1': knn.leave_one_out(train, k=1),
    }
    return {name: x for name, x in scores.items() if x is not None}
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
