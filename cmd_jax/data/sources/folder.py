"""A folder of images as a data source."""

from __future__ import annotations

import collections
import functools
import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tqdm

from cmd_jax import errors
from cmd_jax.data import canvas, image_files, image_formats
from cmd_jax.data.inspect import kinds
from cmd_jax.data.sources import base as source_lib
from cmd_jax.data.sources import index, listing, not_photographs
from cmd_jax.data.sources.labels_file import Labels, list_csv

SPLITS = ('train', 'pretrain', 'test', 'val')
_LABELS_FILE = 'labels.csv'
# Smaller folders are listed faster than anyone notices.
_LEAST_INDEXED = 10_000
# A change so soon after another may leave the time stamp as it was.
_CLOCK_TICK_NS = 2_000_000_000


class _Scanned(NamedTuple):
  """What is below a folder.

  Attributes:
    names: image files, sorted.
    folders: the folders looked through.
    others: number of other files by extension, '' for none.
    workdirs: folders that are work directories of runs, not looked through.
    of_systems: folders that a storage system keeps, not looked through.
  """

  names: list[str]
  folders: list[str]
  others: collections.Counter[str]
  workdirs: list[str]
  of_systems: list[str]

  def notes(self) -> list[str]:
    """Sentences about what is not looked through."""
    return [
      *not_photographs.note_on(not_photographs.WORKDIRS, self.workdirs),
      *not_photographs.note_on(not_photographs.OF_SYSTEMS, self.of_systems),
    ]


def _scan(root: str) -> _Scanned:
  """Lists the images below `root` by posix path relative to it.

  Every real folder is listed once, which also ends loops of links. Links come
  last, so that a folder keeps its own name if it is reached by a link as well.
  """
  found, scanned, workdirs, of_systems = [], [], [], []
  others = collections.Counter()
  seen = set()
  folders, links = [''], []
  bar = tqdm.tqdm(desc=f'list {root}', unit=' images', delay=2, disable=None)
  with bar:
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
        if not_photographs.is_of_system(os.path.basename(folder)):
          of_systems.append(folder)
          continue
        # The folder that is asked for is read whatever it is.
        if folder and not_photographs.is_workdir(path):
          workdirs.append(folder)
          continue
        scanned.append(folder)
        before = len(found)
        with os.scandir(path) as scan:
          for entry in scan:
            _sort_in(entry, folder, found, folders, links, others)
        bar.update(len(found) - before)
      except OSError as error:
        raise errors.UserError(
          f'cannot list the folder {path} ({error.strerror}); make it readable '
          'or move it away'
        ) from error
  found.sort()
  return _Scanned(found, scanned, others, workdirs, of_systems)


def _sort_in(
  entry: os.DirEntry,
  folder: str,
  found: list[str],
  folders: list[str],
  links: list[str],
  others: collections.Counter[str],
) -> None:
  """Puts an entry of a folder where it belongs; hidden ones nowhere."""
  if entry.name.startswith('.'):
    return
  name = f'{folder}/{entry.name}' if folder else entry.name
  is_link = entry.is_symlink()
  # Unlike the entry's own test, this one doesn't raise for a looping link.
  if os.path.isdir(entry.path) if is_link else entry.is_dir():
    (links if is_link else folders).append(name)
  elif name.lower().endswith(image_formats.EXTENSIONS) and (
    # A link to nowhere is listed, so that it is reported as unreadable.
    is_link or entry.is_file()
  ):
    found.append(name)
  else:
    others[os.path.splitext(entry.name)[1].lower()] += 1


def _note_on_others(others: collections.Counter[str]) -> list[str]:
  """A sentence about the files that are no images by their names."""
  if not others:
    return []
  usual = ', '.join(
    f'{count:,} {canvas.printable(ending) or "without extension"}'
    for ending, count in others.most_common(5)
  )
  return [
    f'{others.total():,} other files of the folder are no images by their '
    f'names, most often: {usual}'
  ]


def _check_arguments(path: str, test_fraction: float) -> str:
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
  if not 0 <= test_fraction < 1:
    raise errors.UserError(
      f'{path}: test_fraction is {test_fraction}; set it to at least 0 and less'
      ' than 1'
    )
  return root


class Found(NamedTuple):
  """What is in a folder.

  Attributes:
    names: [N] posix paths relative to the folder, sorted.
    labels: [N] int32 index into `class_names`, `UNLABELLED` where unknown.
    splits: [N] int8 index into `listing.USES`.
    class_names: names of the classes.
    notes: sentences about files that are in no split.
  """

  names: index.Names
  labels: np.ndarray
  splits: np.ndarray
  class_names: tuple[str, ...]
  notes: tuple[str, ...]


def _list(
  root: str, scanned: _Scanned, csv_path: str, test_fraction: float, seed: int
) -> Found:
  """Gives the images found their classes and splits."""
  others = scanned.others.copy()
  notes = scanned.notes()
  if csv_path:
    others['.csv'] -= os.path.dirname(csv_path) == root.rstrip('/')
    listed, labels, told = list_csv(root, csv_path, scanned.names)
    notes += told
  else:
    listed, labels = listing.list_folders(scanned.names), Labels('')
    # Millions of strings, which are in `listed` now.
    scanned.names.clear()
  class_names = labels.sort(listed.classes[1:])
  label_of = {name: label for label, name in enumerate(class_names)}
  of_class = [label_of.get(n, source_lib.UNLABELLED) for n in listed.classes]
  splits = listing.assign_splits(listed, test_fraction, seed)
  if unused := int(np.sum(splits == 0)):
    notes.append(f'{unused:,} images of the folder are in no used split')
  if kept := int(np.sum(splits == listing.USES.index('val'))):
    notes.append(
      f'{kept:,} images of the folder are kept for validation, which '
      'config.eval.every_epochs asks for'
    )
  return Found(
    listed.names,
    np.array(of_class, np.int32)[listed.class_ids],
    splits,
    class_names,
    (*notes, *_note_on_others(+others)),
  )


def _stamps(paths: Sequence[str]) -> np.ndarray:
  """[P, 2] time stamps in ns and sizes in bytes; -1 where there is nothing."""
  stamps = np.full((len(paths), 2), -1, np.int64)
  for row, path in enumerate(paths):
    try:
      stat = os.stat(path)
      stamps[row] = stat.st_mtime_ns, stat.st_size
    except OSError:
      continue
  return stamps


def _from_index(kept: Mapping[str, np.ndarray]) -> Found | None:
  """What an index has; None if its arrays do not fit together."""
  names = index.names_of(kept)
  class_names, notes = (
    index.strings(kept, name) for name in ('class_names', 'notes')
  )
  if names is None or class_names is None or notes is None:
    return None
  if not (
    index.has_numbers(kept, 'labels', len(names), -1, len(class_names))
    and index.has_numbers(kept, 'splits', len(names), 0, len(listing.USES))
  ):
    return None
  return Found(names, kept['labels'], kept['splits'], class_names, notes)


def _list_once(
  root: str, labels_file: str, test_fraction: float, seed: int, index_file: str
) -> Found:
  """Lists a folder, or reads what an earlier listing of it found."""
  key = {
    'folder': os.path.realpath(root),
    'labels_file': labels_file,
    'test_fraction': test_fraction,
    'seed': seed,
    'splits': listing.USES,
    # Found by an earlier version, a folder may lack some.
    'extensions': image_formats.EXTENSIONS,
  }
  path = pathlib.Path(index_file).expanduser()
  if not index_file:
    path = index.default_path(key)
  kept = index.read_index(path, key)
  if kept is not None:
    watched = index.strings(kept, 'watched')
    paths = [os.path.join(root, name) for name in watched or ()]
    if watched and np.array_equal(_stamps(paths), kept.get('stamps')):
      found = _from_index(kept)
      if found is not None:
        return found
  csv_path = os.path.join(root, labels_file) if labels_file else ''
  if labels_file == _LABELS_FILE and not os.path.exists(csv_path):
    csv_path = ''
  start = time.time_ns()
  scanned = _scan(root)
  watched = [*scanned.folders, *([labels_file] if csv_path else [])]
  stamps = _stamps([os.path.join(root, name) for name in watched])
  found = _list(root, scanned, csv_path, test_fraction, seed)
  is_large = len(found.names) >= _LEAST_INDEXED
  if is_large and stamps[:, 0].max() < start - _CLOCK_TICK_NS:
    index.write_index(
      path,
      key,
      blob=found.names.blob,
      ends=found.names.ends,
      labels=found.labels,
      splits=found.splits,
      class_names=_as_bytes(found.class_names),
      notes=_as_bytes(found.notes),
      watched=_as_bytes(watched),
      stamps=stamps,
    )
  return found


def _as_bytes(names: Sequence[str]) -> np.ndarray:
  return np.frombuffer(json.dumps(list(names)).encode(), np.uint8)


def _load(
  root: str,
  file_names: Sequence[str],
  decode_px: int,
  grey16_white: int,
  channels: int,
  index: int,
) -> source_lib.Example:
  path = os.path.join(root, file_names[index])
  return source_lib.Example(
    image_files.open_image(
      path, channels=channels, min_px=decode_px, grey16_white=grey16_white
    )
  )


def find_images(
  path: str,
  labels_file: str = _LABELS_FILE,
  test_fraction: float = 0.0,
  seed: int = 0,
  index_file: str = '',
) -> Found:
  """Lists all images of a folder; arguments and errors as `folder_source`."""
  root = _check_arguments(path, test_fraction)
  found = _list_once(root, labels_file, test_fraction, seed, index_file)
  if not len(found.names):
    raise errors.UserError(
      f'{path} has no images; put files there that end in'
      f' {", ".join(image_formats.EXTENSIONS)}'
    )
  return found


def folder_source(
  path: str,
  split: str,
  *,
  labels_file: str = _LABELS_FILE,
  test_fraction: float = 0.2,
  seed: int = 0,
  decode_px: int = 0,
  grey16_white: int = kinds.TOP,
  channels: int = 3,
  index_file: str = '',
) -> source_lib.Source:
  """Lists the images of a folder, with classes and splits where it has them.

  Classes and splits come from the labels file if there is one, with the header
  `file,class_name,label,split` (the last two optional), else from the folders:
  the class is the path of the image's folder. A folder at the top called train,
  test, val or unlabeled gives the split and is not part of the class. `val` is
  taken for `test` if there is no test, and is never trained on.

  If neither test nor val is given, every labelled image without a split is put
  into `test` or `train` by a hash of the seed and its name, whatever other
  images there are; only to leave each class with one training image, and with
  one test image if it has two, is an image moved. Otherwise such images are
  `train`. A folder without classes is all `train`, unless it has splits.

  Args:
    path: the folder.
    split: 'train' for the labelled training images (all training images if
      there are no classes), 'pretrain' for these and the unlabelled ones,
      'test' or 'val'.
    labels_file: name of the labels file in the folder; '' for none.
    test_fraction: share of the labelled images to hold out, in [0, 1).
    seed: seed of the held-out part.
    index_file: where the listing is kept, if the folder is large, for later
      starts; '' for a file in the user's folder of caches. It is made anew
      when a folder's time stamp or the labels file has changed.
    decode_px: if positive, JPEG files may be decoded at a smaller scale, with
      at least this many pixels on their shorter side: see
      `image_files.open_rgb`.
    grey16_white: value that is white in grey files of 16 bits, see
      `image_files.open_rgb`.
    channels: C of the images, see `image_files.open_image`.

  Returns:
    The source, sorted by file name; it may have no examples. All splits of a
    folder have the same classes. It can be pickled.

  Raises:
    UserError: the folder is missing or has no images, the labels file is wrong,
      or an argument is.
  """
  if split not in SPLITS:
    raise errors.UserError(
      f'{path}: unknown split {split!r}; choose one of {", ".join(SPLITS)}'
    )
  root = os.path.expanduser(path)
  found = find_images(path, labels_file, test_fraction, seed, index_file)
  wanted = ('train', listing.UNLABELED) if split == 'pretrain' else (split,)
  rows = np.isin(found.splits, [listing.USES.index(name) for name in wanted])
  rows = np.flatnonzero(rows)
  file_names = found.names.take(rows)
  return source_lib.Source(
    name=f'{os.path.basename(os.path.abspath(root))}/{split}',
    class_names=found.class_names,
    file_names=file_names,
    labels=found.labels[rows],
    load=functools.partial(
      _load, root, file_names, decode_px, grey16_white, channels
    ),
    notes=found.notes,
    channels=channels,
  )
