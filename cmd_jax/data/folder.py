"""A folder of images as a data source."""

from __future__ import annotations

import csv
import functools
import hashlib
import logging
import os
import posixpath
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from cmd_jax import errors
from cmd_jax.data import canvas
from cmd_jax.data import source as source_lib

IMAGE_EXTENSIONS = (
  '.jpg',
  '.jpeg',
  '.png',
  '.webp',
  '.bmp',
  '.gif',
  '.tif',
  '.tiff',
  '.ppm',
)
SPLITS = ('train', 'pretrain', 'test')
_LABELS_FILE = 'labels.csv'
_UNLABELED = 'unlabeled'
_GIVEN_SPLITS = {
  'train': 'train',
  'test': 'test',
  'val': 'val',
  _UNLABELED: _UNLABELED,
  'unlabelled': _UNLABELED,
}

_logger = logging.getLogger(__name__)


class _Listed(NamedTuple):
  """An image; `class_name` and `split` are '' where they are not given."""

  file_name: str
  class_name: str
  split: str


def _scan(root: str) -> list[str]:
  """Lists the images below `root` by posix path relative to it, sorted.

  Every real folder is listed once, which also ends loops of links. Links come
  last, so that a folder keeps its own name if it is reached by a link as well.
  """
  found = []
  seen = set()
  folders, links = [''], []
  while folders or links:
    if not folders:
      links.sort(reverse=True)
      folders.append(links.pop())
    folder = folders.pop()
    path = os.path.join(root, folder)
    try:
      stat = os.stat(path)
      if (stat.st_dev, stat.st_ino) in seen:
        continue
      seen.add((stat.st_dev, stat.st_ino))
      with os.scandir(path) as scan:
        entries = [entry for entry in scan if not entry.name.startswith('.')]
    except OSError as error:
      raise errors.UserError(
        f'cannot list the folder {path} ({error.strerror}); make it readable or'
        ' move it away'
      ) from error
    for entry in entries:
      name = posixpath.join(folder, entry.name)
      is_link = entry.is_symlink()
      # Unlike the entry's own test, this one doesn't raise for a looping link.
      if os.path.isdir(entry.path) if is_link else entry.is_dir():
        (links if is_link else folders).append(name)
      elif name.lower().endswith(IMAGE_EXTENSIONS):
        # A link to nowhere is listed, so that it is reported as unreadable.
        if is_link or entry.is_file():
          found.append(name)
  return sorted(found)


def _list_folders(file_names: Iterable[str]) -> list[_Listed]:
  """Takes splits and classes from the names of the folders."""
  listed = []
  for file_name in file_names:
    folders = file_name.split('/')[:-1]
    split = _GIVEN_SPLITS.get(folders[0].lower(), '') if folders else ''
    class_name = '/'.join(folders[1:] if split else folders)
    if split == _UNLABELED:
      class_name = ''
    listed.append(_Listed(file_name, class_name, split))
  return listed


def _read_csv(path: str) -> list[tuple[str, dict[str, str]]]:
  """Reads a CSV file into (place for messages, value by column) rows."""
  line = 0
  rows = []
  try:
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
      f' {",".join(header)!r}); let its first line be'
      ' file,class_name,label,split, the last two optional'
    )
  for place, values in rows:
    if len(values) != len(header):
      raise errors.UserError(
        f'{place}: {len(values)} values for {len(header)} columns; put quotes'
        ' around values that contain commas'
      )
  return [(place, dict(zip(header, values))) for place, values in rows]


def _check_file_name(place: str, name: str) -> str:
  """Gives the normal form of a file name, refusing one outside the folder."""
  normal = posixpath.normpath(name)
  if not name or normal == '.':
    raise errors.UserError(f'{place}: no file name; fill the column file')
  if posixpath.isabs(normal) or normal.split('/')[0] == '..':
    raise errors.UserError(
      f'{place}: {name} is outside the folder; give paths relative to it'
    )
  return normal


class _Labels:
  """Checks that classes and integer labels correspond one to one."""

  def __init__(self, path: str) -> None:
    self._path = path
    self._label_of: dict[str, int] = {}
    self._class_of: dict[int, str] = {}

  def add(self, place: str, class_name: str, text: str) -> None:
    if not text or (not class_name and text == str(source_lib.UNLABELLED)):
      return
    try:
      label = int(text)
    except ValueError:
      raise errors.UserError(
        f'{place}: label {text!r} is not an integer; mend it or drop the column'
      ) from None
    if not class_name:
      raise errors.UserError(
        f'{place}: label {label} without a class name; fill class_name'
      )
    other_label = self._label_of.setdefault(class_name, label)
    other_class = self._class_of.setdefault(label, class_name)
    if (other_label, other_class) != (label, class_name):
      raise errors.UserError(
        f'{place}: class {class_name!r} with label {label}, but earlier'
        f' {other_class!r} has {other_label if other_label != label else label}'
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
        f' {bare[0]!r}; fill the column label for all classes or drop it'
      )
    return tuple(sorted(class_names, key=self._label_of.__getitem__))


def _list_csv(
  root: str, path: str, scanned: Sequence[str]
) -> tuple[list[_Listed], _Labels]:
  """Takes splits and classes from a CSV file, sorted by file name."""
  listed: dict[str, _Listed] = {}
  labels = _Labels(path)
  for place, row in _read_csv(path):
    name = _check_file_name(place, row['file'])
    if name in listed:
      raise errors.UserError(
        f'{place}: {name} is listed twice; keep one of the rows'
      )
    class_name = row['class_name']
    labels.add(place, class_name, row.get('label', ''))
    split = row.get('split', '').lower()
    if split and split not in _GIVEN_SPLITS:
      raise errors.UserError(
        f'{place}: unknown split {split!r}; choose train, test, val or'
        ' unlabeled'
      )
    split = _GIVEN_SPLITS.get(split, '')
    if split == _UNLABELED:
      class_name = ''
    listed[name] = _Listed(name, class_name, split)
  if not listed:
    raise errors.UserError(f'{path} lists no images; add rows to it')
  known = set(scanned)
  if not any(
    name in known or os.path.exists(os.path.join(root, name)) for name in listed
  ):
    raise errors.UserError(
      f'{path}: none of the {len(listed)} files it lists exists, the first is'
      f' {next(iter(listed))}; give paths relative to {root}'
    )
  if ignored := len(known.difference(listed)):
    _logger.info('%s: %d images not in %s are ignored', root, ignored, path)
  return [listed[name] for name in sorted(listed)], labels


def _choose_held_out(
  listed: Iterable[_Listed], test_fraction: float, seed: int
) -> set[str]:
  """Chooses the files of the test part, class by class."""
  by_class = defaultdict(list)
  for item in listed:
    # File names need not be valid UTF-8.
    key = f'{seed}/{item.file_name}'.encode(errors='surrogateescape')
    digest = hashlib.blake2b(key, digest_size=8).digest()
    rank = int.from_bytes(digest, 'big') / 2**64
    by_class[item.class_name].append((rank, item.file_name))
  chosen = set()
  for ranked in by_class.values():
    ranked.sort()
    count = sum(rank < test_fraction for rank, _ in ranked)
    if test_fraction:
      count = max(count, 1)
    chosen.update(name for _, name in ranked[: min(count, len(ranked) - 1)])
  return chosen


def _assign_splits(
  listed: Sequence[_Listed], test_fraction: float, seed: int
) -> list[str]:
  """Gives the use of every image: train, test, unlabeled, or '' for none."""
  given = {item.split for item in listed}
  is_labelled = any(item.class_name for item in listed)
  held_out = set()
  if is_labelled and not given & {'test', 'val'}:
    held_out = _choose_held_out(
      [item for item in listed if item.class_name and not item.split],
      test_fraction,
      seed,
    )
  splits = []
  for item in listed:
    split = item.split or ('test' if item.file_name in held_out else 'train')
    if split == 'val':
      split = '' if 'test' in given else 'test'
    if is_labelled and not item.class_name:
      # Good for pre-training, unless they were set aside for testing.
      split = _UNLABELED if split in ('train', _UNLABELED) else ''
    splits.append(split)
  return splits


def _check_arguments(path: str, split: str, test_fraction: float) -> str:
  """Gives the path of the folder, or raises for one that is none."""
  if not path:
    raise errors.UserError(
      'no folder of images is given; set --config.dataset.path=FOLDER'
    )
  root = os.path.expanduser(path)
  if not os.path.isdir(root):
    problem = 'is not a folder' if os.path.exists(root) else 'does not exist'
    raise errors.UserError(
      f'{path} {problem}; set --config.dataset.path to a folder of images'
    )
  if split not in SPLITS:
    raise errors.UserError(
      f'{path}: unknown split {split!r}; choose one of {", ".join(SPLITS)}'
    )
  if not 0 <= test_fraction < 1:
    raise errors.UserError(
      f'{path}: test_fraction is {test_fraction}; set it to at least 0 and less'
      ' than 1'
    )
  return root


def _load(
  root: str, file_names: Sequence[str], decode_px: int, index: int
) -> source_lib.Example:
  path = os.path.join(root, file_names[index])
  return source_lib.Example(canvas.open_rgb(path, min_px=decode_px))


def folder_source(
  path: str,
  split: str,
  *,
  labels_file: str = _LABELS_FILE,
  test_fraction: float = 0.2,
  seed: int = 0,
  decode_px: int = 0,
) -> source_lib.Source:
  """Lists the images of a folder, with classes and splits where it has them.

  Classes and splits come from the labels file if there is one, with the header
  `file,class_name,label,split` (the last two optional), else from the folders:
  the class is the path of the image's folder. A folder at the top called train,
  test, val or unlabeled gives the split and is not part of the class. `val` is
  taken for `test` if there is no test, else it is left out.

  If neither test nor val is given, every labelled image without a split is put
  into `test` or `train` by a hash of the seed and its name, whatever other
  images there are; only to leave each class with one training image, and with
  one test image if it has two, is an image moved. Otherwise such images are
  `train`. A folder without classes is all `train`, unless it has splits.

  Args:
    path: the folder.
    split: 'train' for the labelled training images (all training images if
      there are no classes), 'pretrain' for these and the unlabelled ones, or
      'test'.
    labels_file: name of the labels file in the folder; '' for none.
    test_fraction: share of the labelled images to hold out, in [0, 1).
    seed: seed of the held-out part.
    decode_px: if positive, JPEG files may be decoded at a smaller scale, with
      at least this many pixels on their shorter side: see `canvas.open_rgb`.

  Returns:
    The source, sorted by file name; it may have no examples. All splits of a
    folder have the same classes. It can be pickled.

  Raises:
    UserError: the folder is missing or has no images, the labels file is wrong,
      or an argument is.
  """
  root = _check_arguments(path, split, test_fraction)
  scanned = _scan(root)
  csv_path = os.path.join(root, labels_file)
  if labels_file and (labels_file != _LABELS_FILE or os.path.exists(csv_path)):
    listed, labels = _list_csv(root, csv_path, scanned)
  elif scanned:
    listed, labels = _list_folders(scanned), _Labels('')
  else:
    raise errors.UserError(
      f'{path} has no images; put files there that end in'
      f' {", ".join(IMAGE_EXTENSIONS)}'
    )
  splits = _assign_splits(listed, test_fraction, seed)
  if unused := splits.count(''):
    _logger.info('%s: %d images are in no split and ignored', path, unused)
  class_names = labels.sort({i.class_name for i in listed if i.class_name})
  label_of = {name: label for label, name in enumerate(class_names)}
  wanted = ('train', _UNLABELED) if split == 'pretrain' else (split,)
  items = [item for item, s in zip(listed, splits) if s in wanted]
  file_names = tuple(item.file_name for item in items)
  return source_lib.Source(
    name=f'{os.path.basename(os.path.abspath(root))}/{split}',
    class_names=class_names,
    file_names=file_names,
    labels=np.array(
      [label_of.get(i.class_name, source_lib.UNLABELLED) for i in items],
      np.int32,
    ),
    load=functools.partial(_load, root, file_names, decode_px),
  )
