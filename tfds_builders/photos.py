"""Encoded images that were decoded once, to know that they can be."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from PIL import ExifTags, Image
from tensorflow_datasets.core.utils import tqdm_utils

from cmd_jax.errors import UserError
from tfds_builders import jpeg
from tfds_builders.manual import Files, one_line

# What is not of them may start programs when Pillow decodes it.
FORMATS = ('JPEG', 'PNG')
# How many files a message names.
_NAMED = 5


class Photo(NamedTuple):
  """An encoded image that can be decoded.

  Attributes:
    name: name of its file.
    data: the encoded image.
    height: pixels.
    width: pixels.
  """

  name: str
  data: bytes
  height: int
  width: int

  def relative_box(
    self, left: float, top: float, right: float, bottom: float
  ) -> list[float]:
    """Makes edges in pixels, 0 at the image's, a box in fractions.

    Returns:
      (top, left, bottom, right), clipped to the image.
    """
    edges = (
      top / self.height,
      left / self.width,
      bottom / self.height,
      right / self.width,
    )
    return [min(max(edge, 0.0), 1.0) for edge in edges]


def _decode(name: str, data: bytes) -> Photo:
  """Decodes an image as a test.

  Boxes and parts were marked in the pixels as they are stored, and so the
  usual programs show them. Where EXIF or XMP tells to turn a JPEG image, they
  are dropped, or a reader that obeys them would misplace its annotations.
  """
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    # A JPEG file is then decoded to an eighth, which reads all of it.
    image.draft(None, (max(width // 8, 1), max(height // 8, 1)))
    image.load()
    is_jpeg = data.startswith(jpeg.START)
    if is_jpeg and _orientation(image) != 1:
      data = jpeg.without_app1(data)
  return Photo(name, data, height, width)


def _orientation(image: Image.Image) -> int:
  try:
    return image.getexif().get(ExifTags.Base.Orientation, 1)
  except Exception:
    # Readers take damaged EXIF data for none, whatever Pillow raises.
    return 1


def read_photos(
  files: Files,
  names: Collection[str],
  where: str,
  *,
  change: Callable[[bytes], bytes] | None = None,
) -> Iterator[Photo]:
  """Yields images once they were decoded as a test, in any order.

  Args:
    files: where the images are.
    names: which to read.
    where: what they are, for messages.
    change: applied to the encoded image first.

  Raises:
    UserError: in the end, if any was missing or damaged; it names them.
  """
  unseen = {*names}
  damaged = []
  # The bar of TFDS does not know how many there are.
  bar = tqdm_utils.tqdm(
    files.read(names), desc=where, total=len(names), unit=' images', leave=False
  )
  for name, data in bar:
    unseen.discard(name)
    try:
      data = change(data) if change else data
      photo = _decode(name, data)
    except Exception as e:
      # Pillow raises nearly anything for damaged files.
      damaged.append(f'{name} ({one_line(e)})')
    else:
      yield photo
  problems = [
    f'{len(found)} of {len(names):,} images {what}: '
    + ', '.join(found[:_NAMED])
    + (', ...' if len(found) > _NAMED else '')
    for found, what in (
      (sorted(unseen), 'are missing'),
      (damaged, 'are damaged'),
    )
    if found
  ]
  if problems:
    raise UserError(
      f'{where}: {"; ".join(problems)}. Fetch or unpack {files} again'
    )
