"""Finds copies and near duplicates among canvases.

Near duplicates are found by a 64-bit perceptual hash and made sure of by
comparing small grey pictures: the hash alone takes birds on a plain background
for each other.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tqdm
from PIL import Image

from cmd_jax.data.channels import as_pictures

# Chosen on photographs, see docs/datasets.md.
MAX_DISTANCE = 10
MIN_CORRELATION = 0.9
# Grey levels; below it an image shows nothing that could be compared.
MIN_CONTRAST = 2.0

_GREY_PX = 32
_THUMB_PX = 16
_NUM_BITS = 64
_BLOCK = 64
# Pairs compared at a time, and thumbnails.
_PAIRS, _CHUNK = 1 << 22, 1 << 14
# All pairs of this many hashes are compared in a second or two.
_ALL_PAIRS_UP_TO = 20_000
# Hashes that differ in 10 bits agree in 3 of 13 bands.
_NUM_BANDS = MAX_DISTANCE + 3
_BANDS_AGREEING = _NUM_BANDS - MAX_DISTANCE


class Prints(NamedTuple):
  """Fingerprints of N images.

  Attributes:
    hashes: [N] uint64 perceptual hashes.
    thumbs: [N, 256] uint8 grey pictures of 16 x 16 pixels.
    is_flat: [N] bool, whether an image is of nearly one colour.
  """

  hashes: np.ndarray
  thumbs: np.ndarray
  is_flat: np.ndarray


@functools.cache
def _frequencies() -> tuple[np.ndarray, np.ndarray]:
  """DCT-II basis [K, 32], and the flat indices of the 64 lowest of [K, K]."""
  # With K = 11 there are 65 coefficients u + v <= 10 besides the mean.
  count = 11
  u = np.arange(count)
  basis = np.cos(np.pi * u[:, None] * (2 * np.arange(_GREY_PX) + 1) / 64)
  order = np.lexsort((np.repeat(u, count), np.add.outer(u, u).ravel()))
  return basis.astype(np.float32), order[1 : 1 + _NUM_BITS]


def _print_block(canvases: np.ndarray) -> Prints:
  grey = np.stack(
    [
      Image.fromarray(canvas)
      .resize((_GREY_PX, _GREY_PX), Image.Resampling.BOX, reducing_gap=1.0)
      .convert('L')
      for canvas in canvases
    ]
  ).astype(np.float32)
  basis, chosen = _frequencies()
  coefficients = (basis @ grey @ basis.T).reshape(len(grey), -1)
  bits = np.packbits(coefficients[:, chosen] > 0).reshape(-1, 8)
  quarters = grey.reshape(len(grey), _THUMB_PX, 2, _THUMB_PX, 2).mean((2, 4))
  thumbs = np.rint(quarters).astype(np.uint8).reshape(len(grey), -1)
  return Prints(
    bits.view(np.uint64).ravel(),
    thumbs,
    quarters.std((1, 2)) < MIN_CONTRAST,
  )


def make_prints(
  images: Sequence[np.ndarray],
  rows: np.ndarray | None = None,
  *,
  progress: bool | None = None,
) -> Prints:
  """Makes the fingerprints of canvases.

  A bit of the hash is the sign of one of the 64 lowest coefficients of the
  discrete cosine transform of the canvas in grey at 32 x 32 pixels, without
  the mean. Brightness and contrast leave signs as they are.

  Args:
    images: [M, R, R, 3] uint8 canvases, sliced by blocks of rows.
    rows: [N] rows to look at; None for all.
    progress: whether to show a progress bar on stderr once a second has passed;
      by default if stderr is a terminal.

  Returns:
    Fingerprints of the N rows.
  """
  rows = np.arange(len(images)) if rows is None else rows
  starts = tqdm.tqdm(
    range(0, len(rows), _BLOCK),
    desc='looking for duplicates',
    disable=None if progress is None else not progress,
    delay=1,
    leave=False,
  )
  blocks = [
    _print_block(as_pictures(np.asarray(images[rows[start : start + _BLOCK]])))
    for start in starts
  ]
  empty = Prints(
    np.empty(0, np.uint64),
    np.empty((0, _THUMB_PX**2), np.uint8),
    np.empty(0, bool),
  )
  return join_prints([empty, *blocks])


def join_prints(parts: Sequence[Prints]) -> Prints:
  """Puts fingerprints behind each other."""
  return Prints(*(np.concatenate(field) for field in zip(*parts)))


def _same_runs(values: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields all pairs of positions of a sorted array that have equal values."""
  first = np.arange(len(values) - 1)
  for distance in range(1, len(values)):
    first = first[first + distance < len(values)]
    first = first[values[first] == values[first + distance]]
    if not len(first):
      return
    yield first, first + distance


def _pairs_of_block(
  hashes: np.ndarray,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields all pairs that are near by their hash, comparing all with all."""
  size = max(1, _PAIRS // max(1, len(hashes)))
  for start in range(0, len(hashes), size):
    here = hashes[start : start + size, None]
    near = np.bitwise_count(here ^ hashes[start:]) <= MAX_DISTANCE
    i, j = np.nonzero(near)
    later = j > i
    yield i[later] + start, j[later] + start


def _pairs_by_bands(
  hashes: np.ndarray, progress: bool | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields the same pairs, each once, comparing those that share bands.

  Multi-index hashing (Norouzi et al., CVPR 2012, section 3, with several exact
  bands in place of one band searched within a radius): of 13 bands, 10 bits
  that differ leave at least 3 as they are.
  """
  edges = np.linspace(0, _NUM_BITS, _NUM_BANDS + 1).round().astype(int)
  masks = [
    sum(1 << bit for bit in range(low, high))
    for low, high in itertools.pairwise(edges.tolist())
  ]
  tables = tqdm.tqdm(
    list(itertools.combinations(range(len(masks)), _BANDS_AGREEING)),
    desc='comparing images',
    disable=None if progress is None else not progress,
    delay=1,
    leave=False,
  )
  for chosen in tables:
    keys = hashes & np.uint64(sum(masks[band] for band in chosen))
    passed = [
      np.uint64(masks[band]) for band in range(chosen[-1]) if band not in chosen
    ]
    order = np.argsort(keys)
    ordered = hashes[order]
    for i, j in _same_runs(keys[order]):
      differing = ordered[i] ^ ordered[j]
      near = np.bitwise_count(differing) <= MAX_DISTANCE
      for mask in passed:
        # Else an earlier table has this pair.
        near &= (differing & mask) != 0
      a, b = order[i[near]], order[j[near]]
      yield np.minimum(a, b), np.maximum(a, b)


def correlation(thumbs: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
  """Correlates the pixels of pairs of thumbnails, none of which is flat.

  Args:
    thumbs: [N, 256] uint8 thumbnails.
    i: [P] rows of the first of each pair.
    j: [P] rows of the second.

  Returns:
    [P] float32 in [-1, 1].
  """
  a, b = (thumbs[rows].astype(np.float32) for rows in (i, j))
  a -= a.mean(1, keepdims=True)
  b -= b.mean(1, keepdims=True)
  norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
  return np.einsum('np,np->n', a, b) / norms


def near_pairs(
  prints: Prints, *, progress: bool | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields the pairs of images that are nearly the same.

  Their hashes differ in at most `MAX_DISTANCE` bits and their thumbnails have
  a correlation above `MIN_CORRELATION`. Flat images are left out.

  Args:
    prints: of N images, best of different ones: the time grows with the square
      of the number of near duplicates.
    progress: as for `make_prints`.

  Yields:
    [P] and [P] rows, the first of each pair before the second. A pair may come
    more than once.
  """
  rows = np.flatnonzero(~prints.is_flat)
  hashes = prints.hashes[rows]
  if len(rows) <= _ALL_PAIRS_UP_TO:
    candidates = _pairs_of_block(hashes)
  else:
    candidates = _pairs_by_bands(hashes, progress)
  for i, j in candidates:
    for start in range(0, len(i), _CHUNK):
      a, b = (rows[x[start : start + _CHUNK]] for x in (i, j))
      near = correlation(prints.thumbs, a, b) > MIN_CORRELATION
      if near.any():
        yield a[near], b[near]


def first_copies(
  prints: Prints, read: Callable[[int], np.ndarray]
) -> np.ndarray:
  """Finds canvases that are the same byte for byte.

  Args:
    prints: of N images; only those with the same fingerprint are compared.
    read: row -> its canvas [R, R, 3].

  Returns:
    [N] row of the first image with the same canvas, its own if there is none
    before it.
  """
  owner = np.arange(len(prints.hashes))
  order = np.argsort(prints.hashes, kind='stable')
  for run in np.split(order, np.flatnonzero(np.diff(prints.hashes[order])) + 1):
    if len(run) > 1:
      seen: dict[bytes, int] = {}
      for row in run.tolist():
        canvas = np.ascontiguousarray(read(row))
        owner[row] = seen.setdefault(
          hashlib.blake2b(canvas, digest_size=16).digest(), row
        )
  return owner
