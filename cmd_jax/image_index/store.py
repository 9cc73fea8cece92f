"""An index on disk: vectors that are memory-mapped, and what they are of.

A folder with

  index.json        which files belong to it, and the encoder; written last, so
                    that an index is what it was until all of a change is there
  vectors.f32       [N, D] float32, row by row; only ever appended to, and from
                    200 images on replaced by
  vectors-G.f32     the same whitened
  whitening-G.npz   by what
  items-G.npz       names, sizes and times of the files, classes, states
  lists-G.faiss     inverted lists over the first rows, of a large index
  lock              held while something is added

Rows are never taken out: one whose file has vanished or changed is no result.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

import cmd_jax
from cmd_jax.data.sources.base import UNLABELLED
from cmd_jax.data.sources.index import Names
from cmd_jax.errors import UserError
from cmd_jax.evaluators.whitening import project
from cmd_jax.files import safe_read
from cmd_jax.files.atomic import write_atomically
from cmd_jax.files.formats import VERSION_FIELD, check_format
from cmd_jax.files.safe_read import one_line

MANIFEST, VECTORS = 'index.json', 'vectors.f32'
# 2: vectors may be whitened.
_FORMAT_VERSION = 2
_OF_VECTORS = 'vectors*.f32', 'whitening-*.npz'
# States of a row: a result, its file gone, its file replaced by a later row.
LIVE, GONE, REPLACED = range(3)


class EncoderId(NamedTuple):
  """What vectors of one index have in common.

  Attributes:
    source: of the encoder as it was asked for, by which it is loaded again.
    sha256: of its weights.
    preprocessing: of its images: sizes of canvas and view, mean, deviation.
  """

  source: str
  sha256: str
  preprocessing: dict[str, Any]

  def same_vectors(self, other: EncoderId) -> bool:
    """Whether vectors of the two can be compared."""
    return (self.sha256, self.preprocessing) == (
      other.sha256,
      other.preprocessing,
    )


class Items(NamedTuple):
  """What the N rows of an index are.

  Attributes:
    names: [N] files: relative to the index's folder, or full paths.
    stamps: [N, 2] int64 time of the last change in ns, and size in bytes.
    labels: [N] int32 index into `class_names`, `UNLABELLED` for none.
    states: [N] int8, `LIVE` for a result.
    class_names: names of the classes.
    total: [D] float64 sum of the vectors of live rows.
  """

  names: Sequence[str]
  stamps: np.ndarray
  labels: np.ndarray
  states: np.ndarray
  class_names: tuple[str, ...]
  total: np.ndarray

  @property
  def live(self) -> np.ndarray:
    """[L] rows that are results."""
    return np.flatnonzero(self.states == LIVE)

  @property
  def mean(self) -> np.ndarray:
    """[D] float32 mean of the live rows."""
    return (self.total / max(len(self.live), 1)).astype(np.float32)


class Lists(NamedTuple):
  """The inverted lists of a large index.

  Attributes:
    file: name of their file.
    rows: how many rows they are of, from the first on.
    probes: lists looked at for a query.
    recall: share of the ten nearest that were found when they were made.
  """

  file: str
  rows: int
  probes: int
  recall: float


class Whitened(NamedTuple):
  """What was done to the vectors of an index.

  Attributes:
    file: with the matrix.
    matrix: [D, D], for `whitening.project`.
    images: how many live ones there were when it was learned.
  """

  file: str
  matrix: np.ndarray
  images: int


class Index(NamedTuple):
  """An index that is open.

  Attributes:
    path: its folder.
    folder: of the images that it was first built of.
    encoder: that made the vectors.
    items: what the rows are.
    dim: D.
    lists: of a large index; None without.
    generation: number of changes.
    vectors_file: name of the file of vectors.
    whitened: how they were whitened; None for those that the encoder gave.
  """

  path: pathlib.Path
  folder: pathlib.Path
  encoder: EncoderId
  items: Items
  dim: int
  lists: Lists | None = None
  generation: int = 0
  vectors_file: str = VECTORS
  whitened: Whitened | None = None

  def file_of(self, name: str) -> pathlib.Path:
    """The image of a name."""
    return self.folder / name

  def name_of(self, file: str | os.PathLike[str]) -> str:
    """The name that an image has here, whether it is in the index or not."""
    full, root = os.path.abspath(file), f'{self.folder}{os.sep}'
    if full.startswith(root):
      return full[len(root) :].replace(os.sep, '/')
    return full

  def like_rows(self, vectors: np.ndarray) -> np.ndarray:
    """Vectors [M, D] of the encoder as the rows of the index are."""
    if self.whitened is None:
      return vectors
    return project(vectors, self.whitened.matrix)

  def vectors(self) -> np.ndarray:
    """[N, D] float32, mapped and read where they are looked at."""
    count, path = len(self.items.names), self.path / self.vectors_file
    try:
      return np.memmap(path, '<f4', mode='r', shape=(count, self.dim))
    except (OSError, ValueError) as error:
      raise UserError(
        f'{path} does not hold {count} vectors '
        f'({one_line(error)}): build the index again'
      ) from error


def empty(
  path: pathlib.Path, folder: pathlib.Path, encoder: EncoderId, dim: int
) -> Index:
  """An index without an image, which is not on the disk yet."""
  items = Items(
    (),
    np.zeros((0, 2), np.int64),
    np.zeros(0, np.int32),
    np.zeros(0, np.int8),
    (),
    np.zeros(dim),
  )
  return Index(path, folder, encoder, items, dim)


def check_new(path: pathlib.Path) -> None:
  """Raises UserError if there is something where an index is to be built."""
  if (path / MANIFEST).exists():
    raise UserError(
      f'{path} is an index already: cmd-jax index add adds to it; choose '
      'another --index_dir, or delete it'
    )
  if path.exists() and not (path.is_dir() and not any(path.iterdir())):
    raise UserError(
      f'{path} is there already and is no index: choose another --index_dir'
    )


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
  """Lets one process add to an index at a time.

  Raises:
    UserError: another one does, or the folder can't be written.
  """
  try:
    path.mkdir(parents=True, exist_ok=True)
    with open(path / 'lock', 'ab') as file:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      yield
  except BlockingIOError as error:
    raise UserError(
      f'{path} is being added to by another process: wait until it ends'
    ) from error
  except OSError as error:
    raise UserError(
      f'{path} cannot be written ({error.strerror}): choose another '
      '--index_dir, or make room there'
    ) from error


def discard(path: pathlib.Path) -> None:
  """Takes away what is left of an index that has never been one."""
  with contextlib.suppress(OSError):
    for pattern in (*_OF_VECTORS, 'lock'):
      for file in path.glob(pattern):
        file.unlink(missing_ok=True)
    path.rmdir()


def append(index: Index, vectors: np.ndarray) -> None:
  """Writes vectors [M, D] behind those of the index, which it has not yet.

  Whatever is there beyond the rows of the index, of a change that was not
  finished, is overwritten.
  """
  size = len(index.items.names) * index.dim * 4
  # Not 'ab', which would write behind the leftovers.
  path = index.path / index.vectors_file
  with open(path, 'r+b' if size else 'wb') as file:
    file.truncate(size)
    file.seek(size)
    file.write(np.ascontiguousarray(vectors, '<f4').tobytes())
    file.flush()
    os.fsync(file.fileno())


def extended(
  items: Items,
  names: Sequence[str],
  stamps: np.ndarray,
  labels: Sequence[str],
  vectors: np.ndarray,
) -> Items:
  """The items with M more behind them; a class is '' where there is none."""
  label_of = {name: label for label, name in enumerate(items.class_names)}
  numbers = [
    label_of.setdefault(name, len(label_of)) if name else UNLABELLED
    for name in labels
  ]
  return Items(
    (*items.names, *names),
    np.concatenate([items.stamps, stamps]),
    np.append(items.labels, np.int32(numbers)),
    np.append(items.states, np.zeros(len(names), np.int8)),
    tuple(label_of),
    items.total + vectors.sum(0, dtype=np.float64),
  )


def commit(index: Index) -> Index:
  """Makes the index on the disk this one, whose vectors are appended.

  Returns:
    The index, a generation later.
  """
  old, generation = index.generation, index.generation + 1
  items, names = index.items, Names.of(index.items.names)
  buffer = io.BytesIO()
  np.savez(
    buffer,
    blob=names.blob,
    ends=names.ends,
    stamps=items.stamps,
    labels=items.labels,
    states=items.states,
    class_names=np.frombuffer(json.dumps(items.class_names).encode(), 'u1'),
    total=items.total,
  )
  write_atomically(index.path / f'items-{generation}.npz', buffer.getvalue())
  whitened = index.whitened
  manifest = {
    VERSION_FIELD: _FORMAT_VERSION,
    'cmd_jax_version': cmd_jax.__version__,
    'generation': generation,
    'folder': str(index.folder),
    'rows': len(items.names),
    'dim': index.dim,
    'encoder': index.encoder._asdict(),
    'lists': index.lists and index.lists._asdict(),
    'vectors': index.vectors_file,
    'whitened': whitened and {'file': whitened.file, 'images': whitened.images},
  }
  before = _files_of_vectors(index.path)
  write_atomically(index.path / MANIFEST, json.dumps(manifest, indent=2) + '\n')
  # Whoever opened the index a moment ago still reads the last ones.
  kept = {f'items-{x}.npz' for x in (old, generation)} | before
  kept |= {index.lists and index.lists.file, index.vectors_file}
  kept |= {whitened and whitened.file}
  for pattern in ('items-*.npz', 'lists-*.faiss', *_OF_VECTORS):
    for path in index.path.glob(pattern):
      if path.name not in kept:
        path.unlink(missing_ok=True)
  return index._replace(generation=generation)


def _files_of_vectors(path: pathlib.Path) -> set[str]:
  """Names of the files that the manifest on the disk says vectors are in."""
  try:
    manifest = safe_read.parse_json((path / MANIFEST).read_text())
    whitened = manifest.get('whitened') or {}
    return {manifest.get('vectors', VECTORS), whitened.get('file')}
  except (OSError, ValueError):
    return set()


def _read_whitened(
  path: pathlib.Path, said: dict[str, Any] | None, dim: int
) -> Whitened | None:
  if not said:
    return None
  with (path / said['file']).open('rb') as file:
    matrix = safe_read.read_npz(file)['matrix']
  if matrix.shape != (dim, dim) or matrix.dtype != np.float32:
    raise ValueError(f'its whitening has the shape {matrix.shape}')
  return Whitened(said['file'], matrix, said['images'])


def _read_items(path: pathlib.Path, rows: int, dim: int) -> Items:
  with path.open('rb') as file:
    arrays = safe_read.read_npz(file)
  items = Items(
    tuple(Names(arrays['blob'], arrays['ends'])),
    arrays['stamps'],
    arrays['labels'],
    arrays['states'],
    tuple(safe_read.parse_json(arrays['class_names'].tobytes().decode())),
    arrays['total'],
  )
  lengths = {len(field) for field in items[:4]}
  if lengths != {rows} or items.total.shape != (dim,):
    raise ValueError(f'{lengths} rows of {items.total.shape}')
  return items


def open_index(path: pathlib.Path) -> Index:
  """Opens an index.

  Raises:
    UserError: there is none, or it is damaged or of a newer program.
  """
  file = path / MANIFEST
  if not file.exists():
    raise UserError(
      f'{path} is no index (it has no {MANIFEST}): give --index_dir one that '
      'cmd-jax index build made'
    )
  try:
    manifest = safe_read.parse_json(file.read_text())
    check_format(manifest, _FORMAT_VERSION, file)
    generation, rows = manifest['generation'], manifest['rows']
    dim, lists = manifest['dim'], manifest['lists']
    if not all(type(x) is int and x >= 0 for x in (generation, rows, dim)):
      raise ValueError('its counts are no numbers')
    # An index of format 1 says neither.
    vectors, said = manifest.get('vectors', VECTORS), manifest.get('whitened')
    files = [vectors, *(x['file'] for x in (lists, said) if x)]
    if any(os.path.basename(name) != name for name in files):
      raise ValueError('its files are elsewhere')
    items = _read_items(path / f'items-{generation}.npz', rows, dim)
    return Index(
      path,
      pathlib.Path(manifest['folder']),
      EncoderId(**manifest['encoder']),
      items,
      dim,
      Lists(**lists) if lists else None,
      generation,
      vectors,
      _read_whitened(path, said, dim),
    )
  except (LookupError, OSError, TypeError, ValueError) as error:
    raise UserError(
      f'{path} is damaged ({one_line(error)}): build the index again'
    ) from error
