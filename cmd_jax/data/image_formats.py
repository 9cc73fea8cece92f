"""The image formats that are opened, and the endings of their names.

This is the one list of them. It does not depend on what is installed: a file
that needs something which is missing is found, counted and skipped with the
reason, instead of being overlooked.
"""

from __future__ import annotations

import functools
import os
from typing import IO

from PIL import Image

from cmd_jax.errors import missing_extra

# Those of photographs, the usual ones first, by Pillow's names; of each the
# extension first that is meant by most. Pillow opens others too, for some of
# which it starts programs: Ghostscript for PostScript, whatever the file is
# called.
EXTENSIONS_OF = {
  'JPEG': ('.jpg', '.jfif', '.jpe', '.jpeg', '.mpo'),
  'PNG': ('.png', '.apng'),
  'WEBP': ('.webp',),
  'GIF': ('.gif',),
  'BMP': ('.bmp',),
  'DIB': ('.dib',),
  'TIFF': ('.tif', '.tiff'),
  'PPM': ('.ppm', '.pbm', '.pfm', '.pgm', '.pnm'),
  'AVIF': ('.avif', '.avifs'),
  'JPEG2000': ('.jp2', '.j2c', '.j2k', '.jpc', '.jpf', '.jpx'),
  'HEIF': ('.heic', '.heics', '.heif', '.heifs', '.hif'),
}
# In that order: what `str.endswith` takes.
EXTENSIONS = tuple(
  extension for extensions in EXTENSIONS_OF.values() for extension in extensions
)
# Brands of HEIF whose pictures are coded by HEVC, as those of telephones are,
# and those that leave the coding open (ISO/IEC 23008-12, annex B).
_HEIF_BRANDS = frozenset(
  (b'heic', b'heix', b'heim', b'heis', b'hevc', b'hevx', b'mif1', b'msf1')
)


@functools.cache
def available() -> tuple[str, ...]:
  """The formats that can be opened here, those of the extra `heif` included."""
  Image.init()
  try:
    import pillow_heif
  except ImportError:
    pass
  else:
    # The pictures alone: previews and depth maps in the file cost time.
    pillow_heif.register_heif_opener(thumbnails=False, depth_images=False)
  return tuple(name for name in EXTENSIONS_OF if name in Image.OPEN)


def explain_unknown(path_or_file: str | os.PathLike[str] | IO[bytes]) -> str:
  """Why no format of `available` fits a file, in one line.

  Args:
    path_or_file: a file that can be read, or a binary file object that can
      seek.
  """
  if isinstance(path_or_file, str | os.PathLike):
    with open(path_or_file, 'rb') as file:
      start = file.read(12)
  else:
    path_or_file.seek(0)
    start = path_or_file.read(12)
  is_heif = start[4:8] == b'ftyp' and start[8:] in _HEIF_BRANDS
  if is_heif and 'HEIF' not in available():
    return str(missing_extra('HEIC and HEIF need pillow-heif', 'heif'))
  return 'not an image, or of an unknown format'
