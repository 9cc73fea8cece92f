"""`cmd-jax search`: the images of a folder that look most like a query."""

from __future__ import annotations

import csv
import io
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from cmd_jax.data import canvas, image_files
from cmd_jax.errors import UserError, missing_extra
from cmd_jax.evaluators.features import unit_rows
from cmd_jax.evaluators.nearest import Nearest, find_nearest
from cmd_jax.evaluators.whitening import MIN_VECTORS, apart_in
from cmd_jax.export.images import Embeddings
from cmd_jax.files import disk_errors
from cmd_jax.files.atomic import write_atomically

INDEXES = ('exact', 'faiss')
_ABOUT = (
  'likeness: cosine similarity after the mean of the images searched is taken '
  'off and, from\n{count} images on, what the nearest of them differ in counts '
  'less; they are ranked by it;\ncosine: without either, near 1 for all where '
  'features lie in a narrow cone'
)
_CELL_PX, _TEXT_PX, _COLUMNS = 160, 32, 5


def _faiss() -> Any:
  try:
    import faiss
  except ImportError as error:
    raise missing_extra('--index=faiss needs FAISS', 'faiss') from error
  return faiss


def nearest_by_faiss(
  queries: np.ndarray, gallery: np.ndarray, k: int
) -> Nearest:
  """As `find_nearest`, from an inner-product index of FAISS on the CPU.

  Raises:
    UserError: FAISS is not installed.
  """
  faiss = _faiss()
  index = faiss.IndexFlatIP(gallery.shape[1])
  index.add(unit_rows(gallery))
  similarities, rows = index.search(unit_rows(queries), min(k, len(gallery)))
  return Nearest(rows, similarities)


def rows_of(gallery: Embeddings, query: pathlib.Path) -> list[int]:
  """Rows of a gallery that are the very file of a query."""
  return [
    row
    for row, name in enumerate(gallery.file_names)
    if name.rpartition('/')[2] == query.name
    and os.path.realpath(gallery.folder / name) == os.path.realpath(query)
  ]


class Found(NamedTuple):
  """The k images that look most like a query, the most alike first.

  Attributes:
    rows: [k] rows of the gallery.
    likeness: [k] cosines in which images are told apart in the gallery, see
      `whitening.apart_in`, descending.
    cosines: [k] cosines of the features as they are.
  """

  rows: np.ndarray
  likeness: np.ndarray
  cosines: np.ndarray


def search(
  query: np.ndarray,
  gallery: Embeddings,
  k: int,
  index: str = 'exact',
  *,
  without: Sequence[int] = (),
) -> Found:
  """The k images of a gallery that look most like one query.

  Args:
    query: [D] its embedding.
    gallery: what is searched.
    k: how many are wanted.
    index: one of `INDEXES`.
    without: rows of the gallery that are no results.

  Raises:
    UserError: FAISS is asked for and not installed.
  """
  find = {'exact': find_nearest, 'faiss': nearest_by_faiss}[index]
  vectors = gallery.vectors
  told_apart = apart_in(vectors)
  found = find(told_apart(query[None]), told_apart(vectors), k + len(without))
  kept = np.flatnonzero(~np.isin(found.rows[0], without))[:k]
  rows = found.rows[0][kept]
  cosines = unit_rows(vectors[rows]) @ unit_rows(query[None])[0]
  return Found(rows, found.similarities[0][kept], cosines)


def table(gallery: Embeddings, found: Found) -> str:
  """The result as lines of rank, both similarities and file name."""
  lines = ['rank  likeness  cosine  file']
  for rank, (row, similarity, cosine) in enumerate(zip(*found), 1):
    name = canvas.printable(gallery.file_names[row])
    lines.append(f'{rank:4}  {similarity:8.3f}  {cosine:6.3f}  {name}')
  return '\n'.join([*lines, '', _ABOUT.format(count=MIN_VECTORS)])


def picture_beside(path: pathlib.Path) -> pathlib.Path:
  """The picture that goes with a CSV file of results."""
  return path.with_name(f'{path.stem}_images.png')


def check(output: pathlib.Path, top_k: int, index: str) -> None:
  """Raises UserError for what cannot be, before the work begins."""
  if output.suffix != '.csv':
    raise UserError(f'--output is {output}: give a name that ends in .csv')
  if top_k < 1:
    raise UserError(f'--top_k is {top_k}: make it at least 1')
  if index == 'faiss':
    _faiss()


def save_results(
  path: pathlib.Path,
  query: pathlib.Path,
  gallery: Embeddings,
  found: Found,
) -> pathlib.Path:
  """Writes the result as CSV, and as a picture beside it.

  Args:
    path: of the CSV file, with the columns rank, likeness, similarity and file.
    query: the image that was searched for.
    gallery: what was searched.
    found: the result.

  Returns:
    The PNG file: the query, then what was found, row by row.

  Raises:
    UserError: the folder can't be written.
  """
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(['rank', 'likeness', 'similarity', 'file'])
  for rank, (row, *similarities) in enumerate(zip(*found), 1):
    numbers = [f'{x:.6f}' for x in similarities]
    writer.writerow([rank, *numbers, gallery.file_names[row]])
  files = [gallery.folder / gallery.file_names[row] for row in found.rows]
  titles = [
    f'{rank}: {x:.2f} {f.name}'
    for rank, (x, f) in enumerate(zip(found.likeness, files), 1)
  ]
  picture = picture_beside(path)
  content = _sheet([query, *files], [f'query {query.name}', *titles])
  with disk_errors.writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    # Names need not be valid UTF-8.
    write_atomically(path, text.getvalue().encode(errors='surrogateescape'))
    write_atomically(picture, content)
  return picture


def _cell(path: pathlib.Path, title: str) -> Image.Image:
  cell = Image.new('RGB', (_CELL_PX, _CELL_PX + _TEXT_PX), 'white')
  try:
    image = image_files.open_rgb(path, min_px=_CELL_PX)
    image.thumbnail((_CELL_PX - 4, _CELL_PX - 4))
    left, top = (_CELL_PX - side for side in image.size)
    cell.paste(image, (left // 2, top // 2))
  except (OSError, ValueError):
    title = f'(gone) {title}'
  # The built-in font has Latin letters alone.
  title = title.encode('ascii', 'replace').decode()
  draw = ImageDraw.Draw(cell)
  for line in range(2):
    text = title[24 * line : 24 * (line + 1)]
    draw.text((4, _CELL_PX + 14 * line), text, fill='black')
  return cell


def _sheet(files: list[pathlib.Path], titles: list[str]) -> bytes:
  rows = -(-len(files) // _COLUMNS)
  height = _CELL_PX + _TEXT_PX
  columns = min(_COLUMNS, len(files))
  sheet = Image.new('RGB', (columns * _CELL_PX, rows * height), 'white')
  for number, (file, title) in enumerate(zip(files, titles)):
    row, column = divmod(number, _COLUMNS)
    sheet.paste(_cell(file, title), (column * _CELL_PX, row * height))
  buffer = io.BytesIO()
  sheet.save(buffer, 'PNG')
  return buffer.getvalue()
