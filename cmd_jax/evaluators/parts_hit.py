"""Discovered parts against annotated keypoints: `parts/hit`."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from cmd_jax.errors import UserError

_PROTOCOL = 'parts/hit'
_COLUMNS = ('file', 'part_id', 'x', 'y', 'visible')
_HIDDEN = -1


class Keypoints(NamedTuple):
  """Where the annotated points of N images are.

  Attributes:
    positions: [N, K, 2] float32 (y, x) as fractions of the height and width.
    visible: [N, K] bool; positions of the others mean nothing.
    kinds: [K] names of the kinds, such as those of CUB's 15 parts.
  """

  positions: np.ndarray
  visible: np.ndarray
  kinds: tuple[str, ...]


def read_keypoints(
  path: str | os.PathLike[str], file_names: Sequence[str], sizes: np.ndarray
) -> Keypoints:
  """Reads a table of keypoints, one visible point of an image a row.

  Args:
    path: CSV file with the columns file, part_id, x, y and visible (0 or 1);
      x and y in pixels of the image file.
    file_names: [N] images, as the column file names them; rows of others are
      passed over, and an image without rows has no visible point.
    sizes: [N, 2] height and width of the image files in pixels.

  Returns:
    The keypoints, in the order of `file_names`; kinds in the order of their
    numbers.

  Raises:
    UserError: the file can't be read, lacks a column, has something else than
      numbers, a point beyond its image, or none of the images.
  """
  row_of = {name: row for row, name in enumerate(file_names)}
  try:
    with open(path, encoding='utf-8-sig', newline='') as file:
      reader = csv.DictReader(file)
      missing = set(_COLUMNS) - set(reader.fieldnames or ())
      if missing:
        raise UserError(
          f'{path}: no column {", ".join(sorted(missing))}; the first line '
          f'must name {", ".join(_COLUMNS)}'
        )
      points = [
        _read_point(path, reader.line_num, entry, row_of, sizes)
        for entry in reader
        if entry['file'] in row_of
      ]
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    reason = getattr(error, 'strerror', None) or error
    raise UserError(
      f'{path}: cannot read the keypoints ({reason}); give a CSV file'
    ) from error
  points = [point for point in points if point is not None]
  if not points:
    raise UserError(
      f'{path}: no visible keypoint of any of the {len(file_names)} images; '
      f'name files as in {file_names[0]!r}'
    )
  kinds = sorted({kind for _, kind, _ in points})
  keypoints = Keypoints(
    np.zeros((len(file_names), len(kinds), 2), np.float32),
    np.zeros((len(file_names), len(kinds)), bool),
    tuple(map(str, kinds)),
  )
  for row, kind, position in points:
    keypoints.positions[row, kinds.index(kind)] = position
    keypoints.visible[row, kinds.index(kind)] = True
  return keypoints


def make_parts_hit(
  *, num_permutations: int = 20, seed: int = 0
) -> Callable[[np.ndarray, Keypoints], dict[str, float]]:
  """`parts/hit`: how well discovered parts and kinds of keypoints agree.

  A keypoint hits the part of the pixel it lies in. Let n(k, p) be the number of
  visible keypoints of kind k, over all images, that hit part p, and p = 0 the
  background, which is no part:

    coverage = sum_k sum_{p > 0} n(k, p) / sum_k sum_p n(k, p)
    purity = sum_{p > 0} max_k n(k, p) / sum_{p > 0} sum_k n(k, p)
    completeness = mean_k max_{p > 0} n(k, p) / sum_p n(k, p)

  Purity is that of clusterings (Manning et al. 2008, section 16.3): the share
  of hits that are of their part's most frequent kind. Completeness is the share
  of the keypoints of a kind that fall into one part, kinds that are never
  visible left out; a miss of all parts counts against it. One part for the
  whole bird has completeness 1 and low purity, a part for every pixel the
  reverse.

  Two references, each the mean over random permutations. `purity_chance` and
  `completeness_chance`: the visible keypoints of every image change kinds among
  themselves, which leaves what a mask of the whole bird can do.
  `purity_layout` and `completeness_layout`: the images change masks, which
  leaves what the usual places of parts tell without a look at the image. Part
  ids must mean the same in all images: clusters found image by image score as
  by chance.

  Args:
    num_permutations: how many are averaged.
    seed: of the permutations.

  Returns:
    An evaluator: (part_ids [N, R, R] uint8 of whole images, keypoints of the
    same images) -> `purity`, `completeness` and `coverage`, and the references,
    in [0, 1]; 0 where no keypoint hits a part.

  Raises:
    ValueError: `num_permutations` isn't positive.
  """
  if num_permutations < 1:
    raise ValueError(f'num_permutations must be positive: {num_permutations}')

  def evaluate(part_ids: np.ndarray, keypoints: Keypoints) -> dict[str, float]:
    images = np.arange(len(part_ids))
    hits = _hits(part_ids, images, keypoints)
    rng = np.random.default_rng(seed)
    chance, layout = [], []
    for _ in range(num_permutations):
      chance.append(_agreement(_permute(rng, hits)))
      others = _hits(part_ids, rng.permutation(images), keypoints)
      layout.append(_agreement(others))
    scores = {'coverage': float((hits > 0).sum() / (hits != _HIDDEN).sum())}
    for suffix, values in (
      ('', [_agreement(hits)]),
      ('_chance', chance),
      ('_layout', layout),
    ):
      purity, completeness = np.mean(values, axis=0)
      scores[f'purity{suffix}'] = float(purity)
      scores[f'completeness{suffix}'] = float(completeness)
    return scores

  return evaluate


def _read_point(
  path: str | os.PathLike[str],
  line: int,
  entry: dict[str, str],
  row_of: dict[str, int],
  sizes: np.ndarray,
) -> tuple[int, int, tuple[float, float]] | None:
  """Image, kind and position (y, x) in fractions; None if not visible."""
  try:
    kind, visible = int(entry['part_id']), int(entry['visible'])
    x, y = float(entry['x']), float(entry['y'])
  except (TypeError, ValueError) as error:
    raise UserError(
      f'{path}, line {line}: part_id and visible must be whole numbers, x and '
      'y numbers'
    ) from error
  if not visible:
    return None
  row = row_of[entry['file']]
  height, width = sizes[row]
  if not (0 <= x <= width and 0 <= y <= height):
    raise UserError(
      f'{path}, line {line}: the point ({x:g}, {y:g}) is beyond its image of '
      f'{width} x {height} pixels; give x and y in pixels of the image file'
    )
  return row, kind, (y / height, x / width)


def _hits(
  part_ids: np.ndarray, images: np.ndarray, keypoints: Keypoints
) -> np.ndarray:
  """[N, K] part that each keypoint hits in the masks of the given images.

  0 is the background, -1 stands for a keypoint that is not visible.
  """
  positions, visible = keypoints.positions, keypoints.visible
  if part_ids.ndim != 3 or len(part_ids) != len(positions):
    raise ValueError(
      f'{_PROTOCOL}: masks {part_ids.shape} for keypoints {positions.shape}'
    )
  if not visible.any():
    raise UserError(
      f'{_PROTOCOL}: no keypoint is visible; give annotations of these images'
    )
  # A point on the far border belongs to the last pixel.
  inside = np.clip(positions, 0, np.nextafter(np.float32(1), np.float32(0)))
  pixels = np.where(visible[..., None], inside, 0)
  y, x = np.moveaxis((pixels * np.array(part_ids.shape[1:])).astype(int), -1, 0)
  parts = part_ids[images[:, None], y, x].astype(int)
  return np.where(visible, parts, _HIDDEN)


def _count(hits: np.ndarray) -> np.ndarray:
  """n(k, p), [kinds that are visible somewhere, largest part + 1]."""
  counts = np.zeros((hits.shape[1], max(hits.max(), 1) + 1), int)
  images, kinds = np.nonzero(hits != _HIDDEN)
  np.add.at(counts, (kinds, hits[images, kinds]), 1)
  return counts[counts.any(axis=1)]


def _agreement(hits: np.ndarray) -> tuple[float, float]:
  """Purity and completeness."""
  counts = _count(hits)
  on_parts = counts[:, 1:]
  purity = on_parts.max(axis=0).sum() / max(on_parts.sum(), 1)
  completeness = (on_parts.max(axis=1) / counts.sum(axis=1)).mean()
  return float(purity), float(completeness)


def _permute(rng: np.random.Generator, hits: np.ndarray) -> np.ndarray:
  """Exchanges the hits of every image among its visible kinds."""
  visible = hits != _HIDDEN
  # Both orders have the visible kinds first, this one at random.
  source = np.argsort(np.where(visible, rng.random(hits.shape), 2.0), axis=1)
  target = np.argsort(~visible, axis=1, kind='stable')
  permuted = np.full_like(hits, _HIDDEN)
  np.put_along_axis(
    permuted, target, np.take_along_axis(hits, source, axis=1), axis=1
  )
  return permuted
