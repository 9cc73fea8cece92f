"""A map on which photographs with like features lie close to each other."""

from __future__ import annotations

import sys
from typing import NamedTuple

import numpy as np
import tqdm

from cmd_jax.errors import missing_extra
from cmd_jax.evaluators.features import principal_components, unit_rows

_NUM_COMPONENTS = 50
_PERPLEXITY = 30
# Too few photographs have no neighbourhoods to keep.
_MIN_IMAGES = 20
_SEED = 0


class Map(NamedTuple):
  """Where each photograph lies.

  Attributes:
    method: 't-SNE' or 'PCA'.
    points: [N, 2] float32 in [0, 1], the larger extent filling it.
    note: what a reader should know; empty if nothing.
  """

  method: str
  points: np.ndarray
  note: str = ''


def _fill_square(points: np.ndarray) -> np.ndarray:
  low, high = points.min(0), points.max(0)
  extent = max(float((high - low).max()), 1e-12)
  return ((points - (low + high) / 2) / extent + 0.5).astype(np.float32)


def _tsne(components: np.ndarray) -> np.ndarray:
  """[N, 2] by t-SNE, the same for the same components."""
  from openTSNE import TSNE

  iterations = {'early_exaggeration_iter': 250, 'n_iter': 500}
  every = 10
  with tqdm.tqdm(
    total=sum(iterations.values()),
    desc='t-SNE',
    file=sys.stderr,
    disable=None,
    leave=False,
  ) as bar:

    def show_progress(iteration, error, embedding):
      del iteration, error, embedding
      bar.update(every)

    points = TSNE(
      perplexity=min(_PERPLEXITY, (len(components) - 1) / 3),
      random_state=_SEED,
      n_jobs=1,
      callbacks=show_progress,
      callbacks_every_iters=every,
      **iterations,
    ).fit(components)
  return np.asarray(points)


def make_map(vectors: np.ndarray) -> Map:
  """Lays photographs out by the cosine similarity of their features.

  t-SNE (van der Maaten & Hinton 2008; openTSNE's, Barnes-Hut or from 10,000
  points on FFT-accelerated) of the first 50 principal components of unit
  vectors, started from the first two; these alone where openTSNE is not
  installed or there are few photographs.

  Args:
    vectors: [N, D] features.

  Returns:
    The map.
  """
  components = principal_components(unit_rows(vectors), _NUM_COMPONENTS)
  flat = np.zeros((len(vectors), 2), np.float32)
  flat[:, : components.shape[1]] = components[:, :2]
  if len(vectors) < _MIN_IMAGES:
    return Map('PCA', _fill_square(flat))
  try:
    points = _tsne(components)
  except ImportError:
    note = str(missing_extra('t-SNE needs openTSNE', 'report'))
    return Map('PCA', _fill_square(flat), note)
  return Map('t-SNE', _fill_square(points))
