"""Candidates of a large index without looking at all of it: FAISS.

An inverted file (Sivic & Zisserman 2003; FAISS's IndexIVFScalarQuantizer): the
principal components of unit vectors around the mean of the day go to the
nearest of some thousand centroids and are kept there with 8 bits a number; a
query looks into the lists nearest to it. What it gives is only where to look:
candidates are compared anew by their full vectors around today's mean.
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
# Components that are kept: by the first 192 alone of 100,000 drawn vectors of
# 1,280 numbers, the forty nearest have 99.8 % of the ten nearest.
_COMPONENTS = 192
# Rows read at a time.
_BLOCK = 1 << 15
_SEED = 0


class Inverted(NamedTuple):
  """Inverted lists that are open.

  Attributes:
    index: FAISS's.
    mean: [D] that was taken off before.
    basis: [D, d] the directions of the components.
  """

  index: Any
  mean: np.ndarray
  basis: np.ndarray

  def project(self, vectors: np.ndarray) -> np.ndarray:
    """[M, d] components of embeddings [M, D] as they are."""
    return unit_rows(vectors - self.mean) @ self.basis

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
    return self.index.search(self.project(queries), count)[1]


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
  count, lists = len(vectors), num_lists(len(vectors))
  rng = np.random.default_rng(_SEED)
  rows = rng.choice(count, min(count, _TRAINED_ON * lists), replace=False)
  # In order, as they are read from a disk.
  rows = np.sort(rows)
  few = rows[:: -(-len(rows) // _BLOCK)]
  basis = _components(unit_rows(vectors[few] - mean))
  dim = basis.shape[1]
  index = faiss.IndexIVFScalarQuantizer(
    faiss.IndexFlatIP(dim),
    dim,
    lists,
    faiss.ScalarQuantizer.QT_8bit,
    faiss.METRIC_INNER_PRODUCT,
  )
  index.cp.niter, index.cp.seed, index.cp.spherical = _ITERATIONS, _SEED, True
  index.cp.min_points_per_centroid = 1
  inverted = Inverted(index, mean, basis)
  index.train(
    np.concatenate(
      [
        inverted.project(vectors[rows[start : start + _BLOCK]])
        for start in range(0, len(rows), _BLOCK)
      ]
    )
  )
  for start in range(0, count, _BLOCK):
    index.add(inverted.project(vectors[start : start + _BLOCK]))
  return inverted


def _components(sample: np.ndarray) -> np.ndarray:
  """[D, d] the directions in which unit vectors [M, D] vary most."""
  _, directions = np.linalg.eigh((sample.T @ sample).astype(np.float64))
  kept = directions[:, ::-1][:, :_COMPONENTS]
  return np.ascontiguousarray(kept, np.float32)


def save_lists(path: pathlib.Path, lists: Inverted) -> None:
  """Writes lists, mean and basis in one file, whole or not at all."""
  faiss = load_faiss()
  unfinished = path.with_name(f'.{path.name}.{os.getpid()}')
  try:
    faiss.write_index(lists.index, str(unfinished))
    with open(unfinished, 'ab') as file:
      for array in (lists.mean, lists.basis):
        file.write(np.ascontiguousarray(array, '<f4').tobytes())
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
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    # Behind what FAISS reads.
    shape = (1 + index.d, dim)
    size = 4 * shape[0] * shape[1]
    with open(path, 'rb') as file:
      file.seek(-size, os.SEEK_END)
      tail = np.frombuffer(file.read(), '<f4')
    mean, basis = tail[:dim], tail[dim:].reshape(dim, index.d)
  # FAISS raises RuntimeError for all that it cannot read.
  except (OSError, RuntimeError, ValueError) as error:
    raise UserError(
      f'{path} is damaged ({one_line(error, 120)}): build the index again'
    ) from error
  return Inverted(index, mean, basis)
