"""Whether an image is a part of another: template matching of small pictures.

Normalised cross-correlation (Lewis 1995, "Fast normalized cross-correlation"):
one picture, shrunk to a share of the other and perhaps mirrored, is laid on it
at every place. Canvases are squashed to squares; the sizes of the files tell
how a crop that keeps its proportions lies on them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

# Side of the pictures compared.
GREY_PX = 48
# Shares of the longer side of the whole that a part is looked for at.
_SHARES = np.arange(1.0, 0.475, -0.05)
_FINER = np.arange(-0.05, 0.0625, 0.0125)
# Less of a side is too little to tell by.
_LEAST_SHARE = 0.35
# Grey levels; flatter ones match everywhere.
_MIN_CONTRAST = 4.0
# A match of pictures of half the side below it is not refined.
_PROMISING = 0.7


class Match(NamedTuple):
  """Where one picture lies in another.

  Attributes:
    correlation: in [-1, 1], 1 where they agree but for brightness and contrast.
    share: of the whole's area.
    is_mirrored: whether it lies there turned left to right.
  """

  correlation: float
  share: float
  is_mirrored: bool


def make_greys(canvases: np.ndarray) -> np.ndarray:
  """Small grey pictures of canvases.

  Args:
    canvases: [N, R, R, 3] uint8.

  Returns:
    [N, G, G] uint8.
  """
  size = (GREY_PX, GREY_PX)
  return np.stack(
    [
      np.asarray(
        Image.fromarray(np.ascontiguousarray(canvas))
        .convert('L')
        .resize(size, Image.Resampling.BOX)
      )
      for canvas in canvases
    ]
  )


def _summed_area(values: np.ndarray) -> np.ndarray:
  """[G + 1, G + 1] sums of all that is above and to the left."""
  table = np.zeros((values.shape[0] + 1, values.shape[1] + 1))
  table[1:, 1:] = values.cumsum(0).cumsum(1)
  return table


def _window_sums(table: np.ndarray, height: int, width: int) -> np.ndarray:
  """Sums [G - h + 1, G - w + 1] of all windows, of `_summed_area`."""
  return (
    table[height:, width:]
    - table[:-height, width:]
    - table[height:, :-width]
    + table[:-height, :-width]
  )


def _place(shape: tuple[int, int], pictures: np.ndarray) -> np.ndarray:
  """Pictures [M, h, w] in the upper left of zeros [M, *shape]."""
  placed = np.zeros((len(pictures), *shape), np.float32)
  placed[:, : pictures.shape[1], : pictures.shape[2]] = pictures
  return placed


def _best_at(
  whole: np.ndarray,
  part: Image.Image,
  ratio: float,
  shares: np.ndarray,
) -> tuple[Match, float]:
  """The best match at some shares of the longer side, and that share."""
  templates, sizes = [], []
  for share in shares:
    # Width and height of the part, as shares of those of the whole.
    x, y = (share, share / ratio) if ratio >= 1 else (share * ratio, share)
    width, height = (max(round(side * len(whole)), 1) for side in (x, y))
    if min(x, y) < _LEAST_SHARE or max(x, y) > 1:
      continue
    small = np.asarray(
      part.resize((width, height), Image.Resampling.BILINEAR), np.float32
    )
    small = small - small.mean()
    if small.std() < _MIN_CONTRAST:
      continue
    small /= np.linalg.norm(small)
    pair = np.stack([small, small[:, ::-1]])
    templates.append(_place(whole.shape, pair))
    sizes.append((height, width, share))
  best = Match(-1.0, 0.0, False), 0.0
  if not templates:
    return best
  # Where the template does not reach beyond the picture, the cyclic
  # correlation is the plain one.
  spectrum = np.fft.rfft2(whole)
  products = np.fft.irfft2(
    spectrum * np.conj(np.fft.rfft2(np.concatenate(templates))), whole.shape
  ).reshape(len(sizes), 2, *whole.shape)
  tables = _summed_area(whole), _summed_area(whole**2)
  for product, (height, width, share) in zip(products, sizes):
    area = height * width
    sums, squares = (_window_sums(table, height, width) for table in tables)
    spread = np.sqrt(np.maximum(squares - sums**2 / area, 0))
    valid = product[:, : sums.shape[0], : sums.shape[1]]
    floor = _MIN_CONTRAST * np.sqrt(area)
    correlations = np.where(
      spread > floor, valid / np.maximum(spread, floor), -1
    )
    for is_mirrored, found in enumerate(correlations.max((1, 2))):
      if found > best[0].correlation:
        match = Match(float(found), area / whole.size, bool(is_mirrored))
        best = match, float(share)
  return best


def find_part(
  whole: np.ndarray,
  part: np.ndarray,
  whole_size: np.ndarray,
  part_size: np.ndarray,
) -> Match:
  """Where a picture lies in another, if it is a part of it.

  Half of the whole's longer side is the least that is looked for, and a part
  is taken to have kept its proportions.

  Args:
    whole: [G, G] uint8 from `make_greys`.
    part: [G, G] uint8.
    whole_size: height and width of the whole's file in pixels.
    part_size: those of the part's file.

  Returns:
    The best match; its correlation is -1 where nothing can be compared.
  """
  ratio = (part_size[1] * whole_size[0]) / (part_size[0] * whole_size[1])
  picture = Image.fromarray(part)
  values = whole.astype(np.float64)
  values -= values.mean()
  half = values.reshape(GREY_PX // 2, 2, GREY_PX // 2, 2).mean((1, 3))
  best, share = _best_at(half, picture, ratio, _SHARES)
  if best.correlation < _PROMISING:
    return best
  return _best_at(values, picture, ratio, share + _FINER)[0]
