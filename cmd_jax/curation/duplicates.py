"""Images that show the same photograph, or nearly: pairs and groups."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import tqdm

from cmd_jax.curation.crops import find_part
from cmd_jax.curation.photographs import Photographs
from cmd_jax.data.inspect import near_duplicates
from cmd_jax.evaluators.nearest import Nearest

# From the surest on; a pair has the first that is true of it.
KINDS = ('copy', 'near copy', 'mirrored', 'crop', 'mirrored crop', 'alike')
COPY, NEAR, MIRRORED, CROP, MIRRORED_CROP, ALIKE = range(len(KINDS))
# Centred cosine from which on the embedding alone calls two images alike.
ALIKE_FROM = 0.95
# Pairs that the embedding finds this alike are looked at for crops.
_CROP_FROM = 0.4
_CROP_CANDIDATES = 10
_MIN_CORRELATION = 0.93
NO_GROUP = -1


class Duplicates(NamedTuple):
  """The pairs of N images that show the same, and their groups.

  Attributes:
    pairs: [P, 2] rows, the first before the second, sorted.
    kinds: [P] index into `KINDS`.
    similarities: [P] float32 centred cosines.
    groups: [N] number of the group, the largest first; `NO_GROUP` for an image
      without a pair.
    kept: [N] row of the image of its group that has the most pixels, the one to
      keep; of an image without a pair its own.
  """

  pairs: np.ndarray
  kinds: np.ndarray
  similarities: np.ndarray
  groups: np.ndarray
  kept: np.ndarray

  @property
  def is_spare(self) -> np.ndarray:
    """[N] bool, whether the same is shown by another image that is kept."""
    return self.kept != np.arange(len(self.kept))

  @property
  def surest(self) -> np.ndarray:
    """[N] the surest kind of an image's pairs; `len(KINDS)` without a pair."""
    found = np.full(len(self.kept), len(KINDS))
    for column in self.pairs.T:
      np.minimum.at(found, column, self.kinds)
    return found


class _Found:
  """Pairs found so far, each of its surest kind."""

  def __init__(self) -> None:
    self.kind_of: dict[tuple[int, int], int] = {}

  def add(self, i: int, j: int, kind: int) -> None:
    pair = (min(i, j), max(i, j))
    if i != j:
      self.kind_of[pair] = min(kind, self.kind_of.get(pair, kind))


def _add_copies(found: _Found, photographs: Photographs) -> None:
  first: dict[bytes, int] = {}
  for row, digest in enumerate(photographs.digests):
    if photographs.prints.is_flat[row]:
      # One white page is like another.
      continue
    found.add(first.setdefault(digest, row), row, COPY)


def _distinct(photographs: Photographs) -> np.ndarray:
  """[U] the first row of every canvas: the rest are copies."""
  rows: dict[bytes, int] = {}
  for row, digest in enumerate(photographs.digests):
    rows.setdefault(digest, row)
  return np.fromiter(rows.values(), int)


def _add_by_hash(found: _Found, photographs: Photographs) -> None:
  rows = _distinct(photographs)
  count = len(rows)
  images, mirrored = (
    near_duplicates.Prints(*(field[rows] for field in prints))
    for prints in (photographs.prints, photographs.mirrored)
  )
  both = near_duplicates.join_prints([images, mirrored])
  for i, j in near_duplicates.near_pairs(both):
    for a, b in zip(i.tolist(), j.tolist()):
      # Of two mirrored ones the images themselves are a pair.
      if a < count:
        kind = NEAR if b < count else MIRRORED
        found.add(int(rows[a]), int(rows[b % count]), kind)


def _add_by_embedding(
  found: _Found, photographs: Photographs, nearest: Nearest, alike_from: float
) -> None:
  """Crops among each image's nearest, and what is alike by embedding alone."""
  candidates = set()
  for row, (others, similarities) in enumerate(zip(*nearest)):
    for rank, (other, similarity) in enumerate(zip(others, similarities)):
      pair = (min(row, int(other)), max(row, int(other)))
      if similarity >= alike_from:
        found.add(*pair, ALIKE)
      if similarity >= _CROP_FROM and rank < _CROP_CANDIDATES:
        candidates.add(pair)
  candidates = [p for p in sorted(candidates) if found.kind_of.get(p, 9) > CROP]
  for i, j in tqdm.tqdm(
    candidates, 'looking for crops', delay=1, leave=False, disable=None
  ):
    for whole, part in ((i, j), (j, i)):
      match = find_part(
        photographs.greys[whole],
        photographs.greys[part],
        photographs.sizes[whole],
        photographs.sizes[part],
      )
      if match.correlation >= _MIN_CORRELATION:
        found.add(i, j, MIRRORED_CROP if match.is_mirrored else CROP)


def _components(count: int, pairs: np.ndarray) -> np.ndarray:
  """[N] the first row that each image is connected with."""
  parent = np.arange(count)

  def root(row: int) -> int:
    while parent[row] != row:
      parent[row] = parent[parent[row]]
      row = int(parent[row])
    return row

  for i, j in pairs.tolist():
    a, b = sorted((root(i), root(j)))
    parent[b] = a
  return np.array([root(row) for row in range(count)], int)


def _groups(
  first: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Numbers of the groups, and the row kept, from the first row of each."""
  members = np.bincount(first, minlength=len(first))
  heads = np.flatnonzero(members > 1)
  heads = heads[np.argsort(-members[heads], kind='stable')]
  groups = np.full(len(first), NO_GROUP)
  kept = np.arange(len(first))
  pixels = sizes.astype(np.int64).prod(1)
  order = np.argsort(first, kind='stable')
  starts = np.searchsorted(first[order], heads)
  for number, (head, start) in enumerate(zip(heads, starts)):
    rows = order[start : start + members[head]]
    groups[rows] = number
    kept[rows] = rows[pixels[rows].argmax()]
  return groups, kept


def find_duplicates(
  photographs: Photographs, nearest: Nearest, alike_from: float = ALIKE_FROM
) -> Duplicates:
  """Finds the images that show the same.

  Copies have the same pixels on the canvas; near copies and mirrored ones the
  same perceptual hash, but for `near_duplicates.MAX_DISTANCE` bits, and
  thumbnails that agree; a crop, mirrored or not, lies somewhere in the other
  image; and what is only alike has embeddings of a cosine of `alike_from` or
  more. Images of one colour have no copies.

  Args:
    photographs: N images.
    nearest: of every image, without itself, by centred cosine.
    alike_from: centred cosine in [-1, 1].
  """
  found = _Found()
  _add_copies(found, photographs)
  _add_by_hash(found, photographs)
  _add_by_embedding(found, photographs, nearest, alike_from)
  pairs = np.array(sorted(found.kind_of), int).reshape(-1, 2)
  kinds = np.array([found.kind_of[tuple(p)] for p in pairs.tolist()], int)
  directions = photographs.directions
  similarities = np.einsum(
    'pd,pd->p', directions[pairs[:, 0]], directions[pairs[:, 1]]
  )
  first = _components(len(photographs.names), pairs)
  groups, kept = _groups(first, photographs.sizes)
  return Duplicates(pairs, kinds, similarities, groups, kept)
