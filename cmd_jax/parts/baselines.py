"""Masks without an encoder, for DetCon (Henaff et al. 2021)."""

from __future__ import annotations

import numpy as np
import tqdm

from cmd_jax.errors import UserError, missing_extra


def grid_masks(count: int, mask_px: int, num_cells: int = 4) -> np.ndarray:
  """Masks of a fixed grid: cell (i, j) has the id i * num_cells + j.

  Args:
    count: N.
    mask_px: R.
    num_cells: cells along a side, at most 16.

  Returns:
    [N, R, R] uint8; one grid, broadcast, not to be written to.

  Raises:
    UserError: more cells than ids or pixels.
  """
  if not 1 <= num_cells <= min(16, mask_px):
    raise UserError(
      f'config.parts.settings.num_cells is {num_cells}: give 1 to '
      f'{min(16, mask_px)}'
    )
  cell = np.arange(mask_px) * num_cells // mask_px
  mask = (cell[:, None] * num_cells + cell).astype(np.uint8)
  return np.broadcast_to(mask, (count, mask_px, mask_px))


def felzenszwalb_masks(
  images: np.ndarray,
  *,
  scale: float = 1000.0,
  sigma: float = 0.8,
  min_size_fraction: float = 0.01,
  max_parts: int = 16,
  progress: bool = False,
) -> np.ndarray:
  """Masks by Felzenszwalb & Huttenlocher's segmentation (2004).

  The largest segments get the ids from 0 on, the largest first; what is left
  of more of them joins the last id. DetCon's scale and least size, 1,000 of
  about 224 pixels a side, are the defaults.

  Args:
    images: [N, R, R, 3] uint8.
    scale: a larger one makes larger segments.
    sigma: of the Gaussian before it, in pixels.
    min_size_fraction: least size of a segment as a fraction of the image.
    max_parts: ids of an image, at most 256.
    progress: shows a progress bar on stderr.

  Returns:
    [N, R, R] uint8.

  Raises:
    UserError: scikit-image is not installed, or too many ids.
  """
  try:
    from skimage.segmentation import felzenszwalb
  except ImportError as error:
    raise missing_extra(
      'Felzenszwalb masks need scikit-image', 'parts'
    ) from error
  if not 1 <= max_parts <= 256:
    raise UserError(
      f'config.parts.settings.max_parts is {max_parts}: give 1 to 256'
    )
  masks = np.empty(images.shape[:3], np.uint8)
  min_size = round(min_size_fraction * images.shape[1] * images.shape[2])
  bar = tqdm.tqdm(images, desc='segment', unit=' images', disable=not progress)
  for mask, image in zip(masks, bar):
    segments = felzenszwalb(image, scale=scale, sigma=sigma, min_size=min_size)
    sizes = np.bincount(segments.ravel())
    rank = np.empty(len(sizes), int)
    rank[np.argsort(-sizes, kind='stable')] = np.arange(len(sizes))
    mask[:] = np.minimum(rank, max_parts - 1)[segments]
  return masks
