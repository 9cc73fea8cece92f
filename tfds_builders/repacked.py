"""Layouts in which mirrors offer data sets: class folders and Parquet files.

They have the images and their classes but nothing else. What is known of the
published set, the names of its classes and the numbers of its images, is
compared; that no image changed its split can't be told.
"""

from __future__ import annotations

import contextlib
import pathlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cmd_jax.errors import UserError, missing_extra
from cmd_jax.files import safe_read
from tfds_builders import manual

if TYPE_CHECKING:
  import pyarrow

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png')
TRAIN_TEST = {
  'train': ('train', 'training'),
  'test': ('test', 'testing', 'val', 'valid', 'validation'),
}
TRAIN_VAL_TEST = {
  'train': ('train', 'training'),
  'trainval': ('trainval',),
  'val': ('val', 'valid', 'validation'),
  'test': ('test', 'testing'),
}
# The image bytes of this many rows are in memory at once.
_ROWS = 64


class Listing(NamedTuple):
  """The images of a re-packed set.

  Attributes:
    files: where they are read from.
    labels: label of every file by split and name.
  """

  files: manual.Files
  labels: dict[str, dict[str, int]]


def read_list(path: pathlib.Path) -> tuple[str, ...]:
  """Reads a list that comes with a builder, one item a line."""
  return tuple(path.read_text(encoding='utf-8').splitlines())


def _key(class_name: str) -> str:
  """What is left of a name when it has been made the name of a folder."""
  name = re.sub(r'^\d{3}\.', '', class_name)
  return re.sub(r'[^a-z0-9]', '', name.lower())


def match_classes(
  found: Collection[str],
  class_names: Sequence[str],
  where: str,
  *,
  is_whole: bool = True,
) -> dict[str, int]:
  """Finds the official class behind names that mirrors have changed.

  Case, punctuation, spaces and a number of three digits in front are ignored.

  Args:
    found: names of classes in the files.
    class_names: the official ones, in the order of the labels.
    where: the files, for messages.
    is_whole: whether every official class must be found.

  Returns:
    The label of every name found.

  Raises:
    UserError: a name is not one of the official ones, two are the same one, or
      a class is missing.
  """
  label_of = {_key(name): label for label, name in enumerate(class_names)}
  if unknown := sorted(name for name in found if _key(name) not in label_of):
    raise UserError(
      f'{where}: {len(unknown)} of {len(found)} classes are not in the '
      f'official list: {", ".join(unknown[:5])}; use a mirror with the '
      'official names'
    )
  labels = {name: label_of[_key(name)] for name in sorted(found)}
  if len({*labels.values()}) < len(labels):
    twice = next(
      (a, b) for a in labels for b in labels if a < b and labels[a] == labels[b]
    )
    raise UserError(f'{where}: {twice[0]} and {twice[1]} are the same class')
  lacking = [
    name
    for label, name in enumerate(class_names)
    if label not in {*labels.values()}
  ]
  if is_whole and lacking:
    raise UserError(
      f'{where} has {len(labels)} classes, not {len(class_names)}; missing: '
      f'{", ".join(lacking[:5])}'
    )
  return labels


def _split_of(name: str, splits: Mapping[str, Sequence[str]]) -> str | None:
  return next((s for s, names in splits.items() if name.lower() in names), None)


def _has_train_and_test(splits: Collection[str]) -> bool:
  return 'test' in splits and ('train' in splits or 'trainval' in splits)


def _share_known(found: Collection[str], class_names: Sequence[str]) -> float:
  known = {_key(name) for name in class_names}
  return sum(_key(name) in known for name in found) / max(len(found), 1)


def _class_images(folder: pathlib.Path) -> dict[str, list[str]]:
  """Names of the images in every folder of `folder`."""
  return {
    child.name: sorted(
      file.name
      for file in child.iterdir()
      if file.suffix.lower() in IMAGE_SUFFIXES and file.name[0] != '.'
    )
    for child in sorted(folder.iterdir())
    if child.is_dir() and child.name[0] != '.'
  }


def class_folders(
  folder: manual.ManualFolder,
  class_names: Sequence[str],
  *,
  splits: Mapping[str, Sequence[str]] = TRAIN_TEST,
  is_whole: bool = True,
) -> Listing | None:
  """Lists a set laid out as <split>/<class>/<image>.

  Args:
    folder: where to look.
    class_names: the official names, in the order of the labels.
    splits: names that the folder of each split may have.
    is_whole: whether every official class must be there.

  Returns:
    The images, their names relative to the folder above the splits; None if
    there is no such layout with classes of this set.

  Raises:
    UserError: see `match_classes`.
  """
  for root, (folders, _) in folder.entries.items():
    split_folders = {
      split: name for name in folders if (split := _split_of(name, splits))
    }
    if not _has_train_and_test(split_folders):
      continue
    images = {s: _class_images(root / n) for s, n in split_folders.items()}
    found = {name for by_class in images.values() for name in by_class}
    if _share_known(found, class_names) < 0.5:
      continue
    where = str(root)
    labels = match_classes(found, class_names, where, is_whole=is_whole)
    return Listing(
      manual.Folder(root),
      {
        split: {
          f'{split_folders[split]}/{class_name}/{name}': labels[class_name]
          for class_name, names in by_class.items()
          for name in names
        }
        for split, by_class in images.items()
      },
    )
  return None


class _ParquetFiles:
  """Images in a column of Parquet files; see `manual.Files`."""

  def __init__(self, path_of: Mapping[str, pathlib.Path], column: str) -> None:
    self._path_of = path_of
    self._column = column

  def __str__(self) -> str:
    return ', '.join(self._path_of)

  def read(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
    wanted = frozenset(names)
    for file_name, path in self._path_of.items():
      row = 0
      for value in _values(path, self._column):
        name = f'{file_name}/{row:05d}'
        row += 1
        data = value.get('bytes') if isinstance(value, dict) else value
        if name in wanted and isinstance(data, bytes):
          yield name, data


@contextlib.contextmanager
def _open_parquet(path: pathlib.Path) -> Iterator[Any]:
  try:
    import pyarrow as pa
    import pyarrow.parquet
  except ImportError as error:
    raise missing_extra('Parquet needs pyarrow', 'export') from error
  try:
    with pyarrow.parquet.ParquetFile(path) as file:
      yield file
  except (
    *(pa.ArrowException, ArithmeticError, LookupError, MemoryError),
    *(OSError, TypeError, ValueError),
  ) as e:
    raise UserError(
      f'{path} is damaged ({manual.one_line(e)}); fetch it again'
    ) from e


def _values(path: pathlib.Path, column: str) -> Iterator[Any]:
  """The values of a column, a few rows in memory at once."""
  with _open_parquet(path) as file:
    for batch in file.iter_batches(_ROWS, columns=[column]):
      yield from batch.column(0).to_pylist()


def _image_column(schema: pyarrow.Schema) -> str | None:
  import pyarrow as pa

  for field in schema:
    kind = field.type
    if pa.types.is_struct(kind) and kind.get_field_index('bytes') >= 0:
      return field.name
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
      return field.name
  return None


def _label_columns(schema: pyarrow.Schema) -> dict[str, Sequence[str]]:
  """Names of the classes of every column that has them in the metadata."""
  text = (schema.metadata or {}).get(b'huggingface', b'{}')
  try:
    features = safe_read.parse_json(text)['info']['features'].items()
  except (AttributeError, LookupError, TypeError, ValueError):
    return {}
  return {
    column: feature['names']
    for column, feature in features
    if isinstance(feature, dict) and _are_names(feature.get('names'))
  }


def _are_names(value: Any) -> bool:
  return (
    isinstance(value, list)
    and bool(value)
    and all(isinstance(name, str) for name in value)
  )


def _parquet_paths(
  folder: manual.ManualFolder, splits: Mapping[str, Sequence[str]]
) -> dict[str, list[pathlib.Path]]:
  found: dict[str, list[pathlib.Path]] = {}
  for parent, (_, files) in folder.entries.items():
    for name in files:
      split = _split_of(re.split(r'[-.]', name)[0], splits)
      if split and name.endswith('.parquet'):
        found.setdefault(split, []).append(parent / name)
  return found


def parquet_files(
  folder: manual.ManualFolder,
  class_names: Sequence[str],
  *,
  splits: Mapping[str, Sequence[str]] = TRAIN_TEST,
  is_whole: bool = True,
) -> Listing | None:
  """Lists a set in Parquet files <split>-....parquet as model hubs have them.

  The files hold a column of encoded images and one of labels, whose names are
  in the metadata that the library `datasets` writes.

  Args:
    folder: where to look.
    class_names: the official names, in the order of the labels.
    splits: names that each split may have.
    is_whole: whether every official class must be there.

  Returns:
    The images, named by file and row; None if there are no such files.

  Raises:
    UserError: see `match_classes`; or a file is damaged.
  """
  found = _parquet_paths(folder, splits)
  if not _has_train_and_test(found):
    return None
  first = found['test'][0]
  with _open_parquet(first) as file:
    schema = file.schema_arrow
  image = _image_column(schema)
  columns = _label_columns(schema)
  shares = {c: _share_known(names, class_names) for c, names in columns.items()}
  label = max(shares, key=shares.__getitem__, default=None)
  if image is None or label is None or shares[label] < 0.5:
    return None
  where = str(first.parent)
  official = match_classes(
    columns[label], class_names, where, is_whole=is_whole
  )
  to_label = [official[name] for name in columns[label]]
  path_of = {path.name: path for paths in found.values() for path in paths}
  return Listing(
    _ParquetFiles(path_of, image),
    {
      split: {
        f'{path.name}/{row:05d}': to_label[value]
        for path in paths
        for row, value in enumerate(_labels(path, label, len(to_label)))
      }
      for split, paths in found.items()
    },
  )


def _labels(path: pathlib.Path, name: str, count: int) -> Iterator[int]:
  for label in _values(path, name):
    if type(label) is not int or not 0 <= label < count:
      raise UserError(
        f'{path} has the label {manual.one_line(label)}, which is none of '
        f'{count}; fetch it again'
      )
    yield label


def find(
  folder: manual.ManualFolder,
  class_names: Sequence[str],
  *,
  splits: Mapping[str, Sequence[str]] = TRAIN_TEST,
  is_whole: bool = True,
) -> Listing | None:
  """Looks for class folders, then for Parquet files; None if neither is there.

  Args and errors are those of `class_folders`.
  """
  layouts: tuple[Callable[..., Listing | None], ...] = (
    class_folders,
    parquet_files,
  )
  for layout in layouts:
    found = layout(folder, class_names, splits=splits, is_whole=is_whole)
    if found:
      return found
  return None
