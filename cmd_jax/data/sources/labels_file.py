"""The file of labels in a folder of images."""

from __future__ import annotations

import csv
import os
import posixpath
from collections.abc import Iterable, Sequence

from cmd_jax import errors
from cmd_jax.data.sources import base as source_lib
from cmd_jax.data.sources.listing import (
  GIVEN_SPLITS,
  UNLABELED,
  Listed,
  make_listed,
)
from cmd_jax.files import safe_read
from cmd_jax.files.safe_read import one_line

# A longer label is none, and a message would have to quote it.
_MAX_DIGITS = 20
_COLUMNS = ('file', 'class_name', 'label', 'split')


def _read_csv(path: str) -> list[tuple[str, dict[str, str]]]:
  """Reads a CSV file into (place for messages, value by column) rows."""
  line = 0
  rows = []
  try:
    safe_read.check_regular(path)
    # utf-8-sig, because spreadsheets put a byte order mark in front.
    with open(path, encoding='utf-8-sig', newline='') as file:
      reader = csv.reader(file, strict=True, skipinitialspace=True)
      for values in reader:
        if any(values):
          place = f'{path}, line {line + 1}'
          rows.append((place, [value.strip() for value in values]))
        line = reader.line_num
  except UnicodeDecodeError as error:
    raise errors.UserError(
      f'{path} is not UTF-8 text; save it again as CSV UTF-8'
    ) from error
  except csv.Error as error:
    raise errors.UserError(
      f'{path}, line {line + 1}: not valid CSV ({error}); mend the quotes'
    ) from error
  except OSError as error:
    raise errors.UserError(
      f'cannot read {path} ({error.strerror}); make it a readable CSV file'
    ) from error
  header = rows.pop(0)[1] if rows else []
  missing = [name for name in ('file', 'class_name') if name not in header]
  if missing:
    raise errors.UserError(
      f'{path} lacks the column {" and ".join(missing)} (its header is'
      f' {one_line(",".join(header))!r}); let its first line be'
      ' file,class_name,label,split, the last two optional'
    )
  twice = [name for name in _COLUMNS if header.count(name) > 1]
  if twice:
    raise errors.UserError(
      f'{path} has the column {twice[0]} twice; drop one of them'
    )
  for place, values in rows:
    if len(values) != len(header):
      raise errors.UserError(
        f'{place}: {len(values)} values for {len(header)} columns; put quotes'
        ' around values that contain commas'
      )
  # Others are of no use, and there may be many.
  numbers = {name: header.index(name) for name in _COLUMNS if name in header}
  return [
    (place, {name: values[number] for name, number in numbers.items()})
    for place, values in rows
  ]


def _check_file_name(place: str, name: str) -> str:
  """Gives the normal form of a file name, refusing one outside the folder."""
  normal = posixpath.normpath(name)
  if not name or normal == '.':
    raise errors.UserError(f'{place}: no file name; fill the column file')
  if posixpath.isabs(normal) or normal.split('/')[0] == '..':
    raise errors.UserError(
      f'{place}: {one_line(name)} is outside the folder; give paths '
      'relative to it'
    )
  return normal


class Labels:
  """Checks that classes and integer labels correspond one to one."""

  def __init__(self, path: str) -> None:
    self._path = path
    self._label_of: dict[str, int] = {}
    self._class_of: dict[int, str] = {}

  def add(self, place: str, class_name: str, text: str) -> None:
    """Notes a row's class and label, or raises UserError for a misfit."""
    if not text or (not class_name and text == str(source_lib.UNLABELLED)):
      return
    try:
      if len(text) > _MAX_DIGITS:
        raise ValueError
      label = int(text)
    except ValueError:
      raise errors.UserError(
        f'{place}: label {one_line(text, 40)!r} is not an integer; '
        'mend it or drop the column'
      ) from None
    if not class_name:
      raise errors.UserError(
        f'{place}: label {label} without a class name; fill class_name'
      )
    other_label = self._label_of.setdefault(class_name, label)
    other_class = self._class_of.setdefault(label, class_name)
    if (other_label, other_class) != (label, class_name):
      raise errors.UserError(
        f'{place}: class {one_line(class_name)!r} with label {label}, but '
        f'earlier {one_line(other_class)!r} has {other_label}'
        '; give every class one label of its own'
      )

  def sort(self, class_names: Iterable[str]) -> tuple[str, ...]:
    """Orders classes by label if they have one, else by name."""
    class_names = sorted(class_names)
    if not self._label_of:
      return tuple(class_names)
    bare = [name for name in class_names if name not in self._label_of]
    if bare:
      raise errors.UserError(
        f'{self._path}: {len(bare)} classes have no label, the first is'
        f' {one_line(bare[0])!r}; fill the column label for all '
        'classes or drop it'
      )
    return tuple(sorted(class_names, key=self._label_of.__getitem__))


def list_csv(
  root: str, path: str, scanned: Sequence[str]
) -> tuple[Listed, Labels, int]:
  """Takes splits and classes from a CSV file.

  Returns:
    The images listed, their labels, and how many of `scanned` are not listed.
  """
  listed: dict[str, tuple[str, str, str]] = {}
  labels = Labels(path)
  for place, row in _read_csv(path):
    name = _check_file_name(place, row['file'])
    if name in listed:
      raise errors.UserError(
        f'{place}: {one_line(name)} is listed twice; keep one of the rows'
      )
    class_name = row['class_name']
    labels.add(place, class_name, row.get('label', ''))
    split = row.get('split', '').lower()
    if split and split not in GIVEN_SPLITS:
      raise errors.UserError(
        f'{place}: unknown split {one_line(split)!r}; choose train, test, '
        'val or unlabeled'
      )
    split = GIVEN_SPLITS.get(split, '')
    if split == UNLABELED:
      class_name = ''
    listed[name] = (name, class_name, split)
  if not listed:
    raise errors.UserError(f'{path} lists no images; add rows to it')
  known = set(scanned)
  if not any(
    name in known or os.path.exists(os.path.join(root, name)) for name in listed
  ):
    raise errors.UserError(
      f'{path}: none of the {len(listed)} files it lists exists, the first is'
      f' {one_line(next(iter(listed)))}; give paths relative to {root}'
    )
  ignored = len(known.difference(listed))
  return make_listed(listed[name] for name in sorted(listed)), labels, ignored
