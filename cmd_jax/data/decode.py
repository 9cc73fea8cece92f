"""Loads what Pillow opened: upright, in RGB, with a note of what it was."""

from __future__ import annotations

import threading
import warnings

import numpy as np
from PIL import ExifTags, Image

from cmd_jax.data.inspect import kinds as kinds_lib

FULL_SIZE = 'cmd_jax.full_size'
# Beyond it a row or a column takes more memory than its pixels.
_MAX_SIDE_PX = 2**16
_UPRIGHT = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}


class _QuietPillow:
  """Ignores the Python warnings that Pillow raises about odd files.

  `warnings.catch_warnings` swaps a list that all threads share, so decoding
  threads that overlap have to share one swap.
  """

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self._depth = 0
    self._caught: warnings.catch_warnings | None = None

  def __enter__(self) -> None:
    with self._lock:
      if self._depth == 0:
        self._caught = warnings.catch_warnings()
        self._caught.__enter__()
        warnings.filterwarnings('ignore', module=r'PIL\.')
      self._depth += 1

  def __exit__(self, *exc_info: object) -> None:
    with self._lock:
      self._depth -= 1
      if self._depth == 0:
        self._caught.__exit__(*exc_info)


quiet_pillow = _QuietPillow()


def _eight_bits(pixels: np.ndarray, white: int) -> np.ndarray:
  """Scales [H, W] integers up to `white`, or floats in [0, 1], to uint8."""
  top = 1 if np.issubdtype(pixels.dtype, np.floating) else white
  # Written so that a NaN fails it too.
  if not (pixels.min() >= 0 and pixels.max() <= top):
    raise ValueError(f'pixels outside the range from 0 to {top}')
  return np.rint(pixels * (255 / top)).astype(np.uint8)


def to_rgb(
  image: Image.Image, grey16_white: int = kinds_lib.TOP
) -> Image.Image:
  """Converts any mode to RGB, showing white where it is transparent.

  Args:
    image: of any mode.
    grey16_white: see `image_files.open_rgb`.

  Raises:
    ValueError: more than 8 bits whose range has no meaning as an image.
  """
  if image.mode[0] in 'IF':
    image = Image.fromarray(_eight_bits(np.asarray(image), grey16_white))
  if image.has_transparency_data:
    white = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(white, image.convert('RGBA'))
  return image if image.mode == 'RGB' else image.convert('RGB')


def _orientation(image: Image.Image) -> int:
  """Reads the EXIF orientation; 1, upright, if it is missing or damaged."""
  try:
    return image.getexif().get(ExifTags.Base.Orientation, 1)
  except Exception:
    # Whatever reading damaged EXIF raises, the pixels are fine.
    return 1


def upright_rgb(
  image: Image.Image, min_px: int, grey16_white: int
) -> Image.Image:
  """Loads an image that is opened: upright, in RGB, its kinds noted.

  Args:
    image: as Image.open gives it.
    min_px: if positive, a JPEG may be decoded at a smaller scale, and the
      result's info tells under `FULL_SIZE` the size decoded and, as height and
      width, that of the original.
    grey16_white: see `image_files.open_rgb`.

  Raises:
    ValueError: more pixels on a side than is safe.
    Exception: whatever Pillow raises for damaged bytes.
  """
  opened, kinds = image, kinds_lib.kinds_of_opened(image)
  full_width, full_height = image.size
  if max(image.size) > _MAX_SIDE_PX:
    raise ValueError(
      f'{full_width} x {full_height} pixels, more than {_MAX_SIDE_PX} on a side'
    )
  if min_px:
    image.draft(None, (min_px, min_px))
  is_draft = image.size != (full_width, full_height)
  # Before EXIF is read: PNG may keep it behind the pixels, and Pillow turns
  # TIFF upright by itself.
  image.load()
  # A text in a PNG file may have this name.
  image.info.pop(FULL_SIZE, None)
  value_range = (0, 0, 0)
  if '16-bit' in kinds:
    white = grey16_white if image.mode[0] == 'I' else kinds_lib.TOP
    value_range = (*kinds_lib.range_of_deep(image), white)
  orientation = _orientation(image)
  if orientation in _UPRIGHT:
    kinds.add('EXIF-rotated')
    image = image.transpose(_UPRIGHT[orientation])
    if orientation >= 5:
      full_width, full_height = full_height, full_width
  if image.has_transparency_data:
    kinds.add('alpha channel')
  image = to_rgb(image, grey16_white)
  # Last, because looking for a second frame moves within the file.
  if kinds_lib.is_animated(opened):
    kinds.add('animated')
  kinds_lib.note_kinds(image, kinds)
  kinds_lib.note_range(image, *value_range)
  if is_draft:
    image.info[FULL_SIZE] = (image.size, (full_height, full_width))
  return image
