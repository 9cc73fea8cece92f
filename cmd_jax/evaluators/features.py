"""Frozen features: how they are computed, checked and compared."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tqdm

from cmd_jax.errors import UserError

# Batches that may be under way on the device before the oldest is fetched: the
# host slices and uploads the next ones while the device computes.
_IN_FLIGHT = 3


class Features(NamedTuple):
  """The features of one split.

  Attributes:
    vectors: [N, D] float32, as the encoder gives them (not normalised).
    labels: [N] int32 index into `class_names`, -1 where unknown.
    class_names: names of the classes; empty where there are no labels.
    file_names: [N] names of the examples.
  """

  vectors: np.ndarray
  labels: np.ndarray
  class_names: tuple[str, ...]
  file_names: tuple[str, ...]

  def take(self, rows: np.ndarray) -> Features:
    """The features of the given rows alone."""
    return self._replace(
      vectors=self.vectors[rows],
      labels=self.labels[rows],
      file_names=tuple(self.file_names[row] for row in rows),
    )


def extract(
  encode: Callable[[np.ndarray, np.ndarray], Any],
  images: np.ndarray,
  sizes: np.ndarray,
  *,
  batch_size: int = 256,
  dtype: type = np.float32,
  progress: bool = False,
) -> np.ndarray:
  """Encodes all images of a split.

  Every call of `encode` has the same shapes, so a jitted one compiles once: the
  last batch is filled up with copies of its last image, whose features are
  dropped.

  Args:
    encode: maps canvases [B, R, R, 3] uint8 and sizes [B, 2] int32 to features
      [B, ...]; jitted by the caller.
    images: [N, R, R, 3] uint8 canvases; anything that slices like an array.
    sizes: [N, 2] int32 true height and width in pixels.
    batch_size: images in a call of `encode`.
    dtype: of the result.
    progress: shows a progress bar on stderr where it takes long.

  Returns:
    [N, ...] features in the order of `images`.

  Raises:
    UserError: there are no images.
    ValueError: `batch_size` isn't positive, `images` and `sizes` differ in
      length, or `encode` doesn't give B rows.
  """
  count = len(images)
  if count == 0:
    raise UserError('features: the split has no images; give it at least one')
  if batch_size < 1:
    raise ValueError(f'batch_size must be positive, got {batch_size}')
  if len(sizes) != count:
    raise ValueError(f'{count} images but {len(sizes)} sizes')

  features = None
  pending = collections.deque()

  def fetch() -> None:
    nonlocal features
    first, block = pending.popleft()
    if features is None:
      # Once, at full length: maps of all images are the largest array of all.
      features = np.empty((count, *block.shape[1:]), dtype)
    rows = features[first : first + batch_size]
    rows[:] = np.asarray(block)[: len(rows)].astype(dtype)

  with tqdm.tqdm(
    total=count, desc='encode', unit='image', disable=not progress, delay=2
  ) as bar:
    for start in range(0, count, batch_size):
      canvases = np.asarray(images[start : start + batch_size])
      kept = len(canvases)
      block = encode(
        _fill_up(canvases, batch_size),
        _fill_up(
          np.asarray(sizes[start : start + batch_size], np.int32), batch_size
        ),
      )
      if block.shape[:1] != (batch_size,):
        raise ValueError(
          f'encode must give [{batch_size}, ...], got {tuple(block.shape)}'
        )
      pending.append((start, block))
      if len(pending) == _IN_FLIGHT:
        fetch()
      bar.update(kept)
    while pending:
      fetch()
  return features


def usable(
  protocol: str, train: Features, test: Features
) -> tuple[Features, Features]:
  """Drops unlabelled rows and refuses what can't be scored.

  Args:
    protocol: name of the protocol, for messages.
    train: features that the protocol fits or searches.
    test: features that it scores.

  Returns:
    `train` and `test` without the rows labelled -1, float32 and int32.

  Raises:
    UserError: a split without labels, splits that name different classes, or
      features that aren't finite.
    ValueError: the arrays' shapes don't fit together.
  """
  train = _labelled(protocol, 'train', train)
  test = _labelled(protocol, 'test', test)
  if train.vectors.shape[1] != test.vectors.shape[1]:
    raise ValueError(
      f'{protocol}: train has {train.vectors.shape[1]} features, '
      f'test {test.vectors.shape[1]}'
    )
  if train.class_names != test.class_names:
    raise UserError(
      f'{protocol}: train and test name different classes; give both splits '
      'the same list of classes in the same order'
    )
  return train, test


def unit_rows(vectors: np.ndarray) -> np.ndarray:
  """l2-normalises every row; a row of zeros stays one.

  Args:
    vectors: [N, D].

  Returns:
    [N, D] float32.
  """
  # float64: the squares of large float32 features would overflow.
  vectors = vectors.astype(np.float64)
  norms = np.linalg.norm(vectors, axis=1, keepdims=True)
  return (vectors / np.maximum(norms, 1e-12)).astype(np.float32)


def centred(vectors: np.ndarray, around: np.ndarray) -> np.ndarray:
  """Vectors less the mean of others.

  Features in a narrow cone have cosines near 1; what they differ in, the
  cosines of the rest show.

  Args:
    vectors: [M, D].
    around: [N, D] whose mean is taken off.

  Returns:
    [M, D] float32; zeros where all are alike.
  """
  mean = around.mean(axis=0, dtype=np.float64).astype(np.float32)
  return vectors.astype(np.float32) - mean


def principal_components(vectors: np.ndarray, count: int) -> np.ndarray:
  """Projects vectors on the directions in which they vary most.

  Args:
    vectors: [N, D].
    count: components wanted; fewer where D is smaller.

  Returns:
    [N, count] float32, each component's largest entry positive.
  """
  centred = vectors.astype(np.float64) - vectors.mean(0)
  _, directions = np.linalg.eigh(centred.T @ centred)
  components = centred @ directions[:, ::-1][:, :count]
  # The sign of an eigenvector is arbitrary; the same ones must come out.
  largest = np.abs(components).argmax(0)
  signs = np.sign(components[largest, np.arange(components.shape[1])])
  return (components * np.where(signs, signs, 1)).astype(np.float32)


def in_chunks(
  fn: Callable[..., tuple[Any, ...]], chunk: int, *arrays: np.ndarray
) -> tuple[np.ndarray, ...]:
  """Applies a row-wise function to chunks of rows, all of one size.

  Args:
    fn: maps [chunk, ...] arrays to a tuple of [chunk, ...] arrays, each row by
      itself; jitted by the caller, it compiles once.
    chunk: rows in a call; the last call is filled up with copies of the last
      row, whose results are dropped.
    *arrays: each [N, ...], N at least 1.

  Returns:
    What `fn` returns, concatenated over the N rows.
  """
  count = len(arrays[0])
  blocks = []
  for start in range(0, count, chunk):
    kept = min(chunk, count - start)
    results = fn(*(_fill_up(a[start : start + kept], chunk) for a in arrays))
    blocks.append([np.asarray(result)[:kept] for result in results])
  return tuple(np.concatenate(column) for column in zip(*blocks))


def _fill_up(rows: np.ndarray, count: int) -> np.ndarray:
  missing = count - len(rows)
  if missing == 0:
    return rows
  return np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)])


def _labelled(protocol: str, split: str, features: Features) -> Features:
  vectors = np.asarray(features.vectors, np.float32)
  labels = np.asarray(features.labels, np.int32)
  if vectors.ndim != 2 or labels.shape != vectors.shape[:1]:
    raise ValueError(
      f'{protocol}: {split} must have vectors [N, D] and labels [N], got '
      f'{vectors.shape} and {labels.shape}'
    )
  rows = np.flatnonzero(labels >= 0)
  if rows.size == 0:
    raise UserError(
      f'{protocol}: the {split} split has no labels; label some of its images '
      'or leave this protocol out'
    )
  names = features.class_names
  if labels.max() >= len(names):
    raise ValueError(
      f'{protocol}: {split} has label {labels.max()} but only '
      f'{len(names)} class names'
    )
  vectors = vectors[rows]
  broken = int(np.sum(~np.isfinite(vectors).all(axis=1)))
  if broken:
    raise UserError(
      f'{protocol}: {broken} of {rows.size} {split} images have features that '
      'are not finite; use an earlier checkpoint or lower the learning rate'
    )
  file_names = features.file_names
  if len(rows) < len(labels):
    file_names = tuple(file_names[i] for i in rows)
  return Features(vectors, labels[rows], names, file_names)
