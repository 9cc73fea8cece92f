"""Pictures as they come: telephones', cameras' and scanners' formats."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image

from cmd_jax.data import canvas, image_files, image_formats
from cmd_jax.data.inspect import kinds
from cmd_jax.data.sources import folder

# The encoders of some lose a few grey levels even at their best.
LOSSY = {'JPEG', 'WEBP', 'AVIF', 'JPEG2000', 'HEIF', 'GIF'}


@pytest.fixture(name='without_heif')
def _without_heif(monkeypatch):
  """As where pillow-heif is not installed."""
  monkeypatch.setitem(sys.modules, 'pillow_heif', None)
  image_formats.available.cache_clear()
  monkeypatch.delitem(Image.OPEN, 'HEIF', raising=False)
  yield
  monkeypatch.undo()
  image_formats.available.cache_clear()


def picture():
  """Four quarters of different colours, 40 x 64 pixels."""
  pixels = np.zeros((40, 64, 3), np.uint8)
  pixels[:20, :32], pixels[:20, 32:] = (200, 40, 40), (40, 180, 60)
  pixels[20:, :32], pixels[20:, 32:] = (60, 60, 190), (220, 210, 60)
  return Image.fromarray(pixels)


def as_heic(**options):
  pytest.importorskip('pillow_heif', reason='the extra heif is not installed')
  assert 'HEIF' in image_formats.available()
  file = io.BytesIO()
  picture().save(file, 'HEIF', quality=95, **options)
  file.seek(0)
  return file


def test_the_list_has_all_that_pillow_calls_so():
  Image.init()
  listed = {
    extension: name
    for name, extensions in image_formats.EXTENSIONS_OF.items()
    for extension in extensions
  }
  assert len(listed) == len(image_formats.EXTENSIONS)
  for extension, name in Image.registered_extensions().items():
    if name in image_formats.EXTENSIONS_OF:
      assert listed[extension.lower()] == name
  # Those of phones are found, whether they can be opened or not.
  assert listed['.heic'] == 'HEIF'


@pytest.mark.parametrize('name', sorted(image_formats.EXTENSIONS_OF))
def test_every_format_is_opened(tmp_path, name):
  if name not in image_formats.available():
    pytest.skip(f'{name} cannot be opened here')
  path = tmp_path / f'a{image_formats.EXTENSIONS_OF[name][0]}'
  options = {'quality': 95} if name in LOSSY - {'GIF', 'JPEG2000'} else {}
  picture().save(path, name, **options)
  image = image_files.open_rgb(path)
  assert image.mode == 'RGB' and image.size == (64, 40)
  # The middle of a quarter, away from where colours are smoothed.
  got = np.asarray(image, int)[10::20, 16::32]
  expected = np.asarray(picture(), int)[10::20, 16::32]
  assert np.abs(got - expected).max() <= (8 if name in LOSSY else 0)
  noted = np.array([kinds.noted_kinds(image)])
  assert not len(kinds.rows_of_kind(noted, 'misnamed'))


def test_a_turned_heic_is_upright():
  exif = Image.Exif()
  exif[0x0112] = 6
  image = image_files.open_rgb(as_heic(exif=exif.tobytes()))
  assert image.size == (40, 64)
  red = np.asarray(image, int)[16, 30]
  assert np.abs(red - (200, 40, 40)).max() <= 8


def test_a_missing_extra_is_named_and_the_others_are_used(
  tmp_path, without_heif
):
  # The beginning of a photograph of a telephone.
  start = b'\0\0\0\x24ftypheic\0\0\0\0mif1heic' + bytes(200)
  (tmp_path / 'a.heic').write_bytes(start)
  (tmp_path / 'c.HEIC').write_bytes(b'a text')
  picture().save(tmp_path / 'b.jpg')
  source = folder.folder_source(str(tmp_path), 'pretrain', index_file='')
  canvases = canvas.make_canvases(source, canvas_px=8)
  assert canvases.file_names == ('b.jpg',)
  reasons = dict(canvases.skipped)
  assert "pip install 'cmd_jax[heif]'" in reasons['a.heic']
  assert reasons['c.HEIC'] == 'not an image, or of an unknown format'


def test_a_damaged_heic_is_one_line():
  content = as_heic().getvalue()
  for damaged in (content[: len(content) // 2], content[:60]):
    with pytest.raises((OSError, ValueError)) as caught:
      image_files.open_rgb(io.BytesIO(damaged))
    assert '\n' not in str(caught.value)


def test_100_megapixels_are_used_and_200_are_skipped(tmp_path):
  # Black and white, so that they are small files and little memory.
  Image.new('1', (10_000, 10_000), 1).save(tmp_path / 'a.png')
  Image.new('1', (20_000, 10_000), 1).save(tmp_path / 'b.png')
  picture().save(tmp_path / 'c.png')
  source = folder.folder_source(str(tmp_path), 'pretrain')
  canvases = canvas.make_canvases(source, canvas_px=8)
  assert canvases.file_names == ('a.png', 'c.png')
  assert canvases.sizes.tolist() == [[10_000, 10_000], [40, 64]]
  ((name, reason),) = canvases.skipped
  assert name == 'b.png'
  assert reason.startswith('too many pixels to decode safely')
  assert '\n' not in reason
