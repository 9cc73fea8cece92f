"""`cmd-jax embed`: the embeddings of a folder as a table."""

from __future__ import annotations

import io
import json
import pathlib
from typing import Any

import numpy as np

import cmd_jax
from cmd_jax.api import Encoder
from cmd_jax.data.canvas import Skipped
from cmd_jax.errors import UserError, missing_extra
from cmd_jax.export.images import Embeddings
from cmd_jax.files import disk_errors, safe_read
from cmd_jax.files.atomic import write_atomically
from cmd_jax.files.formats import VERSION_FIELD, check_format
from cmd_jax.files.safe_read import one_line

FORMATS = ('.parquet', '.npz')
_FORMAT_VERSION = 1

# Without which vectors mean something else.
_MUST_AGREE = ('encoder_sha256', 'preprocessing')


def describe(encoder: Encoder, embeddings: Embeddings) -> dict[str, str]:
  """What the vectors are of, as strings that go beside them."""
  return {
    VERSION_FIELD: str(_FORMAT_VERSION),
    'encoder': encoder.source,
    'encoder_sha256': encoder.hash,
    'preprocessing': json.dumps(encoder.preprocessing),
    'folder': str(embeddings.folder.absolute()),
    'skipped': json.dumps([list(item) for item in embeddings.skipped]),
    'cmd_jax_version': cmd_jax.__version__,
  }


def check_output(path: pathlib.Path) -> None:
  """Raises UserError for a file of another format, before the work begins."""
  if path.suffix not in FORMATS:
    raise UserError(
      f'--output is {path}: give a name that ends in {" or ".join(FORMATS)}'
    )
  if path.suffix == '.parquet':
    _pyarrow()


def save_embeddings(
  path: pathlib.Path, encoder: Encoder, embeddings: Embeddings
) -> None:
  """Writes file names and vectors with `describe` beside them.

  Parquet has the columns `file_name` and `embedding` (a list of D floats) and
  the description in the metadata of its schema; .npz has `file_names`,
  `vectors` [N, D] and each string of the description.

  Args:
    path: of the file, .parquet or .npz; an existing one is replaced whole.
    encoder: that made them.
    embeddings: the vectors.

  Raises:
    UserError: another ending, no pyarrow, or a folder that can't be written.
  """
  check_output(path)
  description = describe(encoder, embeddings)
  write = _npz if path.suffix == '.npz' else _parquet
  with disk_errors.writing(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write(embeddings, description))


def load_embeddings(path: pathlib.Path, encoder: Encoder) -> Embeddings:
  """Reads what `save_embeddings` wrote.

  Args:
    path: of the file, .parquet or .npz.
    encoder: that the vectors should be of.

  Raises:
    UserError: a file that can't be read, or one of another encoder or another
      preprocessing.
  """
  if path.suffix not in FORMATS:
    raise UserError(
      f'--input is {path}: give a folder of images, or a file of cmd-jax embed'
    )
  read = _read_npz if path.suffix == '.npz' else _read_parquet
  try:
    safe_read.check_regular(path)
    names, vectors, description = read(path)
    version = int(description.get(VERSION_FIELD, 0))
    check_format({VERSION_FIELD: version}, _FORMAT_VERSION, path)
    _check_table(names, vectors)
    there = {name: description[name] for name in _MUST_AGREE}
    skipped = [
      Skipped(str(name), str(reason))
      for name, reason in safe_read.parse_json(description['skipped'])
    ]
    folder = pathlib.Path(description['folder'])
  except (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    TypeError,
    ValueError,
  ) as error:
    raise UserError(
      f'{path} cannot be read ({one_line(error)}): give a file of cmd-jax embed'
    ) from error
  here = {
    'encoder_sha256': encoder.hash,
    'preprocessing': json.dumps(encoder.preprocessing),
  }
  if there != here:
    raise UserError(
      f'{path} was made by another encoder '
      f'({one_line(description.get("encoder", "unknown"))}) or with another '
      f'preprocessing than {encoder.source}: embed the folder again'
    )
  return Embeddings(folder, tuple(names), vectors, tuple(skipped))


def _check_table(names: list, vectors: np.ndarray) -> None:
  """Raises ValueError for what `save_embeddings` does not write."""
  if vectors.ndim != 2 or vectors.dtype != np.float32 or not vectors.size:
    raise ValueError(f'vectors are {vectors.shape} {vectors.dtype}')
  if type(names) is not list or len(names) != len(vectors):
    raise ValueError(f'not one file name for each of {len(vectors)} vectors')
  for name in names:
    if type(name) is not str or '\0' in name:
      raise ValueError(f'{name!r} is no name of a file')
    if name.startswith('/') or '..' in name.split('/'):
      raise ValueError(f'{name!r} is not in the folder of the images')


def _read_npz(path: pathlib.Path) -> tuple:
  with path.open('rb') as file:
    arrays = safe_read.read_npz(file)
  names, vectors = arrays.pop('file_names'), arrays.pop('vectors')
  return names.tolist(), vectors, {k: str(v) for k, v in arrays.items()}


def _read_parquet(path: pathlib.Path) -> tuple:
  table = _pyarrow().parquet.read_table(path)
  vectors = table['embedding'].combine_chunks()
  dim = vectors.type.list_size
  metadata = table.schema.metadata or {}
  return (
    table['file_name'].to_pylist(),
    vectors.flatten().to_numpy().reshape(-1, dim),
    {k.decode(): v.decode() for k, v in metadata.items()},
  )


def _npz(embeddings: Embeddings, description: dict[str, str]) -> bytes:
  buffer = io.BytesIO()
  np.savez(
    buffer,
    file_names=np.array(embeddings.file_names),
    vectors=embeddings.vectors,
    **{name: np.array(text) for name, text in description.items()},
  )
  return buffer.getvalue()


def _pyarrow() -> Any:
  try:
    import pyarrow.parquet
  except ImportError as error:
    raise missing_extra(
      'Parquet needs pyarrow (.npz does not)', 'parquet'
    ) from error
  return pyarrow


def _parquet(embeddings: Embeddings, description: dict[str, str]) -> bytes:
  pyarrow = _pyarrow()
  count, dim = embeddings.vectors.shape
  vectors = pyarrow.FixedSizeListArray.from_arrays(
    pyarrow.array(embeddings.vectors.ravel()), dim
  )
  # Names need not be valid UTF-8, Parquet's strings must.
  names = [
    name.encode(errors='surrogateescape').decode(errors='backslashreplace')
    for name in embeddings.file_names
  ]
  schema = pyarrow.schema(
    [('file_name', pyarrow.string()), ('embedding', vectors.type)],
    metadata=description,
  )
  table = pyarrow.Table.from_arrays(
    [pyarrow.array(names, pyarrow.string()), vectors], schema=schema
  )
  buffer = io.BytesIO()
  pyarrow.parquet.write_table(table, buffer)
  return buffer.getvalue()
