"""The photographs that `benchmarks.compare` wants, made of CUB-200-2011.

  python -m benchmarks.cub_folders --cub=CUB_200_2011 --out=photographs

CUB_200_2011 is what the authors' archive unpacks to. Written are, each with the
official split in labels.csv and the parts that can be seen in parts.csv,
cub100_box227: 100 classes, each image cropped to its box and squashed to 227 x
227 pixels; and cub20: 20 classes, uncropped, the shorter side at most 256
pixels. The published figures were made of such folders from elsewhere, whose
pixels differ by interpolation and JPEG compression.
"""

from __future__ import annotations

import argparse
import csv
import io
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from benchmarks import record
from cmd_jax.errors import UserError
from tfds_builders import manual, photos
from tfds_builders.cub_200_2011.annotations import Annotation, read_annotations

CUB100 = (
  *(1, 4, 7, 10, 12, 13, 14, 15, 16, 18, 19, 22, 24, 26, 28, 34, 35, 41, 42),
  *(46, 47, 48, 50, 51, 52, 53, 54, 55, 56, 57, 58, 60, 61, 63, 67, 68, 69, 70),
  *(73, 75, 77, 79, 80, 81, 83, 85, 86, 87, 88, 89, 90, 93, 94, 95, 96, 97, 98),
  *(100, 101, 105, 106, 109, 110, 114, 120, 123, 124, 132, 134, 136, 138, 139),
  *(140, 151, 152, 158, 159, 163, 164, 165, 166, 169, 170, 172, 176, 180, 181),
  *(184, 185, 186, 187, 188, 189, 190, 191, 192, 194, 195, 198, 200),
)
CUB20 = (
  *(4, 9, 10, 11, 12, 13, 14, 15, 16, 19, 20, 21, 23, 26, 28, 29, 30, 31, 33),
  34,
)
CROP_PX, SHORTER_PX, QUALITY = 227, 256, 95

# An image and its parts' (x, y) in its pixels -> the same of another.
_Change = Callable[
  [Image.Image, Annotation, np.ndarray], tuple[Image.Image, np.ndarray]
]


def crop(
  image: Image.Image, annotation: Annotation, parts: np.ndarray
) -> tuple[Image.Image, np.ndarray]:
  """The box of a bird, squashed to a square of `CROP_PX` pixels.

  Args:
    image: the photograph.
    annotation: of it.
    parts: [P, 2] x, y in its pixels.

  Returns:
    The square, and the parts in its pixels.
  """
  left, top, width, height = annotation.box
  left, right = np.clip(np.rint((left, left + width)), 0, image.width)
  top, bottom = np.clip(np.rint((top, top + height)), 0, image.height)
  box = tuple(map(int, (left, top, right, bottom)))
  size = (CROP_PX, CROP_PX)
  square = image.crop(box).resize(size, Image.Resampling.BILINEAR)
  return square, (parts - (left, top)) * CROP_PX / (right - left, bottom - top)


def shrink(
  image: Image.Image, _: Annotation, parts: np.ndarray
) -> tuple[Image.Image, np.ndarray]:
  """The whole photograph, its shorter side at most `SHORTER_PX` pixels.

  Args:
    image: the photograph.
    parts: [P, 2] x, y in its pixels.

  Returns:
    The smaller one, and the parts in its pixels.
  """
  factor = min(1.0, SHORTER_PX / min(image.size))
  size = tuple(max(1, round(factor * side)) for side in image.size)
  smaller = image.resize(size, Image.Resampling.LANCZOS)
  return smaller, parts * np.divide(size, image.size)


class Folder(NamedTuple):
  """A folder of photographs.

  Attributes:
    name: of the folder.
    classes: official numbers of its classes, from 1.
    change: what is done to an image.
  """

  name: str
  classes: tuple[int, ...]
  change: _Change


FOLDERS = (
  Folder('cub100_box227', CUB100, crop),
  Folder('cub20', CUB20, shrink),
)


def _write_csv(path: pathlib.Path, rows: Sequence[Sequence]) -> None:
  with path.open('w', newline='') as file:
    csv.writer(file, lineterminator='\n').writerows(rows)


def _write_image(
  folder: Folder, photo: photos.Photo, annotation: Annotation, to: pathlib.Path
) -> list[tuple]:
  """Writes an image; returns its rows of parts.csv."""
  image = Image.open(io.BytesIO(photo.data)).convert('RGB')
  parts = annotation.parts[:, ::-1]
  image, parts = folder.change(image, annotation, parts)
  name = photo.name.removeprefix('images/')
  (to / name).parent.mkdir(parents=True, exist_ok=True)
  image.save(to / name, 'JPEG', quality=QUALITY)
  return [
    (name, number + 1, f'{x:.1f}', f'{y:.1f}', 1)
    for number, (x, y) in enumerate(parts)
    if annotation.is_visible[number]
  ]


def make(folder: Folder, cub: pathlib.Path, out: pathlib.Path) -> None:
  """Writes a folder of photographs, whole or not at all, unless it is there.

  Args:
    folder: which.
    cub: the folder CUB_200_2011.
    out: where the folder is to be.

  Raises:
    UserError: something in `cub` is missing or damaged.
  """
  done, begun = out / folder.name, out / f'.{folder.name}.begun'
  if done.exists():
    print(f'{done} is there: left as it is')
    return
  files = manual.Folder(cub)
  names, annotations = read_annotations(files)
  # The names begin with the official numbers, and the lists are in their order.
  labels = {number - 1: label for label, number in enumerate(folder.classes)}
  chosen = {k: v for k, v in annotations.items() if v.label in labels}
  if len({x.label for x in chosen.values()}) < len(labels):
    raise UserError(f'{cub} lacks classes of {folder.name}: unpack it again')
  shutil.rmtree(begun, ignore_errors=True)
  begun.mkdir(parents=True)
  parts = [('file', 'part_id', 'x', 'y', 'visible')]
  wanted = [f'images/{name}' for name in chosen]
  for photo in photos.read_photos(files, wanted, folder.name):
    annotation = chosen[photo.name.removeprefix('images/')]
    parts += _write_image(folder, photo, annotation, begun)
  rows = [
    (
      name,
      names[x.label],
      labels[x.label],
      'train' if x.is_train else 'test',
    )
    for name, x in chosen.items()
  ]
  _write_csv(
    begun / 'labels.csv', [('file', 'class_name', 'label', 'split'), *rows]
  )
  _write_csv(begun / 'parts.csv', parts)
  begun.rename(done)
  print(f'{done}: {len(rows):,} images of {len(labels)} classes')


def main() -> None:
  """Makes the folders."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--cub', type=pathlib.Path, required=True)
  parser.add_argument('--out', type=pathlib.Path, required=True)
  options = parser.parse_args()
  for folder in FOLDERS:
    make(folder, options.cub, options.out)


if __name__ == '__main__':
  record.run_main(main)
