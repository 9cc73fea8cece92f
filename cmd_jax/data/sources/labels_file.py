"""The file of labels in a folder of images."""

from __future__ import annotations

import csv
import os
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence

from cmd_jax import errors
from cmd_jax.data.sources import base as source_lib
from cmd_jax.data.sources.listing import (
  GIVEN_SPLITS,
  UNLABELED,
  Listed,
  make_listed,
)
from cmd_jax.data.sources.spelling import composed, find_files
from cmd_jax.files import safe_read
from cmd_jax.files.safe_read import one_line

# A longer label is none, and a message would have to quote it.
_MAX_DIGITS = 20
_COLUMNS = ('file', 'class_name', 'label', 'split')
_DELIMITER_NAMES = {',': 'commas', ';': 'semicolons', '\t': 'tabs'}
_DELIMITERS = tuple(_DELIMITER_NAMES)
# How a spreadsheet may say what is between values.
_SEP_LINE = re.compile(r'sep=([,;\t])', re.IGNORECASE)


def _column(name: str) -> str:
  """The normal form of a column's name: 'Class name' is class_name."""
  return re.sub(r'[\s_-]+', '_', name.strip().lower())


def _delimiter(lines: Sequence[str]) -> tuple[str, int]:
  """What is between values, by the header, and lines before the header."""
  if lines and (told := _SEP_LINE.fullmatch(lines[0].strip())):
    return told[1], 1
  header = next((line for line in lines if line.strip()), '')
  for delimiter in _DELIMITERS:
    reader = csv.reader([header], delimiter=delimiter, skipinitialspace=True)
    columns = {_column(name) for row in reader for name in row}
    if {'file', 'class_name'} <= columns:
      return delimiter, 0
  return _DELIMITERS[0], 0


def _read_rows(path: str) -> tuple[list[tuple[str, list[str]]], str]:
  """The (place for messages, values) of a CSV file, and its delimiter."""
  line = 0
  rows = []
  try:
    safe_read.check_regular(path)
    # utf-8-sig, because spreadsheets put a byte order mark in front.
    with open(path, encoding='utf-8-sig', newline='') as file:
      lines = file.readlines()
    delimiter, line = _delimiter(lines)
    skipped = line
    reader = csv.reader(
      lines[skipped:], delimiter=delimiter, strict=True, skipinitialspace=True
    )
    for values in reader:
      if any(values):
        place = f'{path}, line {line + 1}'
        rows.append((place, [value.strip() for value in values]))
      line = skipped + reader.line_num
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
  return rows, delimiter


def _read_csv(path: str) -> list[tuple[str, dict[str, str]]]:
  """Reads a CSV file into (place for messages, value by column) rows."""
  rows, delimiter = _read_rows(path)
  given = rows.pop(0)[1] if rows else []
  header = [_column(name) for name in given]
  missing = [name for name in ('file', 'class_name') if name not in header]
  if missing:
    raise errors.UserError(
      f'{path} lacks the column {" and ".join(missing)} (its header is'
      f' {one_line(delimiter.join(given))!r}); let its first line be'
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
        f' around values that contain {_DELIMITER_NAMES[delimiter]}'
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
) -> tuple[Listed, Labels, list[str]]:
  """Takes splits and classes from a CSV file.

  Values may be separated by commas, semicolons or tabs, and the header in
  letters of any case.

  Args:
    root: the folder.
    path: of the file.
    scanned: names of the images in the folder.

  Returns:
    The images listed, their labels, and sentences about names that are spelt in
    another way and about images that are not listed.

  Raises:
    UserError: the file cannot be read, or says what cannot be.
  """
  listed: dict[str, tuple[str, str, str]] = {}
  labels, places = Labels(path), {}
  for place, row in _read_csv(path):
    name = _check_file_name(place, row['file'])
    if name in listed:
      raise errors.UserError(
        f'{place}: {one_line(name)} is listed twice; keep one of the rows'
      )
    class_name = composed(row['class_name'])
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
    places[name] = place
  if not listed:
    raise errors.UserError(f'{path} lists no images; add rows to it')
  known = set(scanned)
  gone = {
    name: place
    for name, place in places.items()
    if name not in known and not os.path.lexists(os.path.join(root, name))
  }
  meant = find_files(gone, known.difference(listed) if gone else ())
  if len(gone) == len(listed) and not meant:
    raise errors.UserError(
      f'{path}: none of the {len(listed)} files it lists exists, the first is'
      f' {one_line(next(iter(listed)))}; give paths relative to {root}'
    )
  for name, file in meant.items():
    listed[file] = (file, *listed.pop(name)[1:])
  notes = _notes_on(os.path.basename(path), meant)
  if ignored := len(known.difference(listed)):
    notes.append(
      f'{ignored:,} images of the folder are not in {os.path.basename(path)}'
    )
  return make_listed(listed[name] for name in sorted(listed)), labels, notes


def _notes_on(title: str, meant: Mapping[str, str]) -> list[str]:
  """A sentence about names that are spelt in another way than the files are."""
  if not meant:
    return []
  # Two forms of one text look alike.
  name, file = map(ascii, next(iter(meant.items())))
  return [
    f'{len(meant):,} names in {title} are spelt otherwise than the files that '
    f'they mean, such as {one_line(name)} for {one_line(file)}'
  ]
