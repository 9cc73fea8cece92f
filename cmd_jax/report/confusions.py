"""Which classes an encoder confuses."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


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
