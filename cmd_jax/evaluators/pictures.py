"""Pictures that a run leaves behind, as PNG."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from cmd_jax.data.channels import as_pictures
from cmd_jax.evaluators.base import Splits
from cmd_jax.evaluators.features import Features, centred
from cmd_jax.evaluators.frozen_network import FrozenNetwork
from cmd_jax.evaluators.nearest import find_nearest
from cmd_jax.files.atomic import write_atomically

# Rows of the picture of neighbours.
_NUM_QUERIES = 10
_CELL_PX = 96
_FRAME_PX = 4
_TEXT_PX = 14
_LEGEND = (
  'image',
  'looks at*',
  'nearest training images: green same class, red another, grey unlabelled. '
  '* bright: attended most, scaled',
)
_RIGHT, _WRONG, _QUERY = (40, 160, 60), (205, 50, 40), (40, 40, 40)


def overlay(image: np.ndarray, attention: np.ndarray) -> np.ndarray:
  """Brightens what is attended to and dims the rest.

  Args:
    image: [H, W, 3] uint8.
    attention: [N] weights of a square grid of patches, row by row.

  Returns:
    [H, W, 3] uint8.
  """
  grid = round(len(attention) ** 0.5)
  span = attention.max() - attention.min()
  # What looks everywhere alike dims nothing.
  heat = np.ones_like(attention)
  if span > 0:
    heat = (attention - attention.min()) / span
  heat = Image.fromarray(heat.reshape(grid, grid).astype(np.float32)).resize(
    image.shape[1::-1], Image.Resampling.BILINEAR
  )
  heat = np.asarray(heat)[..., None]
  gray = image.mean(-1, keepdims=True)
  return (image * heat + 0.35 * gray * (1 - heat)).astype(np.uint8)


def _cell(image: np.ndarray, frame: tuple[int, int, int]) -> Image.Image:
  inner = _CELL_PX - 2 * _FRAME_PX
  cell = Image.new('RGB', (_CELL_PX, _CELL_PX), frame)
  resized = Image.fromarray(image).resize(
    (inner, inner), Image.Resampling.LANCZOS
  )
  cell.paste(resized, (_FRAME_PX, _FRAME_PX))
  return cell


def _class_name(names: Sequence[str], label: int) -> str:
  """A class's name as short as a cell is wide; the font has Latin letters."""
  name = names[label] if 0 <= label < len(names) else ''
  # Names of one set often begin alike.
  name = name if len(name) <= 15 else f'{name[:6]}..{name[-7:]}'
  return name.encode('ascii', 'replace').decode().replace('\n', ' ')


def draw_neighbours(
  network: FrozenNetwork, splits: Splits, path: pathlib.Path
) -> None:
  """Draws a few test images, where the network looks, and their neighbours.

  Without test images, a few of the training images query the others.

  Args:
    network: that looks.
    splits: the images.
    path: PNG file to write; none is written where there is nothing to query.
  """
  queries = splits.test or splits.train
  order = np.random.default_rng(0).permutation(len(queries.images))
  chosen = np.sort(order[:_NUM_QUERIES])
  gallery = np.arange(len(splits.train.images))
  if splits.test is None:
    gallery = np.setdiff1d(gallery, chosen)
  if not len(gallery):
    return
  images = queries.images[chosen]
  save_neighbours(
    path,
    queries=images,
    query_features=network.embeddings(queries).take(chosen),
    gallery=splits.train.images[gallery],
    gallery_features=network.embeddings(splits.train).take(gallery),
    attention=network.attend(images, queries.sizes[chosen]),
  )


def save_neighbours(
  path: pathlib.Path,
  *,
  queries: np.ndarray,
  query_features: Features,
  gallery: np.ndarray,
  gallery_features: Features,
  attention: np.ndarray,
  num_neighbours: int = 7,
) -> None:
  """Draws test images, where the network looks, and their neighbours.

  A row is a query, the query under its attention, and its nearest gallery
  images by cosine similarity around the gallery's mean, framed green where the
  class is the same, red where it is another, and grey where either has no
  label. Class names are below the images.

  Args:
    path: PNG file to write.
    queries: [Q, R, R, 3] uint8, or [Q, R, R, C] uint16.
    query_features: of the queries.
    gallery: [N, R, R, 3] uint8, likewise.
    gallery_features: of the gallery.
    attention: [Q, patches] of the queries.
    num_neighbours: neighbours shown, at most N.
  """
  queries, gallery = map(as_pictures, (queries, gallery))
  around = gallery_features.vectors
  nearest, _ = find_nearest(
    centred(query_features.vectors, around),
    centred(around, around),
    num_neighbours,
  )
  columns, height = 2 + nearest.shape[1], _CELL_PX + _TEXT_PX
  sheet = Image.new(
    'RGB', (columns * _CELL_PX, len(queries) * height + _TEXT_PX + 2), 'white'
  )
  draw = ImageDraw.Draw(sheet)
  for column, title in enumerate(_LEGEND):
    draw.text((column * _CELL_PX + _FRAME_PX, 2), title, fill=_QUERY)
  names = query_features.class_names
  for row, image in enumerate(queries):
    label = query_features.labels[row]
    cells = [
      (image, _QUERY, _class_name(names, label)),
      (overlay(image, attention[row]), _QUERY, ''),
    ]
    for index in nearest[row]:
      other = gallery_features.labels[index]
      frame = _RIGHT if other == label else _WRONG
      if min(label, other) < 0:
        frame = _QUERY
      cells.append((gallery[index], frame, _class_name(names, other)))
    for column, (image, frame, name) in enumerate(cells):
      left, top = column * _CELL_PX, row * height + _TEXT_PX + 2
      sheet.paste(_cell(image, frame), (left, top))
      draw.text((left + _FRAME_PX, top + _CELL_PX), name, fill=_QUERY)
  buffer = io.BytesIO()
  sheet.save(buffer, 'PNG', optimize=True)
  write_atomically(path, buffer.getvalue())
