"""Images in the forms that an encoder takes from Python."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

# A path, a PIL image or [H, W, 3] uint8.
ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray


def as_list(images: ImageLike | Iterable[ImageLike]) -> Sequence[ImageLike]:
  """One image or several, [N, H, W, 3] among them, as several."""
  if isinstance(images, np.ndarray) and images.ndim == 4:
    return images
  if isinstance(images, str | os.PathLike | Image.Image | np.ndarray):
    return [images]
  return list(images)


def from_array(image: Any, channels: int = 3) -> Image.Image | np.ndarray:
  """An image of [H, W, 3] uint8; of other channels [H, W, C] uint16 itself.

  Raises:
    ValueError: another shape or dtype, or no pixels.
  """
  array = np.asarray(image)
  if channels != 3:
    wanted = array.dtype == np.uint16 and array.shape[2:] == (channels,)
    if not wanted or not array.size:
      raise ValueError(
        f'{array.dtype} {list(array.shape)} is no image: give '
        f'[H, W, {channels}] uint16 with white 65535, or a path'
      )
    return array
  if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
    raise ValueError(
      f'{array.dtype} {list(array.shape)} is no image: give [H, W, 3] uint8, a '
      'PIL image or a path'
    )
  if not array.size:
    raise ValueError('an image without pixels: give [H, W, 3] uint8')
  return Image.fromarray(array)


def describe(image: ImageLike) -> str:
  """The path of an image, or what it is given as."""
  if isinstance(image, str | os.PathLike):
    return os.fspath(image)
  return type(image).__name__
