"""Positions of the patches: learned embeddings and rotary angles."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.models.layers import wide

INTERPOLATIONS = ('dino', 'dinov2', 'antialias')


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
  x = np.abs(x)
  near = (a + 2) * x**3 - (a + 3) * x**2 + 1
  far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
  return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def bicubic_matrix(old: int, new: int, scale: float) -> np.ndarray:
  """Weights [new, old] of torch's bicubic interpolation without antialiasing.

  A = -0.75, border samples clamped, source coordinate (i + 0.5) / scale - 0.5.
  """
  centre = (np.arange(new) + 0.5) / scale - 0.5
  first = np.floor(centre).astype(int) - 1
  matrix = np.zeros((new, old))
  for tap in range(4):
    column = np.clip(first + tap, 0, old - 1)
    weight = _cubic(centre - (first + tap), a=-0.75)
    np.add.at(matrix, (np.arange(new), column), weight)
  return matrix.astype(np.float32)


def antialias_matrix(old: int, new: int) -> np.ndarray:
  """Weights [new, old] of torch's bicubic interpolation with antialiasing.

  A = -0.5; where samples become fewer the kernel is as much wider, and at the
  border its weights are scaled to sum to 1 again. Pillow resizes alike.
  """
  stretch = max(old / new, 1.0)
  centre = (np.arange(new) + 0.5) * old / new
  distance = np.arange(old) + 0.5 - centre[:, None]
  weights = _cubic(distance / stretch, a=-0.5)
  return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _geometric_places(old: int, new: int) -> np.ndarray:
  """Distances of [old] samples, 0 in the middle, that grow geometrically."""
  low, high = 1.01, 1.5
  while high - low > 1e-6:
    ratio = (low + high) / 2
    if (1 - ratio ** (old // 2)) / (1 - ratio) > new // 2:
      high = ratio
    else:
      low = ratio
  distances = np.cumsum(ratio ** np.arange(old // 2))
  return np.concatenate([-distances[::-1], [0.0], distances])


def resize_bias_table(table: np.ndarray, side: int) -> np.ndarray:
  """Resizes a table of relative position biases as timm does.

  timm's `resize_rel_pos_bias_table`, after BEiT: the samples are taken to lie
  1, q, q^2, ... apart from the middle outwards, such that the outermost reach
  the border of the new table, and what lies between is linear. Microsoft's
  program resizes bicubically: `interpolate_positions`.

  Args:
    table: [n * n, heads] with an odd n.
    side: that of the new table, odd.

  Returns:
    [side * side, heads] float32; the same where n is side.
  """
  old = round(len(table) ** 0.5)
  if old == side:
    return table
  places = _geometric_places(old, side)
  wanted = np.arange(side) - side // 2
  # Column j: how much sample j counts at each place wanted.
  matrix = np.stack([np.interp(wanted, places, x) for x in np.eye(old)], 1)
  square = table.reshape(old, old, -1)
  resized = np.einsum('yh,xw,hwd->yxd', matrix, matrix, square)
  return resized.reshape(side * side, -1).astype(np.float32)


def interpolate_positions(
  positions: jax.Array, grid: tuple[int, int], interpolation: str = 'dino'
) -> jax.Array:
  """Resizes patch position embeddings to another grid.

  'dino' is the `interpolate_pos_encoding` of DINO as first released and of the
  programs that took it over, and on square grids Hugging Face's: one scale
  sqrt(new count / old count) for both axes; an equal count leaves the
  embeddings untouched. 'dinov2' is that of DINO's main branch, DINOv2 without
  registers, PARTICLE and Amir et al.: a scale (new + 0.1) / old for each axis,
  whose 0.1 moves the samples visibly. 'antialias' is that of DINOv2 with
  registers and of timm's `resample_abs_pos_embed`: see `antialias_matrix`. The
  latter two leave the same square grid untouched.

  Args:
    positions: [1, N, D] embeddings of a square grid.
    grid: rows and columns wanted.
    interpolation: one of INTERPOLATIONS.

  Returns:
    [1, rows * columns, D].
  """
  rows, columns = grid
  _, count, dim = positions.shape
  old = int(round(count**0.5))
  if rows * columns == count and (rows == columns or interpolation == 'dino'):
    return positions
  if interpolation == 'antialias':
    matrices = [antialias_matrix(old, new) for new in grid]
  else:
    scales = [(rows * columns / count) ** 0.5] * 2
    if interpolation == 'dinov2':
      scales = [(new + 0.1) / old for new in grid]
    matrices = [bicubic_matrix(old, *new) for new in zip(grid, scales)]
  square = positions.reshape(old, old, dim)
  resized = jnp.einsum(
    'yh,xw,hwd->yxd',
    *matrices,
    square,
    precision='highest',
  )
  return resized.reshape(1, rows * columns, dim)


def rotary_turn(
  rows: int, columns: int, head_dim: int
) -> tuple[np.ndarray, np.ndarray]:
  """DINOv3's rotary positions (Simeoni et al. 2025, HF code): cosines, sines.

  A patch's centre has coordinates in (-1, 1); half of the pairs of channels
  turn with the row, half with the column, at periods from 1 to 100.

  Returns:
    Two [rows * columns, head_dim] float32; channel c and c + head_dim / 2 are a
    pair.
  """
  frequencies = 100.0 ** -np.arange(0, 1, 4 / head_dim)
  coordinates = np.stack(
    np.meshgrid(
      2 * (np.arange(rows) + 0.5) / rows - 1,
      2 * (np.arange(columns) + 0.5) / columns - 1,
      indexing='ij',
    ),
    axis=-1,
  )
  angles = 2 * np.pi * coordinates.reshape(-1, 2, 1) * frequencies
  angles = np.tile(angles.reshape(len(angles), -1), 2).astype(np.float32)
  return np.cos(angles), np.sin(angles)


def rotate(x: jax.Array, turn: tuple[np.ndarray, np.ndarray]) -> jax.Array:
  """Turns the last N of [B, heads, M, d] tokens by a turn of [N, d] each."""
  cos, sin = turn
  num_prefix = x.shape[2] - len(cos)
  prefix, patches = jnp.split(x, [num_prefix], axis=2)
  patches = patches.astype(wide(x.dtype))
  first, second = jnp.split(patches, 2, axis=-1)
  turned = jnp.concatenate([-second, first], axis=-1)
  patches = (patches * cos + turned * sin).astype(x.dtype)
  return jnp.concatenate([prefix, patches], axis=2)
