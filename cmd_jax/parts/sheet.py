"""A picture of part masks."""

from __future__ import annotations

import colorsys
import io
import pathlib

import numpy as np
from PIL import Image

from cmd_jax.files.atomic import write_atomically

_GAP_PX = 4


def part_colours(count: int) -> np.ndarray:
  """[count, 3] uint8 colours, neighbouring ids far apart in hue."""
  # Multiples of the golden ratio spread evenly however many there are.
  hues = np.arange(count) * 0.618034 % 1
  values = np.where(np.arange(count) % 2, 0.75, 1.0)
  rgb = [colorsys.hsv_to_rgb(*hv) for hv in zip(hues, [0.85] * count, values)]
  return np.rint(255 * np.array(rgb).reshape(-1, 3)).astype(np.uint8)


def colour_parts(
  image: np.ndarray, mask: np.ndarray, background: bool
) -> np.ndarray:
  """Colours the parts of an image over its brightness.

  Args:
    image: [R, R, 3] uint8.
    mask: [R, R] uint8 part ids.
    background: whether id 0 is the background, which is only dimmed.

  Returns:
    [R, R, 3] uint8.
  """
  gray = image.mean(-1, keepdims=True)
  coloured = 0.5 * gray + 0.5 * part_colours(256)[mask]
  if background:
    coloured = np.where(mask[..., None] > 0, coloured, 0.35 * gray + 20)
  return coloured.astype(np.uint8)


def save_contact_sheet(
  path: pathlib.Path,
  images: np.ndarray,
  masks: np.ndarray,
  *,
  background: bool,
  columns: int = 4,
  cell_px: int = 128,
) -> None:
  """Draws images, each beside its coloured parts.

  Args:
    path: PNG file to write.
    images: [N, R, R, 3] uint8; a sheet has all of them.
    masks: [N, R, R] uint8 part ids.
    background: whether id 0 is the background.
    columns: pairs side by side.
    cell_px: side of a picture.
  """
  rows = -(-len(images) // columns)
  step = 2 * cell_px + _GAP_PX
  size = (columns * step - _GAP_PX, rows * (cell_px + _GAP_PX) - _GAP_PX)
  sheet = Image.new('RGB', size, 'white')
  for index, (image, mask) in enumerate(zip(images, masks)):
    row, column = divmod(index, columns)
    pair = (image, colour_parts(image, mask, background))
    for offset, picture in enumerate(pair):
      cell = Image.fromarray(picture).resize((cell_px, cell_px))
      left = column * step + offset * cell_px
      sheet.paste(cell, (left, row * (cell_px + _GAP_PX)))
  buffer = io.BytesIO()
  sheet.save(buffer, 'PNG', optimize=True)
  write_atomically(path, buffer.getvalue())
