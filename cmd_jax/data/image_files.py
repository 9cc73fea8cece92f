"""Opens image files, whatever their format and mode."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from cmd_jax.data import channels as channels_lib
from cmd_jax.data import decode, image_formats
from cmd_jax.data.inspect import kinds as kinds_lib
from cmd_jax.files import safe_read


def open_rgb(
  path_or_file: str | os.PathLike[str] | IO[bytes],
  *,
  min_px: int = 0,
  grey16_white: int = kinds_lib.TOP,
) -> Image.Image:
  """Opens an image file upright and in RGB, whatever its mode.

  Grayscale is repeated, transparency is composited on white, 16 bits are scaled
  to 8, and an animation shows its first frame. Safe to call from threads.

  Args:
    path_or_file: path, or binary file object, of a format of
      `image_formats.EXTENSIONS_OF`.
    min_px: if positive, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size,
      much faster, as long as its shorter side keeps this many pixels.
      `true_size` gives the size of the original all the same.
    grey16_white: value that is white in grey files of 16 bits, such as 4095
      where they hold 12 bits; a larger one is a ValueError. Colours of 16 bits
      are not scaled by it: Pillow keeps their upper eight bits alone.

  Returns:
    An RGB image with its pixels loaded.

  Raises:
    OSError: the file is missing, damaged, truncated, or not an image.
    ValueError: it is too large to be decoded safely, or its pixels have a range
      with no meaning as an image.
  """
  return _read(
    path_or_file, lambda image: decode.upright_rgb(image, min_px, grey16_white)
  )


def open_image(
  path_or_file: str | os.PathLike[str] | IO[bytes],
  *,
  channels: int = channels_lib.RGB,
  min_px: int = 0,
  grey16_white: int = kinds_lib.TOP,
) -> Image.Image | np.ndarray:
  """Opens an image file with the channels that are wanted.

  Args:
    path_or_file: see `open_rgb`.
    channels: C.
    min_px: see `open_rgb`; of other than three channels nothing is scaled.
    grey16_white: see `open_rgb`.

  Returns:
    With three channels as `open_rgb`, else [H, W, C] uint16, upright.

  Raises:
    OSError: as `open_rgb`.
    ValueError: as `open_rgb`, or an image of other than C channels, C not 3.
  """
  if channels == channels_lib.RGB:
    return open_rgb(path_or_file, min_px=min_px, grey16_white=grey16_white)
  return _read(
    path_or_file,
    lambda image: channels_lib.read_channels(image, channels, grey16_white),
  )


def _read(
  path_or_file: str | os.PathLike[str] | IO[bytes],
  load: Callable[[Image.Image], Any],
) -> Any:
  """What `load` makes of an image file; its errors are OSError, ValueError."""
  if isinstance(path_or_file, str | os.PathLike):
    safe_read.check_regular(path_or_file)
  with decode.quiet_pillow:
    try:
      with Image.open(path_or_file, formats=image_formats.available()) as image:
        return load(image)
    except UnidentifiedImageError as error:
      reason = image_formats.explain_unknown(path_or_file)
      raise OSError(reason) from error
    except Image.DecompressionBombError as error:
      raise ValueError(f'too many pixels to decode safely: {error}') from error
    except (OSError, ValueError, MemoryError):
      raise
    except Exception as error:
      # Pillow's readers raise nearly anything when bytes are damaged.
      reason = safe_read.one_line(error) or type(error).__name__
      raise OSError(f'damaged file: {reason}') from error
