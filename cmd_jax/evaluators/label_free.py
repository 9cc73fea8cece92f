"""What embeddings say of an encoder without any label."""

from __future__ import annotations

import numpy as np

from cmd_jax.evaluators.nearest import find_nearest

# Added to every share of the spectrum, as published.
_EPSILON = 1e-7


def rankme(vectors: np.ndarray) -> float:
  """The effective rank of embeddings, RankMe.

  exp(-sum_k p_k log p_k) with p_k = sigma_k / sum_j sigma_j + 1e-7 of the
  singular values sigma of the embeddings as they are, neither centred nor
  normalised (Garrido et al. 2023, RankMe, equation 1; Roy and Vetterli 2007).

  Args:
    vectors: [N, D], finite.

  Returns:
    From 1, where all have one direction, to min(N, D).
  """
  vectors = np.asarray(vectors, np.float64)
  if len(vectors) < vectors.shape[1]:
    vectors = vectors.T
  # Of the smaller product: a fraction of the time of all singular vectors.
  squares = np.linalg.eigvalsh(vectors.T @ vectors)
  values = np.sqrt(np.maximum(squares, 0))
  if not values.sum():
    return 1.0
  shares = values / values.sum() + _EPSILON
  return float(np.exp(-np.sum(shares * np.log(shares))))


def nearest_neighbours(vectors: np.ndarray) -> np.ndarray:
  """The row of the nearest other vector by cosine similarity.

  Args:
    vectors: [N, D].

  Returns:
    [N] int32; [0] where there is a single vector.
  """
  found = find_nearest(vectors, vectors, 1, own=np.arange(len(vectors)))
  return found.rows[:, 0] if found.rows.size else np.zeros(0, np.int32)
