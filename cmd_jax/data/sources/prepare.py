"""Prepares a data set of TFDS ahead of the first run that reads it."""

from __future__ import annotations

import functools
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from cmd_jax.data.sources import download as download_lib
from cmd_jax.data.sources import tfds_source
from cmd_jax.devices import stopping
from cmd_jax.errors import UserError

if TYPE_CHECKING:
  import tensorflow_datasets as tfds


class Prepared(NamedTuple):
  """A data set that is ready to be read.

  Attributes:
    name: name, builder config and version.
    folder: where it is.
    num_examples: number of examples by split.
    num_bytes: size of its files.
    is_new: whether it was prepared just now, rather than found.
  """

  name: str
  folder: str
  num_examples: dict[str, int]
  num_bytes: int
  is_new: bool

  def __str__(self) -> str:
    splits = ', '.join(f'{s} {n:,}' for s, n in self.num_examples.items())
    how = 'prepared' if self.is_new else 'already prepared'
    return (
      f'{self.name} {how} in {self.folder}: {splits} '
      f'({self.num_bytes / 1e6:,.1f} MB)'
    )


def prepare_config(
  dataset: Mapping[str, Any],
  *,
  manual_dir: str | None = None,
  download: bool = False,
  progress: bool = True,
) -> Prepared:
  """Prepares the data set that a config names.

  Args:
    dataset: `config.dataset` of cmd_jax/config/published.py as a dict.
    manual_dir: see `prepare`.
    download: see `prepare`.
    progress: see `prepare`.

  Returns:
    What was prepared.

  Raises:
    UserError: the config reads a folder, which needs no preparation; or see
      `prepare`.
  """
  if dataset['source'] != 'tfds':
    raise UserError(
      f'config.dataset.source is {dataset["source"]!r}, which is read as it is '
      'and needs no cmd-jax prepare'
    )
  return prepare(
    dataset['name'],
    # An empty string is how a config says None.
    builder_config=dataset['builder_config'] or None,
    data_dir=dataset['data_dir'] or None,
    manual_dir=manual_dir,
    download=download,
    progress=progress,
  )


def prepare(
  name: str,
  *,
  data_dir: str | None = None,
  builder_config: str | None = None,
  manual_dir: str | None = None,
  download: bool = False,
  progress: bool = True,
) -> Prepared:
  """Prepares a data set as ArrayRecord files, unless it is there already.

  A set appears in `data_dir` when it is complete. After an interruption the
  same command starts the set anew, without what the interrupted one left;
  downloads are kept and gone on with. Processes may call this at once
  under the conditions of `tfds_source`.

  Args:
    name: name of the builder, in this project or in TFDS; 'toybirds/32px' also
      names the builder config.
    data_dir: where prepared sets are; None for the environment variable
      TFDS_DATA_DIR or else ~/tensorflow_datasets.
    builder_config: which of the builder's configs; None for its default.
    manual_dir: folder of the files that were fetched by hand; None for
      `downloads/manual` in `data_dir`.
    download: whether to fetch what its authors publish and the folder lacks,
      and let a set of TFDS fetch what it needs. Nothing else ever does.
    progress: whether to show progress bars.

  Returns:
    What was prepared.

  Raises:
    UserError: there is no such builder, config or folder, a file in it is
      missing, damaged or another than the published one, or cannot be fetched.
  """
  name, _, config_in_name = name.partition('/')
  config = builder_config or config_in_name or None
  builder_class = tfds_source.find_builder_class(name)
  tfds_source.check_config(builder_class, name, config)
  make = functools.partial(
    tfds_source.make_builder, builder_class, data_dir=data_dir, config=config
  )
  builder = make()
  if builder.data_path.exists():
    return _describe(builder, is_new=False)
  if download and builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
    manual_dir = _fetch(builder, manual_dir, progress)
  folder = _check_manual_dir(builder, manual_dir)
  set_name = builder.info.full_name.replace('/', '-')
  try:
    with tfds_source.lock(builder.data_dir_root, set_name):
      # Another process may have prepared it meanwhile.
      builder = make()
      is_new = not builder.data_path.exists()
      if is_new:
        _remove_leftovers(builder)
        with stopping.giving_back(lambda: _remove_leftovers(builder)):
          _prepare_from(builder, folder, download, progress)
  except OSError as e:
    raise UserError(
      f'{builder.info.full_name} could not be prepared in {builder.data_dir}: '
      + tfds_source.one_line(str(e))
    ) from e
  return _describe(builder, is_new=is_new)


def _fetch(
  builder: tfds.core.DatasetBuilder, manual_dir: str | None, progress: bool
) -> str:
  """Fetches what the folder of manual files lacks, and gives the folder."""
  originals = getattr(builder, 'ORIGINALS', ())
  if not originals:
    raise UserError(
      f'--download: {builder.name} is not published where a program can fetch '
      'it; give as --manual_dir a folder of '
      + tfds_source.one_line(builder.MANUAL_DOWNLOAD_INSTRUCTIONS)
    )
  folder = os.path.expanduser(manual_dir or tfds_source.manual_dir(builder))
  for original in originals:
    download_lib.download(original, folder, progress=progress)
  return folder


def _check_manual_dir(
  builder: tfds.core.DatasetBuilder, manual_dir: str | None
) -> str | None:
  """Gives the folder with ~ replaced, or raises for one without files."""
  if not manual_dir:
    return None
  folder = os.path.expanduser(manual_dir)
  if os.path.isdir(folder) and os.listdir(folder):
    return folder
  problem = 'is empty' if os.path.isdir(folder) else 'is not a folder'
  needed = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
  raise UserError(
    f'--manual_dir={manual_dir} {problem}; '
    + (
      f'{builder.name} needs {tfds_source.one_line(needed)}'
      if needed
      else f'{builder.name} needs no files fetched by hand, leave it out'
    )
  )


def _remove_leftovers(builder: tfds.core.DatasetBuilder) -> None:
  """Removes what processes left that were killed while preparing this set.

  Called under the lock, so that no living process writes there.
  """
  if '://' in os.fspath(builder.data_dir):
    return
  # TFDS writes to incomplete.XXXXXX_1.0.0 and renames it in the end.
  version = builder.data_path.name
  parent = pathlib.Path(builder.data_dir).parent
  for path in parent.glob(f'incomplete.*_{version}'):
    shutil.rmtree(path)


def _prepare_from(
  builder: tfds.core.DatasetBuilder,
  manual_dir: str | None,
  download: bool,
  progress: bool,
) -> None:
  import tensorflow_datasets as tfds

  try:
    with tfds_source.quiet(progress), tfds_source.downloads(builder, download):
      builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=manual_dir),
        file_format='array_record',
      )
  except ImportError as e:
    raise UserError(
      f'{builder.info.full_name} needs a Python package that is not installed: '
      + tfds_source.one_line(str(e))
    ) from e
  except (AssertionError, FileNotFoundError) as e:
    # What builders raise for a missing manual folder and a missing file.
    needed = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    if needed is None:
      raise
    raise UserError(
      f'{builder.info.full_name} needs files fetched by hand in the folder '
      f'given as --manual_dir: {tfds_source.one_line(needed)}'
    ) from e


def _describe(builder: tfds.core.DatasetBuilder, *, is_new: bool) -> Prepared:
  splits = builder.info.splits
  if not splits:
    raise UserError(
      f'{builder.data_dir} is not a complete data set; delete it or choose '
      'another data_dir, and it is prepared anew'
    )
  return Prepared(
    name=builder.info.full_name,
    folder=os.fspath(builder.data_dir),
    num_examples={name: split.num_examples for name, split in splits.items()},
    num_bytes=sum(split.num_bytes for split in splits.values()),
    is_new=is_new,
  )
