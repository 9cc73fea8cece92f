"""Weights that a program has spread over several files, by their index.

Next to model-00001-of-00002.safetensors and the others lies a
model.safetensors.index.json that says which tensor is in which.
"""

from __future__ import annotations

import pathlib
import re
from typing import NamedTuple

from cmd_jax.convert.torch_globals import AGAIN, UnreadableError
from cmd_jax.files import safe_read
from cmd_jax.files.safe_read import one_line

# First what is read where a folder has several.
_INDICES = ('model.safetensors.index.json', 'pytorch_model.bin.index.json')
_SINGLES = ('model.safetensors', 'pytorch_model.bin')
# In the order in which a folder is searched.
_PATTERNS = (
  ('*.index.json', _INDICES),
  ('*.safetensors', _SINGLES),
  ('*.bin', _SINGLES),
)
_SHARD = re.compile(r'.*-\d{5}-of-(\d{5})\.\w+')
_MAX_INDEX_BYTES = 2**26
_MAX_SHARDS = 1000


class Index(NamedTuple):
  """Which tensor is in which file.

  Attributes:
    folder: of the files.
    shards: names of the files, sorted.
    shard_of: the file of each tensor, by the name of the tensor.
  """

  folder: pathlib.Path
  shards: tuple[str, ...]
  shard_of: dict[str, str]


def has_weights(folder: pathlib.Path) -> bool:
  """Whether there is a file in a folder that `find` would look at."""
  return any(any(folder.glob(pattern)) for pattern, _ in _PATTERNS)


def find(path: pathlib.Path) -> pathlib.Path:
  """The file to read: of a folder its index or its only file of weights.

  Raises:
    UnreadableError: a folder without either or with several, or one file of
      several whose index lies beside it.
  """
  if not path.is_dir():
    _check_whole(path)
    return path
  for pattern, names in _PATTERNS:
    found = sorted(x.name for x in path.glob(pattern) if x.is_file())
    usual = [name for name in names if name in found]
    if usual or len(found) == 1:
      return path / (usual or found)[0]
    if found:
      raise UnreadableError(
        f'is a folder with several files of weights '
        f'({one_line(", ".join(found[:6]))}): give the path of one'
      )
  raise UnreadableError(
    f'is a folder without {" or ".join(_INDICES)}: give the path of a '
    '.safetensors, .npz or .pth file'
  )


def _check_whole(path: pathlib.Path) -> None:
  match = _SHARD.fullmatch(path.name)
  if match and int(match[1]) > 1:
    beside = sorted(x.name for x in path.parent.glob('*.index.json'))
    give = path.parent / beside[0] if beside else 'the index.json of all'
    raise UnreadableError(
      f'is one of {int(match[1])} files that belong together: give {give}'
    )


def is_index(path: pathlib.Path) -> bool:
  """Whether a path is one of an index, by its name."""
  return path.name.endswith('.index.json')


def read_index(path: pathlib.Path) -> Index:
  """Reads an index; the files that it names need not be there.

  Args:
    path: one that `is_index` knows.

  Raises:
    UnreadableError: it is no index, or names files of other folders.
  """
  if path.stat().st_size > _MAX_INDEX_BYTES:
    raise UnreadableError(f'is larger than any index of weights: {AGAIN}')
  try:
    shard_of = safe_read.parse_json(path.read_bytes())['weight_map']
    if not isinstance(shard_of, dict) or not shard_of:
      raise ValueError('its weight_map is empty')
    shards = tuple(sorted(set(map(_check_name, shard_of.values()))))
  except (LookupError, TypeError, ValueError) as error:
    raise UnreadableError(
      f'is no index of weights ({one_line(error)}): {AGAIN}'
    ) from error
  if len(shards) > _MAX_SHARDS:
    raise UnreadableError(
      f'names {len(shards)} files, more than {_MAX_SHARDS}: save the weights '
      'in fewer'
    )
  return Index(path.parent, shards, shard_of)


def _check_name(name: object) -> str:
  """The name of a file in the folder of the index, and of no other."""
  if not isinstance(name, str):
    raise ValueError('a file that has no name')
  if not name or name.startswith('.') or re.search(r'[/\\\0:]', name):
    raise ValueError(f'{one_line(name)!r} is no file beside it')
  if name.endswith('.json'):
    raise ValueError(f'{one_line(name)!r} is no file of weights')
  return name
