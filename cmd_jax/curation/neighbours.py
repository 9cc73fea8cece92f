"""What an image's neighbours say of it: is it typical, is its label right."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cmd_jax.curation.duplicates import NO_GROUP, Duplicates
from cmd_jax.data.sources.base import UNLABELLED
from cmd_jax.data.sources.given_labels import Labels
from cmd_jax.evaluators.nearest import Nearest

# Neighbours that are asked for: duplicates among them are not counted.
ASKED = 40
_FOR_TYPICALITY = 10
_FOR_VOTE = 20
# As in knn/20.
_TEMPERATURE = 0.07
# Robust deviations below the median beyond which an image is an outlier: one
# in 160 of a normal distribution.
_FAR = 2.5
# Of a normal distribution: deviation over median absolute deviation.
_MAD_TO_DEVIATION = 1.4826


class Neighbourhood(NamedTuple):
  """What the nearest images say of N images.

  Attributes:
    typicality: [N] mean centred cosine of the ten nearest images that do not
      show the same photograph.
    is_outlier: [N] bool, whether that is unusually low.
    shares: [N, C] weight of each class among the neighbours that vote; zeros
      where none does.
    suspected: [N] the class that a label should rather be; `UNLABELLED` where
      there is no suspicion.
    margins: [N] by how much of the vote the suspected class is ahead.
  """

  typicality: np.ndarray
  is_outlier: np.ndarray
  shares: np.ndarray
  suspected: np.ndarray
  margins: np.ndarray


def _ranked(allowed: np.ndarray, most: int) -> np.ndarray:
  """[N, k] bool, the first `most` of those allowed in each row."""
  return allowed & (allowed.cumsum(1) <= most)


def _is_unusual(typicality: np.ndarray) -> np.ndarray:
  middle = np.median(typicality)
  spread = _MAD_TO_DEVIATION * np.median(np.abs(typicality - middle))
  return typicality < middle - _FAR * max(spread, 1e-6)


def _vote(
  nearest: Nearest, votes: np.ndarray, labels: np.ndarray, num_classes: int
) -> np.ndarray:
  """[N, C] weights of classes among the neighbours that vote [N, k]."""
  top = np.where(votes, nearest.similarities, -np.inf).max(1, keepdims=True)
  top = np.where(np.isfinite(top), top, 0)
  weights = np.where(
    votes, np.exp((nearest.similarities - top) / _TEMPERATURE), 0
  )
  shares = np.zeros((len(votes), num_classes))
  rows, columns = np.nonzero(votes)
  of_class = labels[nearest.rows[rows, columns]]
  np.add.at(shares, (rows, of_class), weights[rows, columns])
  return shares / np.maximum(shares.sum(1, keepdims=True), 1e-12)


def _suspect(
  shares: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Labels that neighbours contradict (Northcutt et al. 2021).

  Confident learning, with the neighbours' votes for probabilities: a class is
  believed where its share reaches the mean share that images with this label
  give it, so that classes which resemble each other are not suspected for it.
  """
  num_classes = shares.shape[1]
  suspected = np.full(len(labels), UNLABELLED)
  margins = np.zeros(len(labels))
  counts = np.bincount(labels[labels >= 0], minlength=num_classes)
  # A single image has no neighbour of its own class.
  judged = np.flatnonzero((labels >= 0) & (shares.sum(1) > 0))
  judged = judged[counts[labels[judged]] > 1]
  if not len(judged):
    return suspected, margins
  sums = np.bincount(
    labels[judged], shares[judged, labels[judged]], minlength=num_classes
  )
  means = np.where(counts > 1, sums / np.maximum(counts, 1), np.inf)
  believed = np.where(shares[judged] >= means, shares[judged], -1)
  believed[np.arange(len(judged)), labels[judged]] = -1
  other = believed.argmax(1)
  ahead = believed.max(1) - shares[judged, labels[judged]]
  wrong = (believed.max(1) > 0) & (ahead > 0)
  suspected[judged[wrong]] = other[wrong]
  margins[judged[wrong]] = ahead[wrong]
  return suspected, margins


def _shows_the_same(nearest: Nearest, duplicates: Duplicates) -> np.ndarray:
  """[N, k] bool, whether a neighbour is of the image's own group."""
  groups = duplicates.groups
  return (groups[nearest.rows] == groups[:, None]) & (
    groups[:, None] != NO_GROUP
  )


def look_around(
  by_cosine: Nearest, nearest: Nearest, duplicates: Duplicates, given: Labels
) -> Neighbourhood:
  """What the neighbours of N images say of them.

  Args:
    by_cosine: [N, k] of every image, without itself, by centred cosine, which
      says how typical it is.
    nearest: likewise, as `cmd-jax search` ranks them: of these more have the
      right label, for which they vote.
    duplicates: of these images: those of a group are no neighbours.
    given: their labels.
  """
  near = _ranked(~_shows_the_same(by_cosine, duplicates), _FOR_TYPICALITY)
  counted = np.maximum(near.sum(1), 1)
  typicality = np.where(near, by_cosine.similarities, 0).sum(1) / counted
  labels = given.labels
  differs = ~_shows_the_same(nearest, duplicates)
  votes = _ranked(differs & (labels[nearest.rows] >= 0), _FOR_VOTE)
  shares = _vote(nearest, votes, labels, len(given.class_names))
  suspected, margins = _suspect(shares, labels)
  return Neighbourhood(
    typicality, _is_unusual(typicality), shares, suspected, margins
  )
