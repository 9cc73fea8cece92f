"""The photographs of a report: which they are, and where the network looks."""

from __future__ import annotations

import base64
import io
import math
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tqdm
from PIL import Image

from cmd_jax.data.canvas import Canvases
from cmd_jax.data.channels import as_pictures
from cmd_jax.parts.sheet import part_colours

# A thumbnail's longer side; at 160 px a photograph takes some 4 kB as WebP.
_THUMBNAIL_PX = 160
_WEBP_QUALITY = 75
# Sides of longer grids are reduced: more would not be seen on a thumbnail.
_MAX_GRID = 28
_MASK_PX = 96
# So that a panorama stays a picture.
_MAX_ASPECT = 4.0
_SEED = 0


class Split(NamedTuple):
  """The photographs of one split that are shown.

  Attributes:
    name: 'training' or 'test'.
    canvases: of the split.
    rows: [n] which of them are shown, ascending.
  """

  name: str
  canvases: Canvases
  rows: np.ndarray


class Drawn(NamedTuple):
  """What is drawn of n photographs.

  Attributes:
    thumbnails: WebP files as base64.
    attention: [n, g, g] uint8.
    sizes: [n, 2] height and width of the originals.
  """

  thumbnails: list[str]
  attention: np.ndarray
  sizes: np.ndarray


def sample(
  pretrain: Canvases, test: Canvases | None, max_images: int
) -> list[Split]:
  """Chooses the photographs shown: all, or as many as wanted by chance.

  Args:
    pretrain: the training split.
    test: the test split if there is one.
    max_images: photographs at most.

  Returns:
    The splits with at least one photograph, the training split first.
  """
  splits = [('training', pretrain)]
  if test is not None:
    splits.append(('test', test))
  counts = [len(canvases.file_names) for _, canvases in splits]
  order = np.random.default_rng(_SEED).permutation(sum(counts))
  chosen = np.sort(order[:max_images])
  shown, start = [], 0
  for (name, canvases), count in zip(splits, counts):
    rows = chosen[(chosen >= start) & (chosen < start + count)] - start
    if len(rows):
      shown.append(Split(name, canvases, rows))
    start += count
  return shown


def encode_base64(data: bytes) -> str:
  """Bytes as the page takes them."""
  return base64.b64encode(data).decode('ascii')


def shown_size(height: int, width: int) -> tuple[int, int]:
  """Width and height of a thumbnail in pixels, of the original's shape.

  Args:
    height: of the original.
    width: of the original.
  """
  aspect = min(max(width / height, 1 / _MAX_ASPECT), _MAX_ASPECT)
  longer = max(aspect, 1.0)
  return (
    round(_THUMBNAIL_PX * aspect / longer),
    round(_THUMBNAIL_PX / longer),
  )


def make_thumbnail(canvas: np.ndarray, size: Sequence[int]) -> bytes:
  """A small picture in the shape of the original.

  Args:
    canvas: [R, R, 3] uint8, or [R, R, C] uint16, squashed to a square.
    size: height and width of the original.

  Returns:
    A WebP file.
  """
  width, height = shown_size(*size)
  # Nothing is gained by more pixels than the canvas has.
  scale = min(1.0, len(canvas) / max(width, height))
  size = (max(round(width * scale), 1), max(round(height * scale), 1))
  buffer = io.BytesIO()
  Image.fromarray(as_pictures(canvas)).resize(
    size, Image.Resampling.LANCZOS
  ).save(buffer, 'WEBP', quality=_WEBP_QUALITY)
  return buffer.getvalue()


def make_attention_grids(attention: np.ndarray) -> np.ndarray:
  """Stretches what each patch counts to 0..255, image by image.

  Args:
    attention: [B, N] of a square grid of patches, row by row.

  Returns:
    [B, g, g] uint8; all 255 where every patch counts alike.
  """
  grid = math.isqrt(attention.shape[1])
  if grid * grid != attention.shape[1]:
    raise ValueError(f'{attention.shape[1]} patches are no square grid')
  maps = attention.reshape(-1, grid, grid).astype(np.float32)
  if grid > _MAX_GRID:
    size = (_MAX_GRID, _MAX_GRID)
    box = Image.Resampling.BOX
    maps = np.stack(
      [np.asarray(Image.fromarray(m).resize(size, box)) for m in maps]
    )
  low = maps.min((1, 2), keepdims=True)
  span = maps.max((1, 2), keepdims=True) - low
  heat = np.where(span > 0, (maps - low) / np.where(span > 0, span, 1), 1.0)
  return np.rint(255 * heat).astype(np.uint8)


def make_mask(mask: np.ndarray, background: bool) -> bytes:
  """A part mask as a small picture.

  Args:
    mask: [R, R] uint8 part ids.
    background: whether id 0 is the background, which is left transparent.

  Returns:
    A PNG file with a palette.
  """
  side = min(_MASK_PX, len(mask))
  image = Image.fromarray(mask).resize((side, side), Image.Resampling.NEAREST)
  image.putpalette(part_colours(256).tobytes())
  buffer = io.BytesIO()
  transparency = {'transparency': 0} if background else {}
  image.save(buffer, 'PNG', optimize=True, **transparency)
  return buffer.getvalue()


def draw(
  splits: Sequence[Split],
  attend: Callable[[np.ndarray, np.ndarray], np.ndarray],
  *,
  batch_size: int,
) -> Drawn:
  """Draws the thumbnails and asks the network where it looks.

  Args:
    splits: the photographs shown.
    attend: (canvases [B, R, R, 3], sizes [B, 2]) -> [B, N]; always called with
      the same B.
    batch_size: B.

  Returns:
    What the page shows, in the order of the splits.
  """
  thumbnails, grids, shown_sizes = [], [], []
  with tqdm.tqdm(
    total=sum(len(split.rows) for split in splits),
    desc='photographs',
    unit='image',
    file=sys.stderr,
    disable=None,
    leave=False,
  ) as bar:
    for _, canvases, rows in splits:
      for start in range(0, len(rows), batch_size):
        kept = rows[start : start + batch_size]
        filled = np.resize(kept, batch_size)
        images, sizes = canvases.images[filled], canvases.sizes[filled]
        attention = np.asarray(attend(images, sizes))[: len(kept)]
        grids.append(make_attention_grids(attention))
        shown_sizes.append(sizes[: len(kept)])
        thumbnails += [
          encode_base64(make_thumbnail(image, size))
          for image, size in zip(images[: len(kept)], sizes)
        ]
        bar.update(len(kept))
  return Drawn(thumbnails, np.concatenate(grids), np.concatenate(shown_sizes))
