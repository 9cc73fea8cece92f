"""Files of weights in, arrays by name out; no file can run anything."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import math
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from cmd_jax.convert import google_vit, networks, shards, torch_file, wrappers
from cmd_jax.convert.torch_globals import (
  AGAIN,
  WHOLE_MODEL,
  Tensor,
  UnreadableError,
)
from cmd_jax.errors import UserError
from cmd_jax.files import safe_read
from cmd_jax.files.safe_read import one_line

_SAFETENSORS_DTYPES = set(
  'BOOL U8 I8 U16 I16 U32 I32 U64 I64 F16 BF16 F32 F64 C64'.split()
)
# Tensors may share numbers, but not so many that all take so many times the
# file, beside this many bytes: some are copied, such as those of bool.
_MAX_SHARING = 4
_MAX_SHARED_BYTES = 2**26

_MAGICS = {
  b'\x89PNG': 'a PNG image',
  b'\xff\xd8\xff': 'a JPEG image',
  b'GIF8': 'a GIF image',
  b'%PDF': 'a PDF document',
  b'\x1f\x8b': 'compressed by gzip: unpack it first',
  b'BZh': 'compressed by bzip2: unpack it first',
  b'\xfd7zXZ': 'compressed by xz: unpack it first',
  b'\x89HDF': 'an HDF5 file (Keras)',
  b'\x93NUMPY': 'a single array: save all by name with np.savez',
  b'version https://git-lfs': 'a git-lfs pointer, not the file: git lfs pull',
}
_FORMATS = '.safetensors, .npz or .pth'


class WeightFile(NamedTuple):
  """Weights as they are in a file.

  Attributes:
    tensors: read-only arrays by name, without the prefixes of wrappers, in the
      dtypes of the file.
    sha256: of the file, hexadecimal; of several, of the lines that sha256sum
      prints of them in the order of their names.
    format: 'safetensors', 'npz', 'torch' or 'torch_legacy'.
  """

  tensors: dict[str, np.ndarray]
  sha256: str
  format: str


class _Contents(NamedTuple):
  """Names in a file and how to read what each stands for."""

  format: str
  leaves: dict[str, Any]
  load: Callable[[str, Any], np.ndarray]
  sha256: str = ''
  size: int = 0


def read_tensors(
  path: str | pathlib.Path, *, network: str = 'teacher'
) -> WeightFile:
  """Reads a file of weights; what it is shows in its bytes, not in its name.

  Args:
    path: .safetensors, .npz, or .pth of torch.save (old or new format); the
      .index.json of several of them, or the folder that has it.
    network: 'student' or 'teacher', which to take of a file that has both. Of
      a model and its running average, the teacher is the average.

  Returns:
    The tensors of one network.

  Raises:
    UserError: the file is missing, damaged or of another kind, holds anything
      but data, or no tensors.
  """
  if network not in networks.NETWORKS:
    raise UserError(f'network is {network!r}: choose student or teacher')
  path = pathlib.Path(path)
  try:
    with _open(shards.find(path), network) as contents:
      leaves = google_vit.parameters(contents.leaves)
      leaves = networks.take_network(leaves, network)
      tensors = _load_all(contents, wrappers.strip_prefixes(leaves))
  except UnreadableError as error:
    raise UserError(f'{path} {one_line(error, 1000)}') from error
  # Shapes that Python can count and NumPy can't are an OverflowError.
  except (OSError, ValueError, OverflowError) as error:
    raise UserError(
      f'{path} cannot be read ({one_line(error)}): {AGAIN}'
    ) from error
  if not tensors:
    raise UserError(f'{path} holds no tensors: give a file of weights')
  return WeightFile(tensors, contents.sha256, contents.format)


def _load_all(
  contents: _Contents, leaves: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  limit = _MAX_SHARED_BYTES + _MAX_SHARING * contents.size
  if contents.format == 'npz':
    # Compressed, and its size is known to be within bounds.
    limit = math.inf
  tensors, total = {}, 0
  for name, leaf in leaves.items():
    tensors[name] = contents.load(name, leaf)
    total += tensors[name].nbytes
    if total > limit:
      raise UnreadableError(
        'has tensors that share most of their numbers: save it after .clone()'
      )
  return tensors


@contextlib.contextmanager
def _open(path: pathlib.Path, network: str) -> Iterator[_Contents]:
  if not path.is_file():
    kind = 'is no file' if path.exists() else 'does not exist'
    raise UnreadableError(f'{kind}: give the path of a {_FORMATS} file')
  if shards.is_index(path):
    with _open_shards(shards.read_index(path), network) as contents:
      yield contents
    return
  with path.open('rb') as file:
    sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
    with _open_contents(path, file, network) as contents:
      yield contents._replace(sha256=sha256, size=path.stat().st_size)


@contextlib.contextmanager
def _open_shards(index: shards.Index, network: str) -> Iterator[_Contents]:
  """All files of an index as one."""
  with contextlib.ExitStack() as stack:
    parts = {}
    for name in index.shards:
      try:
        opened = _open(index.folder / name, network)
        parts[name] = stack.enter_context(opened)
      except UnreadableError as error:
        raise UnreadableError(f'names {name}, which {error}') from error
    leaves = {}
    for tensor, name in index.shard_of.items():
      if tensor not in parts[name].leaves:
        raise UnreadableError(
          f'names {one_line(tensor)!r} in {name}, which lacks it: {AGAIN}'
        )
      leaves[tensor] = name, tensor, parts[name].leaves[tensor]

    def load(_, leaf):
      name, tensor, inner = leaf
      return parts[name].load(tensor, inner)

    # As of the output of sha256sum, which has a line for each file.
    lines = ''.join(f'{part.sha256}  {n}\n' for n, part in parts.items())
    yield _Contents(
      parts[index.shards[0]].format,
      leaves,
      load,
      hashlib.sha256(lines.encode()).hexdigest(),
      sum(part.size for part in parts.values()),
    )


@contextlib.contextmanager
def _open_contents(
  path: pathlib.Path, file: BinaryIO, network: str
) -> Iterator[_Contents]:
  file.seek(0, io.SEEK_END)
  size = file.tell()
  file.seek(0)
  head = file.read(512)
  if not head:
    raise UnreadableError(f'is empty: {AGAIN}')
  if head.startswith((b'PK\x03\x04', b'PK\x05\x06')):
    with _open_zip(file) as archive:
      if torch_file.is_torch_zip(archive.namelist()):
        contents = torch_file.read_zip(file, archive)
        yield _torch_contents('torch', contents, network)
      else:
        yield _npz_contents(archive, size)
  # Before the pickle: the length before this brace may begin with its byte.
  elif head[8:9] == b'{':
    with _open_safetensors(path) as contents:
      yield contents
  elif head.startswith(b'\x80'):
    contents = torch_file.read_legacy(file)
    yield _torch_contents('torch_legacy', contents, network)
  else:
    raise UnreadableError(_describe(head))


def _describe(head: bytes) -> str:
  """What a file is that holds no weights."""
  text = head.lstrip().lower()
  for magic, kind in _MAGICS.items():
    if head.startswith(magic):
      return f'is {kind}; weights are read from {_FORMATS} files'
  if text.startswith((b'<!doctype html', b'<html')):
    kind = 'a web page, perhaps the error of a download: get the file itself'
  elif head[257:262] == b'ustar':
    kind = 'a tar archive: unpack it first'
  elif all(byte >= 32 or byte in b'\t\n\r\f' for byte in head):
    kind = 'a text file'
  else:
    kind = 'not a file of weights or its beginning is damaged'
  return f'is {kind}; weights are read from {_FORMATS} files'


@contextlib.contextmanager
def _open_zip(file: BinaryIO) -> Iterator[zipfile.ZipFile]:
  try:
    archive = zipfile.ZipFile(file)
  # What zipfile raises depends on where an archive is damaged.
  except Exception as error:
    raise UnreadableError(
      f'is a zip archive that is damaged or ends too early: {AGAIN}'
    ) from error
  with archive:
    yield archive


def _torch_contents(
  kind: str, contents: torch_file.TorchFile, network: str
) -> _Contents:
  def load(name: str, tensor: Tensor) -> np.ndarray:
    return torch_file.read_array(tensor, contents.read_storage, name)

  leaves = networks.find_state_dict(contents.root, network)
  if not leaves:
    raise UnreadableError(_without_tensors(contents.root))
  return _Contents(kind, leaves, load)


def _without_tensors(root: Any) -> str:
  """What a file of torch.save has in place of a state dict."""
  if not isinstance(root, dict):
    return f'holds no state dict: {WHOLE_MODEL}'
  if not root:
    return 'holds no tensors: give a file of weights'
  names = one_line(', '.join(list(root)[:12]))
  return (
    f'holds no tensors where networks are kept (it has {names}): {WHOLE_MODEL}'
  )


@contextlib.contextmanager
def _open_safetensors(path: pathlib.Path) -> Iterator[_Contents]:
  try:
    with safetensors.safe_open(path, framework='np') as file:

      def load(name: str, key: str) -> np.ndarray:
        dtype = file.get_slice(key).get_dtype()
        if dtype not in _SAFETENSORS_DTYPES:
          raise UnreadableError(
            f'has a tensor {name[:200]!r} of dtype {dtype}: save it in float32'
          )
        array = file.get_tensor(key)
        array.setflags(write=False)
        return array

      yield _Contents('safetensors', {key: key for key in file.keys()}, load)
  except safetensors.SafetensorError as error:
    raise UnreadableError(
      f'is a .safetensors file that is damaged or ends too early ({error}): '
      f'{AGAIN}'
    ) from error


def _npz_contents(archive: zipfile.ZipFile, size: int) -> _Contents:
  members = archive.infolist()
  if not members or not all(m.filename.endswith('.npy') for m in members):
    raise UnreadableError(
      'is a zip archive, but neither of np.savez nor of torch.save: unpack it '
      f'if there is a {_FORMATS} file in it'
    )
  try:
    safe_read.check_expansion(archive, size)
  except ValueError as error:
    raise UnreadableError(
      f'{error}: save it with np.savez, which does not compress'
    ) from error
  leaves = {}
  for member in members:
    name = member.filename.removesuffix('.npy').replace('/', '.')
    if name in leaves:
      raise UnreadableError(
        f'has two arrays that would be {name[:200]!r}: rename one'
      )
    leaves[name] = member
  return _Contents('npz', leaves, functools.partial(_load_npy, archive))


def _load_npy(
  archive: zipfile.ZipFile, name: str, member: zipfile.ZipInfo
) -> np.ndarray:
  """Reads a member as an array of numbers."""
  try:
    array = safe_read.read_member(archive, member)
  except safe_read.NotNumericError as error:
    raise UnreadableError(
      f'has an array {name[:200]!r} that is not numeric ({error}): save the '
      'weights alone, by np.savez(file, **arrays)'
    ) from error
  except ValueError as error:
    raise UnreadableError(
      f'has an array {name[:200]!r} that cannot be read: {error}: {AGAIN}'
    ) from error
  # NumPy does not know bfloat16 when it writes and takes it for two bytes.
  if array.dtype == np.dtype('V2'):
    array = array.view(ml_dtypes.bfloat16)
  elif array.dtype.kind not in 'biufc':
    raise UnreadableError(
      f'has an array {name[:200]!r} of dtype {array.dtype}, which is not '
      'numeric: save the weights alone, by np.savez(file, **arrays)'
    )
  array.setflags(write=False)
  return array
