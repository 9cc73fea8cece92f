"""Classes and splits of a collection's images, from the names of folders."""

from __future__ import annotations

import array
import functools
import hashlib
import posixpath
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from cmd_jax.data.sources.index import Names
from cmd_jax.data.sources.spelling import composed

UNLABELED = 'unlabeled'
# What people call a split, and what it is called here.
GIVEN_SPLITS = {
  'train': 'train',
  'training': 'train',
  'test': 'test',
  'testing': 'test',
  'val': 'val',
  'valid': 'val',
  'validation': 'val',
  UNLABELED: UNLABELED,
  'unlabelled': UNLABELED,
}
# Folders that only hold those of the splits, as in `images/train`.
_HOLDERS = ('images', 'image', 'imgs', 'data', 'dataset')

# Splits of images; '' is none.
USES = ('', 'train', 'test', 'val', UNLABELED)
_NONE, _TRAIN, _TEST, _VAL, _FREE = range(len(USES))


class Listed(NamedTuple):
  """The images of a folder, sorted by name; in arrays, as they may be millions.

  Attributes:
    names: [N] posix paths relative to the folder.
    classes: names of classes, the first of them '' for none.
    class_ids: [N] int32 index into `classes`.
    splits: [N] index into `USES`; what is given, then what is made of it.
  """

  names: Names
  classes: list[str]
  class_ids: np.ndarray
  splits: np.ndarray


def make_listed(items: Iterable[tuple[str, str, str]]) -> Listed:
  """From (file name, class name, split) of every image, sorted by name."""
  class_ids, splits = array.array('i'), array.array('b')
  id_of = {'': 0}

  def note():
    for name, class_name, split in items:
      class_ids.append(id_of.setdefault(class_name, len(id_of)))
      splits.append(USES.index(split))
      yield name

  names = Names.of(note())
  return Listed(
    names,
    list(id_of),
    np.frombuffer(class_ids, np.int32),
    np.frombuffer(splits, np.int8),
  )


def list_folders(file_names: Iterable[str]) -> Listed:
  """Takes splits and classes from the names of the folders."""

  @functools.cache
  def of_folder(folder):
    folders = folder.split('/') if folder else []
    if (
      len(folders) > 1
      and folders[0].lower() in _HOLDERS
      and folders[1].lower() in GIVEN_SPLITS
    ):
      folders = folders[1:]
    split = GIVEN_SPLITS.get(folders[0].lower(), '') if folders else ''
    # Two folders of one name in two forms of Unicode are one class.
    class_name = composed('/'.join(folders[1:] if split else folders))
    return '' if split == UNLABELED else class_name, split

  return make_listed(
    (name, *of_folder(posixpath.dirname(name))) for name in file_names
  )


def _choose_held_out(
  listed: Listed, rows: np.ndarray, test_fraction: float, seed: int
) -> np.ndarray:
  """Chooses the rows of the test part, class by class, among the given ones."""

  def digest(name):
    # File names need not be valid UTF-8.
    key = f'{seed}/{name}'.encode(errors='surrogateescape')
    return hashlib.blake2b(key, digest_size=8).digest()

  digests = b''.join(map(digest, listed.names.take(rows)))
  ranks = np.frombuffer(digests, '>u8').astype(np.float64) / 2**64
  class_ids = listed.class_ids[rows]
  # Stable: images of one rank stay sorted by name.
  order = np.lexsort((ranks, class_ids))
  sizes = np.bincount(class_ids, minlength=len(listed.classes))
  counts = np.bincount(
    class_ids, ranks < test_fraction, minlength=len(listed.classes)
  ).astype(int)
  if test_fraction:
    counts = np.maximum(counts, 1)
  counts = np.minimum(counts, sizes - 1)
  firsts = np.cumsum(sizes) - sizes
  place = np.arange(len(rows)) - firsts[class_ids[order]]
  return rows[order[place < counts[class_ids[order]]]]


def assign_splits(
  listed: Listed, test_fraction: float, seed: int
) -> np.ndarray:
  """Gives the use of every image: train, test, val, unlabeled, or '' for none.

  Images given for validation are for tests where none are given for those.

  Returns:
    [N] index into `USES`.
  """
  given = listed.splits
  is_labelled = listed.class_ids > 0
  splits = np.where(given == _NONE, _TRAIN, given)
  has_test = (given == _TEST).any()
  if is_labelled.any() and not has_test and not (given == _VAL).any():
    rows = np.flatnonzero(is_labelled & (given == _NONE))
    splits[_choose_held_out(listed, rows, test_fraction, seed)] = _TEST
  splits[splits == _VAL] = _VAL if has_test else _TEST
  if is_labelled.any():
    # Good for pre-training, unless they were set aside for testing.
    free = np.isin(splits, (_TRAIN, _FREE))
    splits = np.where(is_labelled, splits, np.where(free, _FREE, _NONE))
  return splits.astype(np.int8)
