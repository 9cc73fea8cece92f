"""The windows of a feature map, for Swin."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def relative_position_index(window: int) -> np.ndarray:
  """Rows of the bias table for every pair of positions in a window.

  (dy + w - 1) (2w - 1) + dx + w - 1 with dy, dx from key to query; Swin's
  `relative_position_index`.

  Returns:
    [w * w queries, w * w keys] integers.
  """
  y, x = np.divmod(np.arange(window**2), window)
  dy, dx = y[:, None] - y, x[:, None] - x
  return (dy + window - 1) * (2 * window - 1) + dx + window - 1


def partition(x: jax.Array | np.ndarray, window: int) -> jax.Array | np.ndarray:
  """Windows of a padded map, [B, H, W, D] -> [B, windows, w * w, D]."""
  batch, rows, columns, dim = x.shape
  x = x.reshape(batch, rows // window, window, columns // window, window, dim)
  return x.swapaxes(2, 3).reshape(batch, -1, window * window, dim)


def merge(windows: jax.Array, rows: int, columns: int) -> jax.Array:
  """Inverse of `partition`, [B, windows, w * w, D] -> [B, rows, columns, D]."""
  batch, _, area, dim = windows.shape
  w = round(area**0.5)
  x = windows.reshape(batch, rows // w, columns // w, w, w, dim)
  return x.swapaxes(2, 3).reshape(batch, rows, columns, dim)


def pad(x: jax.Array, height: int, width: int) -> jax.Array:
  """Zeros at the right and the bottom of [B, H, W, D]."""
  _, rows, columns, _ = x.shape
  return jnp.pad(x, ((0, 0), (0, height - rows), (0, width - columns), (0, 0)))


def inside(rows: int, columns: int, height: int, width: int) -> np.ndarray:
  """[height, width], true where a padded map is not padding."""
  return (np.arange(height) < rows)[:, None] & (np.arange(width) < columns)


def shift_mask(rows: int, columns: int, window: int, shift: int) -> np.ndarray:
  """Pairs that a cyclic shift brought into one window from far apart.

  Along each axis the last window mixes the end of the map with its beginning,
  which the shift moved to the last `shift` positions (Liu et al. 2021, Fig. 4).

  Args:
    rows: of the padded map.
    columns: of the padded map.
    window: side of a window.
    shift: how far the map is shifted.

  Returns:
    [windows, w * w queries, w * w keys], true for a pair to be kept apart.
  """
  y, x = (np.arange(side) >= side - shift for side in (rows, columns))
  regions = 2 * y[:, None] + x
  regions = partition(regions[None, :, :, None], window)[0, :, :, 0]
  return regions[:, :, None] != regions[:, None]


def received_attention(
  weights: jax.Array, rows: int, columns: int, shift: int
) -> jax.Array:
  """How much each region is looked at by the regions of its window.

  The mean, over the queries of the window that are no padding, of the weight
  they give it; then divided so that an image's regions add up to 1. Ours: Swin
  has no class token whose attention could be taken.

  Args:
    weights: [B, windows, heads, w * w queries, w * w keys] of a block.
    rows: of the map without padding.
    columns: of the map without padding.
    shift: of the block.

  Returns:
    [B, heads, rows * columns].
  """
  window = round(weights.shape[-1] ** 0.5)
  height, width = (-(-side // window) * window for side in (rows, columns))
  is_real = inside(rows, columns, height, width)
  is_real = np.roll(is_real, (-shift, -shift), axis=(0, 1))
  is_real = partition(is_real[None, :, :, None], window)[0, :, :, 0]
  count = is_real.sum(1, keepdims=True)
  # A shifted window may hold nothing but padding.
  share = (is_real / np.maximum(count, 1)).astype(np.float32)
  received = jnp.einsum('bwhqk,wq->bwkh', weights, share)
  received = jnp.roll(
    merge(received, height, width), (shift, shift), axis=(1, 2)
  )[:, :rows, :columns]
  received = received.reshape(len(weights), rows * columns, -1).swapaxes(1, 2)
  return received / received.sum(-1, keepdims=True)
