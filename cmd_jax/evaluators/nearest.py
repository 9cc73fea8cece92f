"""The nearest neighbours of vectors by cosine similarity, exactly."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.evaluators.features import in_chunks, unit_rows

# Entries of the matrix of similarities held at once: 32 MB.
MAX_SIMILARITIES = 2**23


class Nearest(NamedTuple):
  """The nearest gallery vectors of Q queries, the nearest first.

  Attributes:
    rows: [Q, k] int32 rows of the gallery.
    similarities: [Q, k] float32 cosines.
  """

  rows: np.ndarray
  similarities: np.ndarray


def find_nearest(
  queries: np.ndarray,
  gallery: np.ndarray,
  k: int,
  *,
  own: np.ndarray | None = None,
  max_similarities: int = MAX_SIMILARITIES,
) -> Nearest:
  """Finds the k gallery vectors of highest cosine similarity, on the device.

  Queries come in blocks, so the whole matrix of similarities never exists.

  Args:
    queries: [Q, D].
    gallery: [N, D].
    k: neighbours; fewer where the gallery has fewer.
    own: [Q] row of the query itself in the gallery, which is no neighbour of
      its own; -1 where it is not in it. None: no query is in the gallery.
    max_similarities: entries of the similarity matrix held at once; bounds the
      memory (a few times 4 bytes each), doesn't change the result.

  Returns:
    The neighbours of each query; of equally similar ones the first.
  """
  if own is None:
    own = np.full(len(queries), -1)
  k = min(k, len(gallery) - bool((own >= 0).any()))
  if k < 1 or not len(queries):
    return Nearest(
      np.zeros((len(queries), 0), np.int32),
      np.zeros((len(queries), 0), np.float32),
    )
  chunk = min(max(max_similarities // len(gallery), 1), len(queries))
  top = functools.partial(_top, jax.device_put(unit_rows(gallery)), k=k)
  return Nearest(
    *in_chunks(top, chunk, unit_rows(queries), own.astype(np.int32))
  )


@functools.partial(jax.jit, static_argnames='k')
def _top(
  gallery: jax.Array, queries: jax.Array, own: jax.Array, *, k: int
) -> tuple[jax.Array, jax.Array]:
  similarities = jnp.matmul(
    queries, gallery.T, precision=jax.lax.Precision.HIGHEST
  )
  is_own = jnp.arange(len(gallery)) == own[:, None]
  # Below all cosines.
  similarities = jnp.where(is_own, -2.0, similarities)
  # Both are returned whole: where a part alone is used, XLA on CPU sorts all
  # similarities, which took 17 times as long.
  similarities, rows = jax.lax.top_k(similarities, k)
  return rows, similarities
