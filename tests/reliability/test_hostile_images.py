"""Photographs that are none, or that ask for more than they are worth."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from cmd_jax.data import canvas, image_files
from cmd_jax.export import images as export_images
from tests.reliability import mutate


def _encode(mode, kind, **options):
  rng = np.random.default_rng(0)
  image = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
  buffer = io.BytesIO()
  image.convert(mode).save(buffer, kind, **options)
  return buffer.getvalue()


def _png(width, height, data=b'', chunks=b'', kind=2):
  def chunk(name, content):
    checksum = struct.pack('>I', zlib.crc32(name + content))
    return struct.pack('>I', len(content)) + name + content + checksum

  header = struct.pack('>IIBBBBB', width, height, 8, kind, 0, 0, 0)
  body = chunk(b'IHDR', header) + chunks + chunk(b'IDAT', data)
  return b'\x89PNG\r\n\x1a\n' + body + chunk(b'IEND', b'')


def _text(key, value):
  content = key + b'\0' + value
  checksum = struct.pack('>I', zlib.crc32(b'tEXt' + content))
  return struct.pack('>I', len(content)) + b'tEXt' + content + checksum


def _profile(content):
  content = b'icc\0\0' + zlib.compress(content, 9)
  checksum = struct.pack('>I', zlib.crc32(b'iCCP' + content))
  return struct.pack('>I', len(content)) + b'iCCP' + content + checksum


def _with_size(data, place, form, *size):
  end = place + struct.calcsize(form)
  return data[:place] + struct.pack(form, *size) + data[end:]


def _seeds():
  png = mutate.with_png_checksums
  turned = Image.Exif()
  turned[274] = 6
  frames = [Image.new('P', (16, 12), i) for i in range(3)]
  return [
    mutate.Seed(_encode('RGB', 'PNG'), png),
    mutate.Seed(_encode('RGBA', 'PNG'), png),
    mutate.Seed(_encode('P', 'PNG', transparency=3), png),
    mutate.Seed(_encode('I;16', 'PNG'), png),
    mutate.Seed(_encode('RGB', 'JPEG', exif=turned)),
    mutate.Seed(_encode('CMYK', 'JPEG', progressive=True)),
    mutate.Seed(_encode('RGB', 'TIFF', compression='tiff_lzw')),
    mutate.Seed(_encode('L', 'TIFF', compression='tiff_deflate')),
    mutate.Seed(_encode('RGB', 'TIFF')),
    mutate.Seed(_encode('RGB', 'WEBP')),
    mutate.Seed(_encode('RGBA', 'WEBP', lossless=True)),
    mutate.Seed(
      _encode('P', 'GIF', save_all=True, append_images=frames, loop=0)
    ),
    mutate.Seed(_encode('RGB', 'BMP')),
    mutate.Seed(_encode('RGB', 'PPM')),
  ]


_POSTSCRIPT = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 16 12
(%pipe%touch hacked) (w) file closefile
showpage
%%EOF
"""


def _specials():
  jpeg, gif = _encode('RGB', 'JPEG'), _encode('P', 'GIF')
  frame = jpeg.index(b'\xff\xc0') + 5
  bmp, webp = _encode('RGB', 'BMP'), _encode('RGB', 'WEBP', lossless=True)
  tiff = _encode('RGB', 'TIFF')
  width = tiff.index(struct.pack('<HHI', 256, 4, 1)[:4])
  nothing = zlib.compress(bytes(10**8), 9)
  return {
    'postscript': _POSTSCRIPT,
    'empty': b'',
    'huge png': _png(2**31 - 1, 2**31 - 1),
    'png that is mostly missing': _png(13_000, 13_000, nothing[:100]),
    'png of more than it holds': _png(8, 8, nothing),
    'very wide png': _png(10**8, 1, nothing),
    'very high png': _png(1, 10**8, nothing, kind=0),
    'huge jpeg': _with_size(jpeg, frame, '>HH', 65535, 65535),
    'huge gif': _with_size(gif, 6, '<HH', 65535, 65535),
    'huge bmp': _with_size(bmp, 18, '<ii', 2**31 - 1, 2**31 - 1),
    'upside-down bmp': _with_size(bmp, 18, '<ii', -1, -(2**31)),
    'huge webp': _with_size(webp, 21, '<I', 2**28 - 1),
    'huge tiff': _with_size(tiff, width + 8, '<I', 2**32 - 1),
    'huge ppm': b'P6 99999999 99999999 255\n',
    'endless number': b'P6 ' + b'9' * 10**6,
    'text bomb': _png(8, 8, chunks=_profile(bytes(10**8))),
    'note of its own size': _png(
      8, 8, zlib.compress(bytes(200)), _text(b'cmd_jax.full_size', b'xx')
    ),
    'transparency in words': _png(
      8, 8, zlib.compress(bytes(200)), _text(b'transparency', b'yes')
    ),
    'page': b'<html><script>alert(1)</script></html>',
  }


def make_targets(folder):
  return [
    mutate.Target(
      'images',
      'tests.reliability.readers:image',
      'images/photo.jpg',
      _seeds(),
      _specials(),
      # A photograph may have 179 million pixels of four bytes.
      mebibytes=1600,
    )
  ]


@pytest.mark.parametrize('kind', ['EPS', 'PSD', 'FITS', 'XPM'])
def test_only_formats_of_photographs_are_opened(kind, tmp_path):
  data = {
    'EPS': _POSTSCRIPT,
    'PSD': b'8BPS\0\x01' + bytes(6) + struct.pack('>HIIHH', 3, 8, 8, 8, 3),
    'FITS': b'SIMPLE  =                    T' + b' ' * 3000,
    'XPM': b'/* XPM */\n',
  }[kind]
  path = tmp_path / 'photo.jpg'
  path.write_bytes(data)
  with pytest.raises(OSError, match='not an image'):
    image_files.open_rgb(path)


def test_a_file_does_not_tell_the_size_it_had(tmp_path):
  path = tmp_path / 'photo.png'
  size = _text(b'cmd_jax.full_size', b'xx')
  path.write_bytes(_png(8, 6, zlib.compress(bytes(200)), size))
  assert canvas.true_size(image_files.open_rgb(path)) == (6, 8)


def test_pipes_and_devices_are_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / 'pipe.jpg')
  (tmp_path / 'zeros.jpg').symlink_to('/dev/zero')
  (tmp_path / 'folder.jpg').mkdir()
  for name in ('pipe.jpg', 'zeros.jpg', 'folder.jpg'):
    with pytest.raises(OSError, match='not a file'):
      image_files.open_rgb(tmp_path / name)
  assert 'pipe.jpg' in export_images.list_images(tmp_path)
