"""Embeddings by what tells kinds apart rather than what varies within one.

The nearest neighbours of an embedding are mostly of its kind (without labels:
learned whitening of Mikolajczyk & Matas 2007 and Radenovic et al. 2018, whose
pairs are known to match). Directions along which such neighbours differ say
little, and are made shorter:

  C = mean over pairs of d d^T,   d = u_i - u_j,   u = x / |x|,
  y = (0.4 C + 0.6 tr(C)/D I)^(-1/2) u,

of which the mean is taken off. The constants were chosen on validation splits:
benchmarks/README.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from cmd_jax.evaluators.features import centred, unit_rows
from cmd_jax.evaluators.nearest import find_nearest

_NUM_NEIGHBOURS = 3
# Fewer say too little of how those of a kind differ: the smallest set that it
# was tried on has 230.
MIN_VECTORS = 200
# What of the covariance is replaced by a multiple of the identity, so that
# directions of which few pairs tell are not made long by chance.
_SHRINKAGE = 0.6


class Whitening(NamedTuple):
  """A linear map of unit vectors, and the mean of what it was learned of.

  Attributes:
    matrix: [D, D] float32, symmetric.
    mean: [D] float32, of the mapped unit vectors.
  """

  matrix: np.ndarray
  mean: np.ndarray

  def __call__(self, vectors: np.ndarray) -> np.ndarray:
    """Maps vectors [N, D] to unit vectors [N, D] float32."""
    return unit_rows(project(vectors, self.matrix) - self.mean)


def project(vectors: np.ndarray, matrix: np.ndarray) -> np.ndarray:
  """Unit vectors [N, D] float32 of which no mean is taken off.

  Args:
    vectors: [N, D].
    matrix: `Whitening.matrix`; its inverse takes unit vectors back.
  """
  return unit_rows(unit_rows(vectors) @ matrix)


def learn_whitening(vectors: np.ndarray) -> Whitening | None:
  """Learns from vectors that nothing is known of.

  Args:
    vectors: [N, D].

  Returns:
    The map; None for fewer than `MIN_VECTORS`, or where all are equal.
  """
  count, dim = vectors.shape
  if count < MIN_VECTORS:
    return None
  units = unit_rows(vectors)
  rows = find_nearest(units, units, _NUM_NEIGHBOURS, own=np.arange(count)).rows
  covariance = np.zeros((dim, dim))
  for column in rows.T:
    differences = (units - units[column]).astype(np.float64)
    covariance += differences.T @ differences
  covariance /= rows.size
  spread = np.trace(covariance) / dim
  if not spread > 0:
    return None
  variances, directions = np.linalg.eigh(covariance)
  shrunk = (1 - _SHRINKAGE) * np.maximum(variances, 0) + _SHRINKAGE * spread
  # In units of the mean deviation, so that nothing grows or shrinks as a whole.
  scale = np.sqrt(spread / shrunk)
  matrix = ((directions * scale) @ directions.T).astype(np.float32)
  return Whitening(matrix, project(units, matrix).mean(0))


def apart_in(gallery: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
  """How vectors are told apart among those of a gallery [N, D].

  Returns:
    [M, D] -> [M, D], to be compared by cosine: whitened, or centred where the
    gallery is too small for it.
  """
  learned = learn_whitening(gallery)
  if learned is not None:
    return learned
  return lambda vectors: centred(vectors, gallery)
