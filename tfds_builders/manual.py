"""Files that a user fetches by hand: finding, verifying and reading them.

What the builders of photographs share. Nothing here is left out in silence: a
file that is missing, altered or damaged ends the preparation with a message
that names it.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import gzip
import hashlib
import io
import os
import pathlib
import tarfile
from collections.abc import (
  Callable,
  Collection,
  Iterable,
  Iterator,
  Mapping,
  Sized,
)
from typing import IO, NamedTuple, Protocol

import tensorflow_datasets as tfds

from cmd_jax.errors import UserError
from cmd_jax.files import safe_read

# Bytes read from an archive at once.
_BLOCK = 1 << 20
# Bytes of one file of a set, none of which comes near; and how many times
# larger than itself an archive may become, beside that.
_MAX_FILE = 1 << 28
_MAX_EXPANSION = 32
_DOCS = 'docs/datasets.md tells which files each data set needs'


@dataclasses.dataclass
class ManualConfig(tfds.core.BuilderConfig):
  """How much of a set is expected.

  Attributes:
    is_whole: whether archives must be the original ones, and the numbers of
      classes and images the published ones.
  """

  is_whole: bool = True


WHOLE = ManualConfig(name='whole', description='The published set.')
QUICKTEST = ManualConfig(
  name='quicktest',
  description='Whatever part of the set is there, to try a program with.',
  is_whole=False,
)


class Original(NamedTuple):
  """A file as its authors published it.

  Attributes:
    name: name of the file.
    size: bytes; 0 if unknown.
    sha256: SHA-256 in hexadecimal digits; '' if unknown.
    where: where it is usually found.
    url: what `cmd-jax prepare --download` asks for; '' for nothing.
  """

  name: str
  size: int
  sha256: str
  where: str
  url: str = ''

  def __str__(self) -> str:
    return f'{self.name} ({self.size:,} bytes)' if self.size else self.name


def list_originals(originals: Iterable[Original]) -> str:
  """Names and sizes of files, and where they are usually found."""
  by_place: dict[str, list[str]] = {}
  for original in originals:
    by_place.setdefault(original.where, []).append(str(original))
  return '; '.join(
    f'{", ".join(names)}, usually found at {where}'
    for where, names in by_place.items()
  )


class Files(Protocol):
  """A place that files are read from by name."""

  def read(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """Yields (name, content) of those of `names` that are there."""


class Folder:
  """A folder; names are paths relative to it.

  Args:
    path: the folder.
  """

  def __init__(self, path: str | os.PathLike[str]) -> None:
    self.path = pathlib.Path(path)

  def __str__(self) -> str:
    return str(self.path)

  def read(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """See `Files`."""
    for name in names:
      path = self.path / name
      # What a list names may be anywhere; the folder itself may be ../x.
      is_below = '..' not in pathlib.PurePath(name).parts
      is_below = is_below and path.is_relative_to(self.path)
      if is_below and path.is_file():
        yield name, path.read_bytes()


class _Bounded(io.RawIOBase):
  """A file that ends in an error after so many bytes."""

  def __init__(self, file: IO[bytes], limit: int) -> None:
    self._file, self._left = file, limit

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: bytearray) -> int:
    data = self._file.read(len(buffer))
    self._left -= len(data)
    if self._left < 0:
      raise OSError('it expands to far more than an archive of photographs')
    buffer[: len(data)] = data
    return len(data)

  def close(self) -> None:
    self._file.close()
    super().close()


class Archive:
  """A tar archive, read from its beginning to its end.

  Args:
    path: the archive.
    root: folder in the archive that names are relative to.
  """

  def __init__(self, path: str | os.PathLike[str], root: str = '') -> None:
    self.path = pathlib.Path(path)
    self._prefix = f'{root}/' if root else ''

  def __str__(self) -> str:
    return str(self.path)

  def _open(self) -> IO[bytes]:
    with self.path.open('rb') as file:
      is_gzip = file.read(2) == b'\x1f\x8b'
    if not is_gzip:
      return self.path.open('rb')
    limit = _MAX_FILE + _MAX_EXPANSION * self.path.stat().st_size
    return io.BufferedReader(_Bounded(gzip.open(self.path), limit), _BLOCK)

  def _read(
    self, is_wanted: Callable[[str], bool]
  ) -> Iterator[tuple[str, bytes]]:
    try:
      with self._open() as content:
        with tarfile.open(fileobj=content, mode='r|', bufsize=_BLOCK) as tar:
          for member in tar:
            name = member.name.removeprefix('./')
            if not (member.isfile() and name.startswith(self._prefix)):
              continue
            name = name.removeprefix(self._prefix)
            if is_wanted(name):
              # The size of a sparse file may be anything.
              if member.issparse() or member.size > _MAX_FILE:
                raise tarfile.ReadError(f'{name} has {member.size:,} bytes')
              yield name, tar.extractfile(member).read()
        # The checksum of gzip is behind the end of the tar archive.
        while content.read(_BLOCK):
          pass
    # What tarfile raises for damaged headers is nearly anything.
    except Exception as e:
      raise UserError(
        f'{self.path} is damaged or incomplete ({one_line(e)}); fetch it again'
      ) from e

  def read(self, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """See `Files`.

    Raises:
      UserError: the archive is damaged, even behind the files asked for.
    """
    return self._read(frozenset(names).__contains__)

  def read_below(self, folder: str, suffix: str) -> Iterator[tuple[str, bytes]]:
    """Yields all files below a folder whose names end in `suffix`."""
    return self._read(
      lambda name: name.startswith(f'{folder}/') and name.endswith(suffix)
    )


class ManualFolder:
  """A folder of files fetched by hand, listed a few levels deep.

  People unpack archives into folders of various names, and mirrors nest them,
  so that files are looked for by name; those nearest to the top come first.

  Args:
    path: the folder; need not exist.
    depth: levels of folders below it that are listed.
  """

  def __init__(self, path: str | os.PathLike[str], depth: int = 3) -> None:
    self.path = pathlib.Path(path)
    self.entries: dict[pathlib.Path, tuple[list[str], list[str]]] = {}
    level = [self.path]
    for _ in range(depth + 1):
      level = [below for folder in level for below in self._list(folder)]

  def _list(self, folder: pathlib.Path) -> list[pathlib.Path]:
    try:
      with os.scandir(folder) as scan:
        found = [e for e in scan if not e.name.startswith('.')]
        folders = sorted(e.name for e in found if e.is_dir())
        files = sorted(e.name for e in found if e.is_file())
    except OSError:
      return []
    self.entries[folder] = folders, files
    return [folder / name for name in folders]

  def file(self, *patterns: str) -> pathlib.Path | None:
    """The first file whose name matches one of the patterns, case ignored."""
    for folder, (_, files) in self.entries.items():
      for pattern in patterns:
        for name in files:
          if fnmatch.fnmatchcase(name.lower(), pattern.lower()):
            return folder / name
    return None

  def folder_with(self, *names: str) -> pathlib.Path | None:
    """The first folder that contains all these files and folders."""
    for folder, (folders, files) in self.entries.items():
      if {*names} <= {*folders, *files}:
        return folder
    return None

  def image_folder(self, name: str) -> pathlib.Path | None:
    """The first folder of this name that has JPEG files directly in it."""
    for folder, (_, files) in self.entries.items():
      # Of '.' and '..' it is that of the folder that they are.
      own = os.path.basename(os.path.abspath(folder))
      if own == name and any(f.lower().endswith('.jpg') for f in files):
        return folder
    return None


def missing(folder: pathlib.Path, *originals: Original) -> UserError:
  """The error for files that a folder lacks."""
  fetched = ', or let --download fetch it' if originals[0].url else ''
  return UserError(
    f'{folder} lacks {list_originals(originals)}. Put it there, or give its '
    f'folder as --manual_dir of cmd-jax prepare{fetched}; {_DOCS}'
  )


def verify(path: pathlib.Path, original: Original) -> None:
  """Compares a file with the original's size and SHA-256, where known.

  Raises:
    UserError: it is another file.
  """
  size = path.stat().st_size
  if original.size and size != original.size:
    raise UserError(
      f'{path} has {size:,} bytes, but the original {original.size:,}: it is '
      f'incomplete or another file; fetch it again from {original.where}'
    )
  if not original.sha256:
    return
  with path.open('rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
  if digest != original.sha256:
    raise UserError(
      f'{path} has the size of the original but other content (SHA-256 '
      f'{digest}, not {original.sha256}); fetch it again from {original.where}'
    )


def read_texts(files: Files, names: Collection[str]) -> dict[str, str]:
  """Reads small text files, all of which must be there.

  Raises:
    UserError: one is missing or not UTF-8.
  """
  found = dict(files.read(names))
  if lacking := sorted({*names} - {*found}):
    raise UserError(
      f'{files} lacks {", ".join(lacking)}; unpack the whole archive, {_DOCS}'
    )
  try:
    return {
      name: content.decode('utf-8-sig') for name, content in found.items()
    }
  except UnicodeDecodeError as e:
    raise UserError(
      f'{files}: a list is not text ({one_line(e)}); fetch it again'
    ) from e


def table(text: str, columns: int, where: str) -> list[list[str]]:
  """Splits lines at spaces into `columns` values; the last may have spaces.

  Raises:
    UserError: a line has fewer values.
  """
  rows = []
  for number, line in enumerate(text.splitlines(), 1):
    values = line.split(maxsplit=columns - 1)
    if not values:
      continue
    if len(values) < columns:
      raise UserError(
        f'{where}, line {number}: {len(values)} values where there should be '
        f'{columns}; fetch the file again'
      )
    rows.append([*values[:-1], values[-1].strip()])
  return rows


def check_counts(
  name: str, found: Mapping[str, int], expected: Mapping[str, int]
) -> None:
  """Compares the numbers of images and classes with the published ones.

  Args:
    name: name of the set.
    found: numbers of what was found, such as 'images in train'.
    expected: the published numbers.

  Raises:
    UserError: with both numbers, if any differs.
  """
  wrong = [
    f'{found.get(what, 0):,} {what}, not {n:,}'
    for what, n in expected.items()
    if found.get(what, 0) != n
  ]
  if wrong:
    raise UserError(
      f'this is not the published {name}: {"; ".join(wrong)}. Look for files '
      f'that were left out or added; {_DOCS}'
    )


def count_images(splits: Mapping[str, Sized]) -> dict[str, int]:
  """Number of images by split, as `check_counts` takes it."""
  return {f'images in {split}': len(images) for split, images in splits.items()}


def manual_folder(dl_manager: tfds.download.DownloadManager) -> ManualFolder:
  """Lists the download manager's manual directory, which may not exist."""
  try:
    path = dl_manager.manual_dir
  except AssertionError:
    # How TFDS says that the directory is missing or empty.
    path = pathlib.Path(dl_manager.download_dir, 'manual')
  return ManualFolder(path)


def one_line(error: Exception) -> str:
  """What an error says, on one line."""
  return safe_read.one_line(error) or type(error).__name__
