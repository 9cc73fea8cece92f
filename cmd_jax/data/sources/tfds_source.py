"""Reads data sets that TFDS prepares, without TensorFlow.

The builders of this project (`tfds_builders`) go before those that come with
TFDS. A set that is not there yet is prepared once, as ArrayRecord files.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import io
import os
import pkgutil
import shutil
import tempfile
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

import tfds_builders
from cmd_jax.data.image_files import open_rgb
from cmd_jax.data.inspect import kinds
from cmd_jax.data.sources.base import UNLABELLED, Example, Source
from cmd_jax.errors import UserError, missing_extra

if TYPE_CHECKING:
  import tensorflow_datasets as tfds

# Features under which sets store the name of an image's file.
_FILE_NAME_FEATURES = ('file_name', 'image/filename', 'image/file_name')


def tfds_source(
  name: str,
  split: str,
  *,
  data_dir: str | None = None,
  builder_config: str | None = None,
  decode_px: int = 0,
  grey16_white: int = kinds.TOP,
  progress: bool = True,
) -> Source:
  """Lists one split of a TFDS data set, which is prepared first if need be.

  Processes on one machine, or on one file system with file locks, may call
  this at once: one of them prepares the set and the others wait. On a remote
  file system (`gs://...`) prepare the set before several processes read it.

  Args:
    name: name of the builder, in this project or in TFDS, for instance
      'toybirds'; 'toybirds/32px' also names the builder config.
    split: a split of the set, 'train' for instance, or a slice, 'train[:10%]'.
    data_dir: where prepared sets are; None for the environment variable
      TFDS_DATA_DIR or else ~/tensorflow_datasets.
    builder_config: which of the builder's configs; None for its default.
    decode_px: if positive, JPEG images may be decoded at a smaller scale, with
      at least this many pixels on their shorter side: see
      `image_files.open_rgb`.
    grey16_white: value that is white in grey files of 16 bits, see
      `image_files.open_rgb`.
    progress: whether to show progress bars while a set is prepared.

  Returns:
    The split. Examples have `part_ids` where the set has a feature of this
    name, and a `box` where it has a feature 'bbox'.

  Raises:
    UserError: if there is no such builder, config or split, if the set can't
      be prepared (files to be fetched by hand are missing, for instance), or
      if it has no images or is not stored as ArrayRecord.
  """
  name, _, config_in_name = name.partition('/')
  builder_class = find_builder_class(name)
  config = builder_config or config_in_name or None
  check_config(builder_class, name, config)
  make = functools.partial(
    make_builder, builder_class, data_dir=data_dir, config=config
  )
  builder = _prepared(make, progress)
  return _source(builder, split, decode_px, grey16_white)


def find_builder_class(name: str) -> type[tfds.core.DatasetBuilder]:
  """The builder of a data set, ours before TFDS's own.

  Raises:
    UserError: no such data set.
  """
  try:
    import tensorflow_datasets as tfds
  except ModuleNotFoundError as error:
    raise missing_extra(
      f'the data set {name} needs tensorflow-datasets', 'tfds'
    ) from error
  own = [
    m.name for m in pkgutil.iter_modules(tfds_builders.__path__) if m.ispkg
  ]
  if name in own:
    module = f'tfds_builders.{name}.{name}_dataset_builder'
    return importlib.import_module(module).Builder
  try:
    return tfds.builder_cls(name)
  except ValueError as e:  # TFDS's DatasetNotFoundError, which isn't public.
    # Community sets are left out because their list is on the network.
    known = {*own, *tfds.list_builders(with_community_datasets=False)}
    similar = difflib.get_close_matches(name, sorted(known), n=3)
    raise UserError(
      f"no data set '{name}': this project has {', '.join(own)}; TFDS has "
      f'{len(known - set(own))} others'
      + (f'; similar names: {", ".join(similar)}' if similar else '')
    ) from e


def check_config(
  builder_class: type[tfds.core.DatasetBuilder], name: str, config: str | None
) -> None:
  """Raises UserError unless the builder has the config; None is its own."""
  valid = list(builder_class.builder_configs)
  if config is None or config in valid:
    return
  raise UserError(
    f"data set '{name}' has no builder config '{config}'; "
    + (f'choose one of: {", ".join(valid)}' if valid else 'leave it out')
  )


def make_builder(
  builder_class: type[tfds.core.DatasetBuilder], **arguments: Any
) -> tfds.core.DatasetBuilder:
  """Makes a builder, without the empty folder that TFDS leaves behind.

  For every builder whose set is not prepared it makes one in the folder of
  temporary files, for what Google's servers may know of the set.

  Args:
    builder_class: of the set.
    **arguments: of the class.
  """
  from tensorflow_datasets.core import dataset_info

  made = []

  def make_folder(*args):
    made.append(tempfile.mkdtemp(*args))
    return made[-1]

  # A name of that module alone.
  before = dataset_info.tempfile
  dataset_info.tempfile = types.SimpleNamespace(mkdtemp=make_folder)
  try:
    return builder_class(**arguments)
  finally:
    dataset_info.tempfile = before
    for folder in made:
      shutil.rmtree(folder, ignore_errors=True)


def _prepared(
  make: Callable[[], tfds.core.DatasetBuilder], progress: bool
) -> tfds.core.DatasetBuilder:
  builder = make()
  if builder.data_path.exists():
    return builder
  set_name = builder.info.full_name.replace('/', '-')
  try:
    with lock(builder.data_dir_root, set_name):
      # A builder looks for its files when it is made, and another process may
      # have prepared them meanwhile.
      builder = make()
      if not builder.data_path.exists():
        _prepare(builder, progress)
  except OSError as e:
    raise UserError(
      f'{builder.info.full_name} could not be prepared in {builder.data_dir}: '
      + one_line(str(e))
    ) from e
  return builder


def _prepare(builder: tfds.core.DatasetBuilder, progress: bool) -> None:
  name = builder.info.full_name
  instructions = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
  folder = manual_dir(builder)
  if instructions is not None and not (
    os.path.isdir(folder) and os.listdir(folder)
  ):
    # At once: training never fetches what a person has to.
    raise UserError(
      f'{name} is not prepared in {builder.data_dir_root}: fetch '
      f'{one_line(instructions)}, then `cmd-jax prepare` with this --config '
      'and --manual_dir=FOLDER of the files makes it'
    )
  try:
    with quiet(progress), downloads(builder, allowed=False):
      builder.download_and_prepare(file_format='array_record')
  except ImportError as e:
    raise UserError(
      f'{name} could not be prepared, a Python package that it needs is not '
      f'installed: {one_line(str(e))}'
    ) from e
  except (AssertionError, FileNotFoundError) as e:
    # TFDS reports a missing folder by the first, builders a missing file by
    # the second.
    if instructions is None:
      raise
    raise UserError(
      f'{name} needs files that must be fetched by hand and put into {folder}: '
      + one_line(instructions)
    ) from e


def manual_dir(builder: tfds.core.DatasetBuilder) -> str:
  """Where files fetched by hand are looked for unless told otherwise."""
  return os.path.join(builder.data_dir_root, 'downloads', 'manual')


@contextlib.contextmanager
def downloads(
  builder: tfds.core.DatasetBuilder, allowed: bool
) -> Iterator[None]:
  """Whether TFDS may fetch files meanwhile, which may be many gigabytes.

  Raises:
    UserError: it may not, and wants to.
  """
  if allowed:
    yield
    return
  from tensorflow_datasets import download

  def refuse(*args, **kwargs):
    del args, kwargs
    raise UserError(
      f'{builder.info.full_name} is not prepared in {builder.data_dir_root}: '
      '`cmd-jax prepare --download` with this --config fetches it'
    )

  manager = download.DownloadManager
  names = ('download', 'download_and_extract', 'download_kaggle_data')
  before = {name: getattr(manager, name) for name in names}
  for name in names:
    setattr(manager, name, refuse)
  try:
    yield
  finally:
    for name, method in before.items():
      setattr(manager, name, method)


def one_line(text: str) -> str:
  """A text without line breaks."""
  return ' '.join(text.split())


@contextlib.contextmanager
def quiet(progress: bool) -> Iterator[None]:
  """Keeps TFDS from printing, but for its progress bars if wanted."""
  from tensorflow_datasets.core.utils import tqdm_utils

  before = tqdm_utils._active
  tqdm_utils.display_progress_bar(before and progress)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    tqdm_utils.display_progress_bar(before)


@contextlib.contextmanager
def lock(folder: str | os.PathLike[str], name: str) -> Iterator[None]:
  """Holds a file lock, where the file system and the platform have them.

  TFDS itself writes to a folder with a random name and renames it in the end,
  but the process that renames last fails, and processes whose `random` module
  is seeded alike write to the same folder.
  """
  try:
    import fcntl
  except ImportError:
    fcntl = None
  if fcntl is None or '://' in os.fspath(folder):
    yield
    return
  os.makedirs(folder, exist_ok=True)
  with open(os.path.join(folder, f'.{name}.lock'), 'w') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _source(
  builder: tfds.core.DatasetBuilder,
  split: str,
  decode_px: int,
  grey16_white: int,
) -> Source:
  if not builder.info.splits:
    raise UserError(
      f'{builder.data_dir} is not a complete data set; delete it or choose '
      'another data_dir, and it is prepared anew'
    )
  features = builder.info.features
  if 'image' not in features:
    raise UserError(
      f"{builder.info.full_name} has no feature 'image' and can't be used; "
      f'it has: {", ".join(features)}'
    )
  records = _records(builder, split)
  file_name_feature = next(
    (name for name in _FILE_NAME_FEATURES if name in features), None
  )
  label = features['label'] if 'label' in features else None
  class_names = getattr(label, 'names', None) or ()
  labels = np.full(len(records), UNLABELLED, np.int32)
  file_names = [f'{split}_{i:06d}' for i in range(len(records))]
  if class_names or file_name_feature:
    for i in range(len(records)):
      record = records[i]
      if class_names:
        labels[i] = record['label']
      if file_name_feature:
        file_names[i] = record[file_name_feature].decode()
  return Source(
    name=f'{builder.info.full_name} {split}',
    class_names=tuple(class_names),
    file_names=tuple(file_names),
    labels=labels,
    load=functools.partial(_load, records, decode_px, grey16_white),
  )


def _records(builder: tfds.core.DatasetBuilder, split: str) -> Any:
  """The split's records as dicts, images still encoded."""
  import tensorflow_datasets as tfds

  skip = {
    name: tfds.decode.SkipDecoding()
    for name in ('image', 'part_ids')
    if name in builder.info.features
  }
  try:
    return builder.as_data_source(split, decoders=skip)
  except NotImplementedError as e:
    raise UserError(
      f'{builder.data_dir} is not stored as ArrayRecord; delete it or choose '
      'another data_dir, and it is prepared anew'
    ) from e
  except (ValueError, AssertionError) as e:
    raise UserError(
      f"{builder.info.full_name} has no split '{split}'; choose one of: "
      f'{", ".join(builder.info.splits)} (or a slice, such as train[:10%])'
    ) from e


def _load(
  records: Any, decode_px: int, grey16_white: int, index: int
) -> Example:
  record = records[index]
  part_ids = record.get('part_ids')
  box = record.get('bbox')
  return Example(
    image=open_rgb(
      io.BytesIO(record['image']), min_px=decode_px, grey16_white=grey16_white
    ),
    part_ids=None if part_ids is None else _decoded_part_ids(part_ids),
    box=None if box is None else np.asarray(box, np.float32),
  )


def _decoded_part_ids(encoded: bytes) -> np.ndarray:
  return np.asarray(Image.open(io.BytesIO(encoded), formats=['PNG']), np.uint8)
