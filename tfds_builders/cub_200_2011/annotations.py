"""The lists that come with CUB-200-2011."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from cmd_jax.errors import UserError
from tfds_builders import manual

PART_NAMES = (
  'back',
  'beak',
  'belly',
  'breast',
  'crown',
  'forehead',
  'left eye',
  'left leg',
  'left wing',
  'nape',
  'right eye',
  'right leg',
  'right wing',
  'tail',
  'throat',
)
_PART_IDS = [str(number) for number in range(1, len(PART_NAMES) + 1)]
# Every list and the number of values on each of its lines.
LISTS = {
  'classes.txt': 2,
  'images.txt': 2,
  'image_class_labels.txt': 2,
  'train_test_split.txt': 2,
  'bounding_boxes.txt': 5,
  'parts/part_locs.txt': 5,
}


class Annotation(NamedTuple):
  """What is known of an image, in its pixels.

  Attributes:
    label: index into the names of the classes.
    is_train: whether it is a training image.
    box: left, top, width and height.
    parts: [15, 2] float64 (y, x) of every part.
    is_visible: [15] bool; the place of the others means nothing.
  """

  label: int
  is_train: bool
  box: tuple[float, float, float, float]
  parts: np.ndarray
  is_visible: np.ndarray


def _finite(text: str) -> float:
  value = float(text)
  if not math.isfinite(value):
    raise ValueError(f'{text} is no place in an image')
  return value


def _parse(
  tables: Mapping[str, list[list[str]]],
) -> tuple[tuple[str, ...], dict[str, Annotation]]:
  label_of_class = {
    row[0]: label for label, row in enumerate(tables['classes.txt'])
  }
  label_of = dict(tables['image_class_labels.txt'])
  split_of = dict(tables['train_test_split.txt'])
  box_of = {
    i: tuple(map(_finite, box)) for i, *box in tables['bounding_boxes.txt']
  }
  parts = {image_id: np.zeros((len(PART_NAMES), 2)) for image_id in label_of}
  visible = {image_id: np.zeros(len(PART_NAMES), bool) for image_id in label_of}
  for image_id, part_id, x, y, is_visible in tables['parts/part_locs.txt']:
    part = _PART_IDS.index(part_id)
    parts[image_id][part] = _finite(y), _finite(x)
    visible[image_id][part] = {'1': True, '0': False}[is_visible]
  annotations = {
    file_name: Annotation(
      label=label_of_class[label_of[image_id]],
      is_train={'1': True, '0': False}[split_of[image_id]],
      box=box_of[image_id],
      parts=parts[image_id],
      is_visible=visible[image_id],
    )
    for image_id, file_name in tables['images.txt']
  }
  return tuple(name for _, name in tables['classes.txt']), annotations


def read_annotations(
  files: manual.Files,
) -> tuple[tuple[str, ...], dict[str, Annotation]]:
  """Reads the lists of CUB-200-2011, in the form its README describes.

  Args:
    files: the folder CUB_200_2011.

  Returns:
    The names of the classes and, by the name of its file below `images`, the
    annotation of every image.

  Raises:
    UserError: a list is missing, damaged, or does not fit another.
  """
  texts = manual.read_texts(files, LISTS)
  tables = {
    name: manual.table(texts[name], columns, f'{files}: {name}')
    for name, columns in LISTS.items()
  }
  try:
    return _parse(tables)
  except (KeyError, ValueError, IndexError) as e:
    raise UserError(
      f'{files}: the lists {", ".join(LISTS)} do not fit together '
      f'({type(e).__name__}: {manual.one_line(e)}); unpack the archive again'
    ) from e
