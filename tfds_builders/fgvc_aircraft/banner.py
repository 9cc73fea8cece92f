"""Removes the banner below the photographs of FGVC-Aircraft."""

from __future__ import annotations

import io

from PIL import Image

from tfds_builders import jpeg
from tfds_builders.photos import FORMATS

BANNER_PX = 20


def cut_banner(data: bytes, px: int = BANNER_PX) -> bytes:
  """Takes rows off the bottom of an encoded image without loss of quality.

  A JPEG file is not encoded anew. The height in its header is lowered, so that
  decoders stop `px` rows earlier; all other bytes stay, the rows cut off among
  them. The pixels are those of the whole file, but for rounding in the colour
  of the last rows: where colour is subsampled, a decoder blends it with that of
  the row below, which is now beyond the edge. An image of another format
  becomes a PNG file of the rows that stay.

  Args:
    data: the encoded image.
    px: number of rows.

  Returns:
    The encoded image, `px` rows lower.

  Raises:
    ValueError: no row would be left, or the JPEG file is damaged.
    OSError: an image of another format cannot be decoded.
  """
  if data.startswith(jpeg.START):
    return jpeg.lowered(data, px)
  image = Image.open(io.BytesIO(data), formats=FORMATS)
  if image.height <= px:
    raise ValueError(f'{image.height} rows, of which {px} are to go')
  file = io.BytesIO()
  image.crop((0, 0, image.width, image.height - px)).save(file, 'PNG')
  return file.getvalue()
