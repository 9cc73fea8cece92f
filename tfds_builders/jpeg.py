"""Changes to JPEG files that leave their pixels as they are encoded."""

from __future__ import annotations

import struct
from collections.abc import Iterator

START = b'\xff\xd8'
# Where EXIF and XMP data are.
_APP1 = 0xE1
# The markers of frame headers: all of FFC0 to FFCF but the tables DHT (C4) and
# DAC (CC) and the reserved JPG (C8).
_FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
  """Yields (marker, start, end) of what stands before the compressed data.

  The last one is the frame header.

  Raises:
    ValueError: there is no frame header.
  """
  at = len(START)
  while at + 4 <= len(data) and data[at] == 0xFF:
    marker = data[at + 1]
    if marker == 0xFF:
      # A fill byte.
      at += 1
      continue
    end = at + 2 + struct.unpack_from('>H', data, at + 2)[0]
    yield marker, at, end
    if marker in _FRAME_HEADERS:
      return
    at = end
  raise ValueError('no JPEG frame header')


def without_app1(data: bytes) -> bytes:
  """Drops EXIF and XMP, which may tell viewers to turn the image.

  Args:
    data: a JPEG file.

  Returns:
    The file without its APP1 segments; nothing else is changed.

  Raises:
    ValueError: it is damaged.
  """
  kept = [START]
  for marker, start, end in _segments(data):
    if marker != _APP1:
      kept.append(data[start:end])
  return b''.join([*kept, data[end:]])


def lowered(data: bytes, lower_by: int) -> bytes:
  """Lowers the height in the frame header (ITU-T T.81, B.2.2).

  Args:
    data: a JPEG file.
    lower_by: rows that decoders shall not decode, from the bottom.

  Returns:
    The file with another height; nothing else is changed.

  Raises:
    ValueError: it is damaged, or no row would be left.
  """
  *_, (_, start, end) = _segments(data)
  # Marker, length and precision come before the height.
  at = start + 5
  if end < at + 2 or len(data) < at + 2:
    raise ValueError('a JPEG frame header is cut off')
  (height,) = struct.unpack_from('>H', data, at)
  if height <= lower_by:
    raise ValueError(f'{height} rows, of which {lower_by} are to go')
  return data[:at] + struct.pack('>H', height - lower_by) + data[at + 2 :]
