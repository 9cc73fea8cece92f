"""The lists that come with Stanford Cars, and their re-packed form."""

from __future__ import annotations

import csv
import math
import pathlib
from typing import Any, NamedTuple

from cmd_jax.errors import UserError
from tfds_builders import manual
from tfds_builders.stanford_cars.matlab import read_matlab


class Annotation(NamedTuple):
  """What is known of an image.

  Attributes:
    label: index into the names of the classes.
    box: edges left, top, right and bottom in pixels, 0 at the image's left and
      top edge; None if unknown.
  """

  label: int
  box: tuple[float, float, float, float] | None


def _variables(data: bytes, where: str) -> dict[str, Any]:
  try:
    return read_matlab(data)
  except ValueError as e:
    raise UserError(f'{where}: {manual.one_line(e)}; fetch it again') from e


def _edges(x1: float, y1: float, x2: float, y2: float) -> tuple[float, ...]:
  # The first pixel is (1, 1), and the last belongs to the box.
  edges = x1 - 1, y1 - 1, x2, y2
  if not all(map(math.isfinite, edges)):
    raise ValueError('a box that is not finite')
  return edges


def _box(row: dict[str, Any]) -> tuple[float, ...]:
  return _edges(*(row[f'bbox_{edge}'][0] for edge in ('x1', 'y1', 'x2', 'y2')))


def _damaged(where: str, error: Exception) -> UserError:
  return UserError(
    f'{where} does not have the fields of the original '
    f'({type(error).__name__}: {manual.one_line(error)}); fetch it again'
  )


def read_class_names(data: bytes, where: str) -> tuple[str, ...]:
  """Reads the names of the classes from cars_meta.mat or cars_annos.mat.

  Args:
    data: content of the file.
    where: its name, for messages.

  Raises:
    UserError: the file is damaged or another.
  """
  names = _variables(data, where).get('class_names')
  if not isinstance(names, list) or not names:
    names = [None]
  if not all(isinstance(name, str) for name in names):
    raise UserError(f'{where} has no names of classes; fetch it again')
  return tuple(names)


def read_split(data: bytes, where: str) -> dict[str, Annotation]:
  """Reads cars_train_annos.mat or cars_test_annos_withlabels.mat.

  Args:
    data: content of the file.
    where: its name, for messages.

  Returns:
    The annotation of every image by the name of its file.

  Raises:
    UserError: the file is damaged, another, or without labels.
  """
  variables = _variables(data, where)
  try:
    return {
      row['fname']: Annotation(int(row['class'][0]) - 1, _box(row))
      for row in variables['annotations']
    }
  except (ArithmeticError, LookupError, TypeError, ValueError) as e:
    raise _damaged(where, e) from e


def read_both_splits(
  data: bytes, where: str
) -> dict[str, dict[str, Annotation]]:
  """Reads cars_annos.mat, which lists all images and tells their split.

  Args:
    data: content of the file.
    where: its name, for messages.

  Returns:
    By split, the annotation of every image by its path.

  Raises:
    UserError: the file is damaged or another.
  """
  splits: dict[str, dict[str, Annotation]] = {'train': {}, 'test': {}}
  variables = _variables(data, where)
  try:
    for row in variables['annotations']:
      split = 'test' if row['test'][0] else 'train'
      annotation = Annotation(int(row['class'][0]) - 1, _box(row))
      splits[split][row['relative_im_path']] = annotation
  except (ArithmeticError, LookupError, TypeError, ValueError) as e:
    raise _damaged(where, e) from e
  return splits


def read_csv_boxes(
  path: pathlib.Path,
) -> dict[str, tuple[float, ...]]:
  """Reads boxes from a table as mirrors have it, with or without a header.

  Args:
    path: file with the columns name, x1, y1, x2, y2, class.

  Returns:
    The edges of every image's box by the name of its file.

  Raises:
    UserError: a line has other values.
  """
  boxes = {}
  number = 0
  try:
    with path.open(encoding='utf-8-sig', newline='') as file:
      for number, row in enumerate(csv.reader(file), 1):
        try:
          boxes[row[0]] = _edges(*map(float, row[1:5]))
        except (TypeError, ValueError, IndexError):
          if number > 1:
            raise
  except (csv.Error, OSError, TypeError, ValueError, IndexError) as e:
    raise UserError(
      f'{path}, line {number}: not name, x1, y1, x2, y2, class'
    ) from e
  return boxes
