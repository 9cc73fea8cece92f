"""Images of other than three channels: kept as they are, in 16 bits.

Greyscale (one), with an alpha channel (two, four), and TIFF files whose pages
are the channels of one image. Photographs of three channels go another way,
`image_files.open_rgb`, in 8 bits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from cmd_jax.data.inspect.kinds import TOP

RGB = 3
# Enough for a mean and a deviation of each channel.
_MOST_MEASURED = 2048
# A channel that is the same everywhere is not divided by nothing.
_LEAST_STD = 1e-3


class Statistics(NamedTuple):
  """What views are normalised by, as fractions of white.

  Attributes:
    mean: [C] of the channels.
    std: [C], above 0.
  """

  mean: tuple[float, ...]
  std: tuple[float, ...]


# Of three channels, whatever the images are: weights are made for it.
IMAGENET = Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def dtype_of(channels: int) -> type:
  """What canvases of so many channels are kept in; their largest is white."""
  return np.uint8 if channels == RGB else np.uint16


def _pages(image: Image.Image) -> list[Image.Image]:
  """The pages of a TIFF file, or the first frame of any other."""
  count = getattr(image, 'n_frames', 1) if image.format == 'TIFF' else 1
  pages = []
  for number in range(count):
    if count > 1:
      image.seek(number)
    image.load()
    pages.append(ImageOps.exif_transpose(image))
  return pages


def _planes(page: Image.Image, grey16_white: int) -> np.ndarray:
  """[H, W, c] float64 in 0..1 of a page of any mode.

  Raises:
    ValueError: values that have no meaning as an image.
  """
  if page.mode in ('1', 'P', 'PA'):
    # What a palette stands for; black and white are grey.
    transparent = page.has_transparency_data
    page = page.convert(
      'L' if page.mode == '1' else 'RGBA' if transparent else 'RGB'
    )
  pixels = np.asarray(page)
  pixels = pixels[..., None] if pixels.ndim == 2 else pixels
  top = {'I': grey16_white, 'F': 1}.get(page.mode[0], 255)
  # Written so that a NaN fails it too.
  if not (pixels.min() >= 0 and pixels.max() <= top):
    raise ValueError(f'pixels outside the range from 0 to {top}')
  return pixels / top


def read_channels(
  image: Image.Image, channels: int, grey16_white: int = TOP
) -> np.ndarray:
  """The channels of a file that is opened, upright.

  Args:
    image: as Image.open gives it.
    channels: C, that it must have, all pages together.
    grey16_white: value that is white in grey files of 16 bits.

  Returns:
    [H, W, C] uint16, white is 65535.

  Raises:
    ValueError: another number of channels, pages of different sizes, or values
      without a meaning.
    Exception: whatever Pillow raises for damaged bytes.
  """
  pages = [_planes(page, grey16_white) for page in _pages(image)]
  if len({page.shape[:2] for page in pages}) > 1:
    raise ValueError('its pages have different sizes')
  found = sum(page.shape[-1] for page in pages)
  if found != channels:
    raise ValueError(
      f'the image has {found} channel{"s" if found > 1 else ""}, and '
      f'config.model.channels is {channels}'
    )
  return np.rint(TOP * np.concatenate(pages, -1)).astype(np.uint16)


def squash(pixels: np.ndarray, canvas_px: int, gap: float) -> np.ndarray:
  """Squashes an image of any channels to a square, antialiased (bicubic).

  Args:
    pixels: [H, W, C] uint16.
    canvas_px: side R of the canvas in pixels.
    gap: Pillow's `reducing_gap`.

  Returns:
    [R, R, C] uint16.
  """
  planes = [
    Image.fromarray(plane.astype(np.float32)).resize(
      (canvas_px, canvas_px), Image.Resampling.BICUBIC, reducing_gap=gap
    )
    for plane in np.moveaxis(pixels, -1, 0)
  ]
  canvas = np.stack([np.asarray(plane) for plane in planes], -1)
  return np.rint(np.clip(canvas, 0, TOP)).astype(np.uint16)


def measure(images: np.ndarray) -> Statistics:
  """Mean and deviation of the channels, of 2,048 images evenly spaced.

  Args:
    images: [N, R, R, C] canvases, N of at least 1; anything that slices like an
      array. Of three channels ImageNet's are given.
  """
  if images.shape[-1] == RGB:
    return IMAGENET
  count = min(len(images), _MOST_MEASURED)
  rows = np.unique(np.linspace(0, len(images) - 1, count).astype(int))
  total = squares = 0.0
  for row in rows:
    pixels = np.asarray(images[row]).reshape(-1, images.shape[-1]) / TOP
    total, squares = total + pixels.mean(0), squares + (pixels**2).mean(0)
  mean = total / len(rows)
  std = np.sqrt(np.maximum(squares / len(rows) - mean**2, _LEAST_STD**2))
  return Statistics(tuple(map(float, mean)), tuple(map(float, std)))


def as_pictures(canvases: np.ndarray) -> np.ndarray:
  """What is shown of canvases: three channels of 8 bits.

  Args:
    canvases: [..., C], uint8 of three channels or uint16 of others.

  Returns:
    [..., 3] uint8: the canvases themselves; of one or two channels the first
    as grey, of more the first three.
  """
  if canvases.dtype == np.uint8:
    return canvases
  shown = canvases[..., :RGB] if canvases.shape[-1] > RGB else canvases[..., :1]
  grey = np.broadcast_to(shown, (*shown.shape[:-1], RGB))
  return np.rint(grey / (TOP / 255)).astype(np.uint8)
