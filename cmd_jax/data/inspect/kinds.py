"""What is unusual about an image file, kept beside its pixels."""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np
from PIL import ExifTags, Image

KINDS = (
  'grayscale',
  'CMYK',
  'palette',
  'alpha channel',
  '16-bit',
  'animated',
  'EXIF-rotated',
  'misnamed',
)
_NOTE = 'cmd_jax.kinds'
_RANGE_NOTE = 'cmd_jax.range'
# Of 16 bits.
TOP = 65535
# A JPEG file that holds several pictures, as some cameras write; and a bitmap,
# which is called .dib with and without its file header.
_ALIASES = {'MPO': 'JPEG', 'DIB': 'BMP'}


def _is_deep(image: Image.Image) -> bool:
  """Whether a file just opened has more than 8 bits a channel."""
  if image.mode[0] in 'IF':
    return True
  # Pillow halves 16-bit colour while it reads: only the tiles still tell. The
  # 16 bits of BGR;16 are those of all three channels.
  layouts = [str(tile[3]) for tile in getattr(image, 'tile', ())]
  return any(';16' in layout and 'BGR' not in layout for layout in layouts)


def _is_misnamed(image: Image.Image) -> bool:
  extension = os.path.splitext(os.fspath(getattr(image, 'filename', '')))[1]
  if isinstance(extension, bytes):
    extension = os.fsdecode(extension)
  expected = Image.registered_extensions().get(extension.lower())
  expected, found = (_ALIASES.get(x, x) for x in (expected, image.format))
  return expected is not None and expected != found


def _is_turned_tiff(image: Image.Image) -> bool:
  """Whether Pillow will turn the image by itself while it loads it."""
  try:
    tags = getattr(image, 'tag_v2', {})
    return tags.get(ExifTags.Base.Orientation, 1) != 1
  except Exception:
    # Whatever reading damaged tags raises, the pixels may be fine.
    return False


def kinds_of_opened(image: Image.Image) -> set[str]:
  """Tells the kinds of a file that is opened but not loaded.

  Args:
    image: as Image.open gives it.

  Returns:
    Some of `KINDS`, but for 'alpha channel' and 'animated'.
  """
  tests = {
    'grayscale': image.mode in ('1', 'L', 'LA', 'La') or image.mode[0] in 'IF',
    'CMYK': image.mode == 'CMYK',
    'palette': image.mode in ('P', 'PA'),
    '16-bit': _is_deep(image),
    'EXIF-rotated': _is_turned_tiff(image),
    'misnamed': _is_misnamed(image),
  }
  return {kind for kind, is_so in tests.items() if is_so}


def is_animated(image: Image.Image) -> bool:
  """Whether a file whose first frame is loaded has more frames."""
  try:
    return image.format != 'MPO' and getattr(image, 'is_animated', False)
  except Exception:
    # To know, Pillow may look for a second frame, which may be damaged.
    return False


def note_kinds(image: Image.Image, kinds: Iterable[str]) -> None:
  """Leaves a note of the kinds of its file with an image."""
  image.info[_NOTE] = sum(1 << KINDS.index(kind) for kind in kinds)


def noted_kinds(image: Image.Image) -> int:
  """Reads the note: bit i is set for `KINDS[i]`; 0 if there is none."""
  return image.info.get(_NOTE, 0)


def range_of_deep(image: Image.Image) -> tuple[int, int]:
  """The smallest and largest value of a loaded file of 16 bits a channel.

  Of colours Pillow keeps the upper eight bits: it is as exact as that.

  Args:
    image: upright or not, before it is converted.

  Returns:
    Both from 0 to `TOP`; 0 and 0 for floats.
  """
  if image.mode[0] == 'F':
    return 0, 0
  if image.mode[0] == 'I':
    pixels = np.asarray(image)
    low, high = int(pixels.min()), int(pixels.max())
  else:
    bands = dict(zip(image.getbands(), image.split()))
    ranges = [x.getextrema() for name, x in bands.items() if name != 'A']
    low = 256 * min(low for low, _ in ranges)
    high = 256 * max(high for _, high in ranges) + 255
  return max(low, 0), min(high, TOP)


def note_range(image: Image.Image, low: int, high: int, white: int) -> None:
  """Leaves a note with an image of its file's values and what is white."""
  image.info[_RANGE_NOTE] = (low, high, white)


def noted_range(image: Image.Image) -> tuple[int, int, int]:
  """Reads the note of `note_range`; zeros if there is none."""
  return image.info.get(_RANGE_NOTE, (0, 0, 0))


def rows_of_kind(kinds: np.ndarray, kind: str) -> np.ndarray:
  """Finds the images of a kind.

  Args:
    kinds: [N] uint16 notes.
    kind: one of `KINDS`.

  Returns:
    [K] rows, ascending.
  """
  return np.flatnonzero(kinds >> KINDS.index(kind) & 1)
