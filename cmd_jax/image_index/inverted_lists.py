"""Candidates of a large index without looking at all of it: FAISS.

An inverted file (Sivic & Zisserman 2003; FAISS's IndexIVFScalarQuantizer): unit
vectors around the mean of the day go to the nearest of some thousand centroids
and are kept there with 8 bits a number; a query looks into the lists nearest to
it. What it gives is only where to look: candidates are compared anew by their
full vectors around today's mean.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from cmd_jax.errors import UserError, missing_extra
from cmd_jax.evaluators.features import unit_rows
from cmd_jax.files.safe_read import one_line

# Vectors that k-means looks at, for each of its centroids.
_TRAINED_ON = 64
_ITERATIONS = 10
# Rows read at a time.
_BLOCK = 1 << 15
_SEED = 0


class Inverted(NamedTuple):
  """Inverted lists that are open.

  Attributes:
    index: FAISS's.
    mean: [D] that was taken off before.
  """

  index: Any
  mean: np.ndarray

  def candidates(
    self, queries: np.ndarray, count: int, probes: int
  ) -> np.ndarray:
    """[Q, count] rows of which the nearest should be some, -1 for none.

    Args:
      queries: [Q, D] embeddings as they are.
      count: candidates a query.
      probes: lists that are looked at.
    """
    self.index.nprobe = probes
    return self.index.search(unit_rows(queries - self.mean), count)[1]


def load_faiss() -> Any:
  """FAISS.

  Raises:
    UserError: it is not installed.
  """
  try:
    import faiss
  except ImportError as error:
    raise missing_extra(
      'searching a large index by its lists needs FAISS', 'faiss'
    ) from error
  return faiss


def num_lists(count: int) -> int:
  """How many lists so many rows get: four times the root, a power of two."""
  return 1 << max(round(np.log2(4 * count**0.5)), 0)


def make_lists(vectors: np.ndarray, mean: np.ndarray) -> Inverted:
  """Sorts vectors into lists.

  Args:
    vectors: [N, D], read block by block.
    mean: [D] that is taken off.

  Raises:
    UserError: FAISS is not installed.
  """
  faiss = load_faiss()
  count, dim = vectors.shape
  lists = num_lists(count)
  index = faiss.IndexIVFScalarQuantizer(
    faiss.IndexFlatIP(dim),
    dim,
    lists,
    faiss.ScalarQuantizer.QT_8bit,
    faiss.METRIC_INNER_PRODUCT,
  )
  index.cp.niter, index.cp.seed, index.cp.spherical = _ITERATIONS, _SEED, True
  index.cp.min_points_per_centroid = 1
  rng = np.random.default_rng(_SEED)
  rows = rng.choice(count, min(count, _TRAINED_ON * lists), replace=False)
  # In order, as they are read from a disk.
  index.train(unit_rows(vectors[np.sort(rows)] - mean))
  for start in range(0, count, _BLOCK):
    index.add(unit_rows(vectors[start : start + _BLOCK] - mean))
  return Inverted(index, mean)


def save_lists(path: pathlib.Path, lists: Inverted) -> None:
  """Writes lists, and their mean beside them, whole or not at all."""
  faiss = load_faiss()
  unfinished = path.with_name(f'.{path.name}.{os.getpid()}')
  try:
    faiss.write_index(lists.index, str(unfinished))
    with open(unfinished, 'ab') as file:
      file.write(np.ascontiguousarray(lists.mean, '<f4').tobytes())
      file.flush()
      os.fsync(file.fileno())
    os.replace(unfinished, path)
  finally:
    unfinished.unlink(missing_ok=True)


def open_lists(path: pathlib.Path, dim: int) -> Inverted:
  """Opens lists, memory-mapped.

  Raises:
    UserError: FAISS is not installed, or the file is damaged.
  """
  faiss = load_faiss()
  try:
    # Behind what FAISS reads.
    mean = np.memmap(
      path,
      '<f4',
      mode='r',
      offset=os.path.getsize(path) - 4 * dim,
      shape=(dim,),
    )
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
  # FAISS raises RuntimeError for all that it cannot read.
  except (OSError, RuntimeError, ValueError) as error:
    raise UserError(
      f'{path} is damaged ({one_line(error, 120)}): build the index again'
    ) from error
  return Inverted(index, np.array(mean))
