"""Which images of which splits and classes have twins: copies or nearly so."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cmd_jax.data.inspect import near_duplicates
from cmd_jax.data.inspect.near_duplicates import Prints
from cmd_jax.data.sources.base import UNLABELLED

# Enough to list; beyond it only images are counted.
_PAIRS_KEPT = 100_000
_NO_LABEL = np.iinfo(np.int32).max


class Twins(NamedTuple):
  """What is known about the twins of N images in S splits.

  A twin is a copy, pixel for pixel on the canvas, or a near duplicate. Images
  of one colour have none.

  Attributes:
    copies: [N, S] bool, whether an image has a copy in a split.
    twins: [N, S] bool, whether it has a twin there.
    conflicts: [N] bool, whether a twin has another label.
    pairs: [P, 2] rows of images that are twins, most alike first; every image
      with a twin is in one, unless there are too many to list.
    distances: [P] bits of the hash in which they differ, -1 for copies.
  """

  copies: np.ndarray
  twins: np.ndarray
  conflicts: np.ndarray
  pairs: np.ndarray
  distances: np.ndarray


class _Members:
  """The images that share a canvas, as one: U of them.

  Args:
    owner: [N] first image with the same canvas.
    splits: [N] number of the split.
    labels: [N] int32.
    num_splits: S.
  """

  def __init__(self, owner, splits, labels, num_splits):
    self.first, self.of = np.unique(owner, return_inverse=True)
    self.counts = np.zeros((len(self.first), num_splits), int)
    np.add.at(self.counts, (self.of, splits), 1)
    labelled = labels != UNLABELLED
    self.lowest = np.full(len(self.first), _NO_LABEL)
    self.highest = np.full(len(self.first), -1)
    where = self.of[labelled], labels[labelled]
    np.minimum.at(self.lowest, *where)
    np.maximum.at(self.highest, *where)


def _pairs_of_copies(owner: np.ndarray) -> np.ndarray:
  later = np.flatnonzero(owner != np.arange(len(owner)))
  return np.stack([owner[later], later], 1)[:_PAIRS_KEPT]


def find_twins(
  prints: Prints,
  owner: np.ndarray,
  splits: np.ndarray,
  labels: np.ndarray,
  *,
  num_splits: int,
  progress: bool | None = None,
) -> Twins:
  """Finds which images have twins in which splits.

  Args:
    prints: of N images.
    owner: [N] first image with the same canvas, from `first_copies`.
    splits: [N] number of the split of every image.
    labels: [N] int32, `UNLABELLED` where unknown; of one list of classes.
    num_splits: S.
    progress: as for `duplicates.make_prints`.
  """
  owner = np.where(prints.is_flat, np.arange(len(owner)), owner)
  members = _Members(owner, splits, labels, num_splits)
  near = np.zeros(members.counts.shape, bool)
  lowest, highest = members.lowest.copy(), members.highest.copy()
  listed = [_pairs_of_copies(owner)]
  one_each = Prints(*(field[members.first] for field in prints))
  for i, j in near_duplicates.near_pairs(one_each, progress=progress):
    for a, b in ((i, j), (j, i)):
      np.logical_or.at(near, a, members.counts[b] > 0)
      np.minimum.at(lowest, a, members.lowest[b])
      np.maximum.at(highest, a, members.highest[b])
    if sum(map(len, listed)) < _PAIRS_KEPT:
      listed.append(np.stack([members.first[i], members.first[j]], 1))
  own = np.zeros((len(owner), num_splits), int)
  own[np.arange(len(owner)), splits] = 1
  copies = members.counts[members.of] - own > 0
  conflicts = (labels != UNLABELLED) & (
    (lowest[members.of] < labels) | (highest[members.of] > labels)
  )
  pairs = np.unique(np.concatenate(listed), axis=0)
  differing = prints.hashes[pairs[:, 0]] ^ prints.hashes[pairs[:, 1]]
  distances = np.bitwise_count(differing).astype(int)
  distances[owner[pairs[:, 0]] == owner[pairs[:, 1]]] = -1
  order = np.argsort(distances, kind='stable')
  return Twins(
    copies,
    copies | near[members.of],
    conflicts,
    pairs[order],
    distances[order],
  )
