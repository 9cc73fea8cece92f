"""The two formats of torch.save around a pickle, and the arrays in them."""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from cmd_jax.convert.torch_globals import (
  AGAIN,
  DAMAGED,
  TRUNCATED,
  Tensor,
  UnreadableError,
)
from cmd_jax.convert.torch_pickle import Interpreter

# The pickled number that the format of before PyTorch 1.6 begins with.
_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_CHUNK = 2**20
# Sizes beyond any file, whose products would take long to compute.
_MAX_INT = 2**62


class TorchFile(NamedTuple):
  """What torch.save wrote.

  Attributes:
    root: the object, with a `Tensor` for each tensor.
    read_storage: the bytes that a key of a storage names, uint8 [n].
  """

  root: Any
  read_storage: Callable[[str], np.ndarray]


def _read_bytes(file: BinaryIO, start: int, count: int) -> np.ndarray:
  file.seek(0, os.SEEK_END)
  if not 0 <= start <= start + count <= file.tell():
    raise UnreadableError(TRUNCATED)
  data = np.empty(count, np.uint8)
  file.seek(start)
  if file.readinto(memoryview(data)) < count:
    raise UnreadableError(TRUNCATED)
  return data


class _Records:
  """The members of a zip archive, all of which torch.save only stores."""

  def __init__(self, file: BinaryIO, archive: zipfile.ZipFile):
    self._file = file
    self._members = {info.filename: info for info in archive.infolist()}
    self._folder = _find_folder(archive.namelist())
    self._cache: dict[str, np.ndarray] = {}
    file.seek(0, os.SEEK_END)
    self._left = self._size = file.tell()

  def __contains__(self, name: str) -> bool:
    return f'{self._folder}/{name}' in self._members

  def read(self, name: str) -> np.ndarray:
    """The bytes of a member after checks of size and checksum."""
    if name not in self:
      raise UnreadableError(f'lacks the record {name[:200]!r}: {AGAIN}')
    info = self._members[f'{self._folder}/{name}']
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
      raise UnreadableError(
        f'has a compressed or encrypted record {name[:200]!r}, which '
        'torch.save does not write: save it with torch.save again'
      )
    # Records that overlap could ask for more memory than the file has bytes.
    self._left -= info.file_size
    if info.file_size != info.compress_size or self._left < 0:
      raise UnreadableError(DAMAGED)
    header = _read_bytes(self._file, info.header_offset, 30).tobytes()
    if header[:4] != b'PK\x03\x04':
      raise UnreadableError(DAMAGED)
    start = info.header_offset + 30 + sum(struct.unpack('<HH', header[26:]))
    data = _read_bytes(self._file, start, info.file_size)
    if zlib.crc32(data) != info.CRC:
      raise UnreadableError(
        f'has a wrong checksum of the record {name[:200]!r}: {AGAIN}, '
        'or save it without set_crc32_options(False)'
      )
    return data

  def read_storage(self, key: str) -> np.ndarray:
    if key not in self._cache:
      self._cache[key] = self.read(f'data/{key}')
    return self._cache[key]


def _find_folder(names: list[str]) -> str | None:
  for name in names:
    folder, _, rest = name.partition('/')
    if rest == 'data.pkl':
      return folder
  return None


def is_torch_zip(names: list[str]) -> bool:
  """Whether an archive with these members is one of torch.save."""
  return any(
    name.count('/') == 1 and name.endswith('/data.pkl') for name in names
  )


def read_zip(file: BinaryIO, archive: zipfile.ZipFile) -> TorchFile:
  """Reads the format of PyTorch 1.6 and later.

  Source: torch.serialization._save and caffe2/serialize/inline_container.cc.

  Args:
    file: the file that the archive was opened from.
    archive: one that `is_torch_zip` knows.

  Raises:
    UnreadableError: it is damaged or no state dict.
  """
  records = _Records(file, archive)
  if 'constants.pkl' in records:
    raise UnreadableError(
      'is a TorchScript archive, which holds a program: load it with '
      'torch.jit.load and save model.state_dict() with torch.save'
    )
  if (
    'byteorder' in records and records.read('byteorder').tobytes() != b'little'
  ):
    raise UnreadableError(
      'was not written in little-endian order: load and save it with PyTorch '
      'on a little-endian machine'
    )
  pickled = records.read('data.pkl').tobytes()
  with io.BytesIO(pickled) as stream:
    root = Interpreter(stream, len(pickled)).run()
  return TorchFile(root, records.read_storage)


def read_legacy(file: BinaryIO) -> TorchFile:
  """Reads the format of before PyTorch 1.6.

  Five pickles: magic number, protocol, facts about the machine, the object and
  the keys of the storages; then each storage, its length before it. The byte
  order is little-endian whatever the machine. Source:
  torch.serialization._legacy_load.

  Args:
    file: at its beginning.

  Raises:
    UnreadableError: it is damaged or no state dict.
  """
  file.seek(0, os.SEEK_END)
  end = file.tell()
  file.seek(0)
  if Interpreter(file, end).run() != _MAGIC:
    raise UnreadableError(
      'is a Python pickle that torch.save did not write, which could run any '
      'program: save the state dict with torch.save or as .safetensors'
    )
  if Interpreter(file, end).run() != _LEGACY_PROTOCOL:
    raise UnreadableError(DAMAGED)
  Interpreter(file, end).run()
  interpreter = Interpreter(file, end)
  root = interpreter.run()
  keys = Interpreter(file, end).run()
  if type(keys) is not list:
    raise UnreadableError(DAMAGED)
  places = {}
  position = file.tell()
  for key in keys:
    if type(key) is not str or key not in interpreter.storages:
      raise UnreadableError(DAMAGED)
    (count,) = struct.unpack('<q', _read_bytes(file, position, 8))
    size = count * interpreter.storages[key].itemsize
    if not 0 <= size <= end - position - 8:
      raise UnreadableError(TRUNCATED)
    places[key] = (position + 8, size)
    position += 8 + size
  cache = {}

  def read_storage(key: str) -> np.ndarray:
    if key not in places:
      raise UnreadableError(DAMAGED)
    if key not in cache:
      cache[key] = _read_bytes(file, *places[key])
    return cache[key]

  return TorchFile(root, read_storage)


def read_array(
  tensor: Tensor, read_storage: Callable[[str], np.ndarray], name: str
) -> np.ndarray:
  """The numbers of a tensor, a read-only view of its storage.

  Args:
    tensor: where they are.
    read_storage: of the file.
    name: of the tensor, for messages.

  Returns:
    Array of the tensor's shape and dtype.

  Raises:
    UnreadableError: the tensor reaches out of its storage, or the storage out
      of the file.
  """
  storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
  sizes = (*shape, *strides, tensor.offset, storage.start, storage.count)
  if len(shape) != len(strides) or len(shape) > 32:
    raise UnreadableError(f'has no valid shape for {name[:200]!r}: {AGAIN}')
  if not all(type(size) is int and 0 <= size < _MAX_INT for size in sizes):
    raise UnreadableError(f'has no valid shape for {name[:200]!r}: {AGAIN}')
  count = math.prod(shape)
  width = tensor.dtype.itemsize
  # Tensors of dtypes without a type of storage have one of bytes.
  begin = storage.start * storage.dtype.itemsize
  available = storage.count * storage.dtype.itemsize // width
  last = tensor.offset + sum((n - 1) * s for n, s in zip(shape, strides))
  if count and last >= available:
    raise UnreadableError(
      f'has a tensor {name[:200]!r} of shape {shape} that reaches out of its '
      f'storage of {available} numbers: {AGAIN}'
    )
  if count > available:
    raise UnreadableError(
      f'has a tensor {name[:200]!r} of shape {shape} that repeats {available} '
      'numbers: save it after .contiguous()'
    )
  if not count:
    return _empty(tensor, name)
  data = read_storage(storage.key)[begin:][: available * width]
  if data.size < available * width:
    raise UnreadableError(TRUNCATED)
  if tensor.dtype == np.bool_:
    data = (data != 0).view(np.uint8)
  array = np.lib.stride_tricks.as_strided(
    data.view(tensor.dtype)[tensor.offset :],
    shape,
    # The stride of an axis of one element means nothing and may be anything.
    [s * width if n > 1 else 0 for n, s in zip(shape, strides)],
    writeable=False,
  )
  return array


def _empty(tensor: Tensor, name: str) -> np.ndarray:
  try:
    return np.empty(tensor.shape, tensor.dtype)
  except ValueError as error:
    raise UnreadableError(
      f'has no valid shape for {name[:200]!r}: {AGAIN}'
    ) from error
