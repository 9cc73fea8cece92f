"""Changes files as damage and malice do."""

from __future__ import annotations

import functools
import io
import random
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

# Numbers on the edge of what a field holds or of what memory does.
_NUMBERS = (0, 1, -1, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1)
_LARGE = (2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 10**30)
_TEXTS = (
  *(
    b'\0',
    b'"',
    b"'",
    b',',
    b'\n',
    b'\r',
    b'\xef\xbb\xbf',
    b'\xff\xfe',
    b'nan',
  ),
  *(b'-inf', b'1e999', b'../', b'/dev/zero', b'<script>alert(1)</script>'),
  *('\u2028'.encode(), b'%n%s', b'{}', b'[', b'"\\ud800"', b'null', b'true'),
)


class Seed(NamedTuple):
  """A valid file to start from.

  Attributes:
    data: the bytes that are changed.
    wrap: makes a file of the changed bytes, e.g. puts them into an archive, so
      that its checksums do not hide what is in it.
  """

  data: bytes
  wrap: Callable[[bytes], bytes] = bytes


class Target(NamedTuple):
  """A reader under test.

  Attributes:
    name: for the counts.
    reader: 'module:function'; the function takes a path, and returns or raises
      UserError.
    file_name: of the file that is written for it, in a folder of its own.
    seeds: valid files, all of which it reads.
    specials: files made by hand, by what they are.
    seconds: that a file may take.
    mebibytes: that reading it may add to the memory.
  """

  name: str
  reader: str
  file_name: str
  seeds: Sequence[Seed]
  specials: dict[str, bytes] = {}  # noqa: RUF012
  seconds: float = 30
  mebibytes: int = 256


def _number(rng: random.Random, size: int) -> bytes:
  value = rng.choice((*_NUMBERS, *_LARGE)) % 256**size
  return value.to_bytes(size, rng.choice(('little', 'big')))


def _change_once(rng: random.Random, data: bytes, other: bytes) -> bytes:
  """One random change; the bytes are at least one."""
  at = rng.randrange(len(data))
  end = min(len(data), at + rng.choice((1, 2, 4, 8, 16, 64, 512)))
  kind = rng.randrange(12)
  if kind == 0:
    return (
      data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    )
  if kind == 1:
    return data[:at] + rng.randbytes(end - at) + data[end:]
  if kind == 2:
    return data[:at]
  if kind == 3:
    return data[:at] + data[end:]
  if kind == 4:
    return data[:end] + data[at:end] * rng.choice((1, 2, 100)) + data[end:]
  if kind == 5:
    start = rng.randrange(len(other))
    return data[:at] + other[start : start + rng.choice((8, 64, 100_000))]
  if kind == 6:
    return data[:at] + rng.choice(_TEXTS) + data[at:]
  if kind == 7:
    return data[: min(len(data), rng.choice((1, 4, 8, 16, 64, 256)))]
  if kind == 8:
    found = list(re.finditer(rb'-?\d+', data))
    if found:
      digits = rng.choice(found)
      number = str(rng.choice((*_NUMBERS, *_LARGE))).encode()
      return data[: digits.start()] + number + data[digits.end() :]
  if kind == 9:
    return data[:at] + bytes(end - at) + data[end:]
  size = rng.choice((1, 2, 4, 8))
  # Counts and sizes are mostly near the beginning.
  at = min(at, rng.choice((at, 32, 128)))
  return data[:at] + _number(rng, size) + data[at + size :]


def mutate(rng: random.Random, seeds: Sequence[Seed]) -> bytes:
  """A changed file.

  Args:
    rng: decides everything.
    seeds: one is changed, another may be spliced in.
  """
  seed, other = rng.choice(seeds), rng.choice(seeds)
  data = seed.data
  for _ in range(rng.choice((1, 1, 1, 2, 4))):
    if data:
      data = _change_once(rng, data, other.data)
  return seed.wrap(data)


def in_zip(archive: bytes, name: str, data: bytes) -> bytes:
  """A zip archive with another content of one of its members."""
  buffer = io.BytesIO()
  with (
    zipfile.ZipFile(io.BytesIO(archive)) as old,
    zipfile.ZipFile(buffer, 'w') as new,
  ):
    for member in old.namelist():
      new.writestr(member, data if member == name else old.read(member))
  return buffer.getvalue()


def in_tar(archive: bytes, name: str, data: bytes) -> bytes:
  """A tar archive with another content of one of its members."""
  buffer = io.BytesIO()
  with (
    tarfile.open(fileobj=io.BytesIO(archive)) as old,
    tarfile.open(fileobj=buffer, mode='w') as new,
  ):
    for member in old:
      content = data if member.name == name else old.extractfile(member).read()
      info = tarfile.TarInfo(member.name)
      info.size = len(content)
      new.addfile(info, io.BytesIO(content))
  return buffer.getvalue()


def with_tar_checksums(data: bytes) -> bytes:
  """The checksums of tar headers made right again."""
  data = bytearray(data)
  for at in range(0, len(data) - 511, 512):
    header = data[at : at + 512]
    if header[257:262] == b'ustar':
      header[148:156] = b' ' * 8
      data[at + 148 : at + 156] = b'%06o\0 ' % sum(header)
  return bytes(data)


def with_png_checksums(data: bytes) -> bytes:
  """The checksums of PNG chunks made right again, as far as chunks follow."""
  data, at = bytearray(data), 8
  while at + 12 <= len(data):
    (size,) = struct.unpack_from('>I', data, at)
    end = at + 8 + size
    if end + 4 > len(data):
      break
    struct.pack_into('>I', data, end, zlib.crc32(data[at + 4 : end]))
    at = end + 4
  return bytes(data)


def in_member(archive: bytes, name: str) -> Seed:
  """A seed whose changes are those of one member of a zip archive."""
  with zipfile.ZipFile(io.BytesIO(archive)) as file:
    data = file.read(name)
  return Seed(data, functools.partial(in_zip, archive, name))


def _zip(name: str, data: bytes, method: int) -> bytes:
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, 'w', method) as archive:
    archive.writestr(name, data)
  return buffer.getvalue()


def npy(shape: str, data: bytes = b'', descr: str = '|u1') -> bytes:
  """An .npy file whose header says anything."""
  header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}"
  header += ' ' * (-(len(header) + 11) % 64) + '\n'
  size = len(header).to_bytes(2, 'little')
  return b'\x93NUMPY\x01\0' + size + header.encode() + data


def zip_bombs(name: str) -> dict[str, bytes]:
  """Archives that expand to far more than they are, by what they are.

  Args:
    name: of the member that a reader looks for.
  """
  bomb = _deflated_zeros(name, 2**29)
  few = bytes(2**20)
  return {
    'bomb': bomb,
    'bomb that says it is small': _deflated_zeros(name, 2**29, says=200),
    'lzma': _zip(name, few, zipfile.ZIP_LZMA),
    'bzip2': _zip(name, few, zipfile.ZIP_BZIP2),
    'bomb in a bomb': _zip(name, bomb, zipfile.ZIP_DEFLATED),
    'absurd shape': _zip(name, npy('(2**62,)'), 0),
    'huge shape': _zip(name, npy('(4611686018427387904,)'), 0),
    'huge shape of rows': _zip(name, npy('(99999, 99999, 99)'), 0),
    'negative shape': _zip(name, npy('(-1, -1)', b'x'), 0),
    'shape of Python 2': _zip(name, npy('(3L,)', b'xxx'), 0),
    'objects': _zip(name, npy('(1,)', b'cos\nsystem\n.', '|O'), 0),
    'deep header': _zip(name, npy('(' * 9000 + ')' * 9000), 0),
    'long header': _zip(name, npy('(' + '1,' * 30_000 + ')'), 0),
    'encrypted': _encrypted(name),
    'many members': _zip_of_many(),
  }


def _zip_of_many() -> bytes:
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, 'w') as archive:
    for number in range(3000):
      archive.writestr(f'{number}.npy', b'')
  return buffer.getvalue()


def _deflated_zeros(name: str, size: int, says: int | None = None) -> bytes:
  """An archive of zeros, a thousandth of their size, made in no time."""
  block = 2**20
  press = zlib.compressobj(9, zlib.DEFLATED, -15)
  first = press.compress(bytes(block)) + press.flush(zlib.Z_FULL_FLUSH)
  data = first * (size // block) + press.flush()
  archive = _zip(name, data, zipfile.ZIP_STORED)
  # Method and size are in the local header and in the directory at the end.
  place = archive.index(b'PK\1\2')
  archive = bytearray(archive)
  for method, length in ((8, 22), (place + 10, place + 24)):
    struct.pack_into('<H', archive, method, zipfile.ZIP_DEFLATED)
    struct.pack_into('<I', archive, length, size if says is None else says)
  return bytes(archive)


def _encrypted(name: str) -> bytes:
  archive = bytearray(_zip(name, b'x' * 99, zipfile.ZIP_STORED))
  place = archive.index(b'PK\1\2')
  archive[6] |= 1
  archive[place + 8] |= 1
  return bytes(archive)
