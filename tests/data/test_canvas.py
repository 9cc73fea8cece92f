"""Decoding images of every kind, and making canvases of them."""

from __future__ import annotations

import io
import os
import pathlib
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from cmd_jax import errors
from cmd_jax.data import canvas, image_files
from cmd_jax.data.inspect import kinds
from cmd_jax.data.sources import base as source_lib

# No symmetry of the square maps it to itself.
CORNERS = np.array(
  [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8
)
# What makes an image upright again, by EXIF orientation (EXIF 2.3, 0x0112).
TURNS = {
  1: lambda x: x,
  2: lambda x: x[:, ::-1],
  3: lambda x: x[::-1, ::-1],
  4: lambda x: x[::-1],
  5: lambda x: x.transpose(1, 0, 2),
  6: lambda x: np.rot90(x, -1),
  7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
  8: lambda x: np.rot90(x),
}


def synthetic_photograph(height, width, seed=0):
  """Smooth noise and a few hard edges."""
  rng = np.random.default_rng(seed)
  noise = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
  pixels = np.array(noise.resize((width, height), Image.Resampling.BICUBIC))
  for _ in range(4):
    top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
    pixels[top : top + height // 4, left : left + width // 3] //= 2
  return Image.fromarray(pixels)


def photograph(min_width):
  """A real photograph if there are any here, a synthetic one otherwise."""
  default = pathlib.Path(__file__).parents[3] / 'shared' / 'data'
  folder = pathlib.Path(os.environ.get('CMD_JAX_PHOTOS_DIR', default))
  path = next(iter(sorted(folder.glob('**/*.jpg'))), None)
  if path is None:
    return synthetic_photograph(min_width * 3 // 4, min_width)
  with Image.open(path) as image:
    image = image.convert('RGB')
  height = round(image.height * min_width / image.width)
  return image.resize((min_width, height))


def encode(image, file_format='PNG', **options):
  file = io.BytesIO()
  image.save(file, file_format, **options)
  file.seek(0)
  return file


def pixels_of(file, **options):
  image = image_files.open_rgb(file, **options)
  assert image.mode == 'RGB'
  return np.asarray(image)


def grey(values):
  return np.repeat(np.asarray(values, np.uint8)[..., None], 3, axis=-1)


def box_reference(pixels, canvas_px):
  """Means over the blocks of an image whose sides are multiples of R."""
  high, wide = (side // canvas_px for side in pixels.shape[:2])
  blocks = pixels.astype(float).reshape(canvas_px, high, canvas_px, wide, 3)
  return blocks.mean((1, 3))


def make_source(files, part_ids=None, boxes=None, **fields):
  """A source of encoded files; None is one that can't be read."""

  def load(index):
    if files[index] is None:
      raise OSError('cannot be\nread')
    return source_lib.Example(
      image_files.open_rgb(io.BytesIO(files[index])),
      None if part_ids is None else part_ids[index],
      None if boxes is None else boxes[index],
    )

  return source_lib.Source(
    **{
      'name': 'birds/train',
      'class_names': ('a', 'b'),
      'file_names': tuple(f'{i}.png' for i in range(len(files))),
      'labels': np.arange(len(files), dtype=np.int32) % 2,
      'load': load,
      **fields,
    }
  )


def flat_files(shapes):
  """Images of one colour each: the index gives the colour."""
  return [
    encode(Image.new('RGB', (width, height), (10 * i, 0, 255 - 10 * i))).read()
    for i, (height, width) in enumerate(shapes)
  ]


def grey_image(values, dtype=np.uint8):
  return Image.fromarray(np.array(values, dtype))


def grey_alpha_image(values, alphas):
  return Image.merge('LA', [grey_image(values), grey_image(alphas)])


def palette_image(transparent=None):
  image = grey_image([[0, 1, 2]]).convert('P')
  image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
  if transparent is not None:
    image.info['transparency'] = transparent
  return image


def cmyk_image():
  inks = [[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 255, 0], [0, 0, 0, 255]]]
  bands = [grey_image(band) for band in np.moveaxis(np.array(inks), -1, 0)]
  return Image.merge('CMYK', bands)


RED, GREEN, BLUE = np.eye(3, dtype=np.uint8) * 255
WHITE, BLACK, CYAN = [255] * 3, [0] * 3, [0, 255, 255]
MODES = {
  'rgb': (Image.fromarray(CORNERS), 'PNG', CORNERS),
  'grayscale': (grey_image([[0, 100, 255]]), 'PNG', grey([[0, 100, 255]])),
  'bilevel': (grey_image([[0, 255]]).convert('1'), 'PNG', grey([[0, 255]])),
  # Black: opaque, one fifth, and not there at all.
  'rgba': (
    Image.fromarray(
      np.array([[[0, 0, 0, 255], [0, 0, 0, 51], [0, 0, 0, 0]]], np.uint8)
    ),
    'PNG',
    grey([[0, 204, 255]]),
  ),
  'la': (grey_alpha_image([[7, 7]], [[255, 0]]), 'PNG', grey([[7, 255]])),
  'palette': (palette_image(), 'PNG', [[RED, GREEN, BLUE]]),
  'palette-transparent': (palette_image(1), 'PNG', [[RED, WHITE, BLUE]]),
  'gif': (palette_image(), 'GIF', [[RED, GREEN, BLUE]]),
  'gif-transparent': (palette_image(1), 'GIF', [[RED, WHITE, BLUE]]),
  'cmyk': (cmyk_image(), 'TIFF', [[WHITE, CYAN, RED, BLACK]]),
  # 65535 / 255 = 257; dropping the low byte would give 0, 1, 1, 255.
  '16-bit': (
    grey_image([[0, 257, 511, 65535]], np.uint16),
    'PNG',
    grey([[0, 1, 2, 255]]),
  ),
  '16-bit-big-endian': (
    grey_image([[0, 257, 511, 65535]], '>u2'),
    'TIFF',
    grey([[0, 1, 2, 255]]),
  ),
  '32-bit': (
    grey_image([[0, 511, 65535]], np.int32),
    'TIFF',
    grey([[0, 2, 255]]),
  ),
  'float': (
    grey_image([[0, 0.5, 0.25, 1]], np.float32),
    'TIFF',
    grey([[0, 128, 64, 255]]),
  ),
}


@pytest.mark.parametrize('mode', MODES)
def test_modes(mode):
  image, file_format, expected = MODES[mode]
  np.testing.assert_array_equal(
    pixels_of(encode(image, file_format)), np.array(expected)
  )


def _kinds_in(file, **options):
  note = kinds.noted_kinds(image_files.open_rgb(file, **options))
  return {kind for i, kind in enumerate(kinds.KINDS) if note >> i & 1}


@pytest.mark.parametrize(
  'mode, expected',
  [
    ('rgb', set()),
    ('grayscale', {'grayscale'}),
    ('bilevel', {'grayscale'}),
    ('rgba', {'alpha channel'}),
    ('la', {'grayscale', 'alpha channel'}),
    ('palette', {'palette'}),
    ('palette-transparent', {'palette', 'alpha channel'}),
    ('gif', {'palette'}),
    ('cmyk', {'CMYK'}),
    ('16-bit', {'grayscale', '16-bit'}),
    ('16-bit-big-endian', {'grayscale', '16-bit'}),
    ('32-bit', {'grayscale', '16-bit'}),
    ('float', {'grayscale', '16-bit'}),
  ],
)
def test_kinds_of_modes(mode, expected):
  image, file_format, _ = MODES[mode]
  assert _kinds_in(encode(image, file_format)) == expected


def test_16_bits_of_all_channels_together_are_not_deep():
  # BMP with 5, 6 and 5 bits, which Pillow can't write.
  masks = struct.pack('<III', 0xF800, 0x07E0, 0x001F)
  header = struct.pack('<IiiHHIIiiII', 40, 2, 1, 1, 16, 3, 4, 0, 0, 0, 0)
  pixels = struct.pack('<HH', 0xF800, 0x001F)
  start = struct.pack('<2sIHHI', b'BM', 70, 0, 0, 66)
  file = io.BytesIO(start + header + masks + pixels)
  np.testing.assert_array_equal(pixels_of(file), [[RED, BLUE]])
  file.seek(0)
  assert _kinds_in(file) == set()


@pytest.mark.parametrize('file_format', ['PNG', 'TIFF', 'WEBP', 'JPEG'])
def test_turned_files_are_noted(file_format):
  for orientation in (1, 3):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encode(synthetic_photograph(40, 60), file_format, exif=exif)
    expected = {'EXIF-rotated'} if orientation == 3 else set()
    assert _kinds_in(file) == expected


@pytest.mark.parametrize(
  'name, file_format, expected',
  [
    ('a.jpg', 'JPEG', set()),
    ('a.JPEG', 'MPO', set()),
    ('a.jpg', 'PNG', {'misnamed'}),
    ('a.gif', 'JPEG', {'misnamed'}),
    ('a.photo', 'JPEG', set()),
  ],
)
def test_files_named_as_another_format_are_noted(
  tmp_path, name, file_format, expected
):
  options = {}
  if file_format == 'MPO':
    # Two pictures in one file are no animation.
    options = {'save_all': True, 'append_images': [Image.new('RGB', (8, 8))]}
  path = tmp_path / name
  Image.new('RGB', (8, 8)).save(path, file_format, **options)
  assert _kinds_in(path) == expected
  assert _kinds_in(os.fspath(path).encode()) == expected


def test_cmyk_jpeg_is_not_inverted():
  image = cmyk_image().resize((64, 16), Image.Resampling.NEAREST)
  pixels = pixels_of(encode(image, 'JPEG', quality=95)).astype(int)
  expected = np.array([WHITE, CYAN, RED, BLACK])
  np.testing.assert_allclose(pixels[8, 8::16], expected, atol=8)


def test_16_bit_colour_png():
  # Pillow can't write one.
  values = np.array([[[0, 300, 65535], [40000, 512, 12345]]], '>u2')

  def chunk(kind, data):
    check = struct.pack('>I', zlib.crc32(kind + data))
    return struct.pack('>I', len(data)) + kind + data + check

  header = chunk(b'IHDR', struct.pack('>IIBBBBB', 2, 1, 16, 2, 0, 0, 0))
  data = chunk(b'IDAT', zlib.compress(b'\0' + values.tobytes()))
  png = b'\x89PNG\r\n\x1a\n' + header + data + chunk(b'IEND', b'')
  expected = values.astype(float) / 257
  np.testing.assert_allclose(pixels_of(io.BytesIO(png)), expected, atol=1)
  assert _kinds_in(io.BytesIO(png)) == {'16-bit'}


@pytest.mark.parametrize(
  'image',
  [
    grey_image([[0, 1.5]], np.float32),
    grey_image([[0, np.nan]], np.float32),
    grey_image([[-1, 5]], np.int32),
    grey_image([[70000, 5]], np.int32),
  ],
)
def test_meaningless_range_is_refused(image):
  with pytest.raises(ValueError, match='range'):
    image_files.open_rgb(encode(image, 'TIFF'))


@pytest.mark.parametrize('orientation', TURNS)
@pytest.mark.parametrize(
  'file_format, options',
  [
    ('PNG', {}),
    ('TIFF', {}),
    ('WEBP', {'lossless': True}),
    ('JPEG', {'quality': 98, 'subsampling': 0}),
  ],
)
def test_exif_orientation(orientation, file_format, options):
  stored = np.array(
    Image.fromarray(CORNERS).resize((48, 16), Image.Resampling.NEAREST)
  )
  exif = Image.Exif()
  exif[0x0112] = orientation
  file = encode(Image.fromarray(stored), file_format, exif=exif, **options)
  expected = TURNS[orientation](stored).astype(int)
  pixels = pixels_of(file).astype(int)
  assert pixels.shape == expected.shape
  np.testing.assert_allclose(
    pixels, expected, atol=6 if file_format == 'JPEG' else 0
  )


@pytest.mark.parametrize('file_format', ['GIF', 'PNG', 'WEBP', 'TIFF'])
def test_first_frame_of_animation(file_format):
  frames = [Image.new('RGB', (8, 8), tuple(c)) for c in (RED, BLUE, GREEN)]
  options = {'lossless': True} if file_format == 'WEBP' else {}
  file = encode(
    frames[0], file_format, save_all=True, append_images=frames[1:], **options
  )
  assert Image.open(file).n_frames == 3
  np.testing.assert_array_equal(pixels_of(file), np.full((8, 8, 3), RED))
  file.seek(0)
  assert 'animated' in _kinds_in(file)


def test_a_damaged_second_frame_does_not_matter():
  frames = [synthetic_photograph(60, 80, seed) for seed in range(2)]
  whole = encode(
    frames[0], 'GIF', save_all=True, append_images=frames[1:]
  ).read()
  first = len(encode(frames[0], 'GIF').read())
  expected = pixels_of(io.BytesIO(whole))
  for keep in range(first, first + 60, 7):
    damaged = io.BytesIO(whole[:keep])
    np.testing.assert_array_equal(pixels_of(damaged), expected)


@pytest.mark.parametrize(
  'file_format', ['JPEG', 'PNG', 'GIF', 'WEBP', 'BMP', 'TIFF', 'PPM']
)
def test_damaged_file_raises(file_format):
  whole = encode(synthetic_photograph(60, 80), file_format).read()
  image_files.open_rgb(io.BytesIO(whole))
  for keep in (0, 1, 4, 10, 30, len(whole) // 2, len(whole) * 9 // 10):
    with pytest.raises((OSError, ValueError)):
      image_files.open_rgb(io.BytesIO(whole[:keep]))


@pytest.mark.parametrize('file_format', ['JPEG', 'PNG', 'GIF', 'WEBP', 'TIFF'])
def test_garbled_file_raises_nothing_else(file_format):
  whole = np.frombuffer(
    encode(synthetic_photograph(20, 30), file_format).read(), np.uint8
  )
  rng = np.random.default_rng(0)
  for _ in range(40):
    garbled = whole.copy()
    garbled[rng.integers(0, min(len(whole), 200), 4)] = rng.integers(0, 256, 4)
    try:
      image_files.open_rgb(io.BytesIO(garbled.tobytes()))
    except (OSError, ValueError) as error:
      assert str(error)


def test_missing_file_and_other_file(tmp_path):
  with pytest.raises(FileNotFoundError):
    image_files.open_rgb(tmp_path / 'none.jpg')
  (tmp_path / 'text.jpg').write_text('not an image at all')
  with pytest.raises(OSError, match='not an image'):
    image_files.open_rgb(tmp_path / 'text.jpg')


def test_decompression_bomb(monkeypatch):
  file = encode(Image.new('RGB', (40, 40)))
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
  # Above the limit Pillow warns, and above twice the limit it raises.
  assert image_files.open_rgb(file).size == (40, 40)
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 700)
  with pytest.raises(ValueError, match='too many pixels to decode safely'):
    image_files.open_rgb(file)


def test_pillow_warnings_do_not_leak(monkeypatch):
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1000)
  files = [encode(Image.new('RGB', (40, 40))).read()] * 40
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    before = list(warnings.filters)
    canvas.make_canvases(make_source(files), canvas_px=8, num_threads=4)
    threads = [
      threading.Thread(target=image_files.open_rgb, args=(io.BytesIO(file),))
      for file in files
    ]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert not caught
    assert list(warnings.filters) == before
    # The warnings of others are none of our business.
    Image.open(io.BytesIO(files[0]))
    assert [w.category for w in caught] == [Image.DecompressionBombWarning]


def test_damaged_exif_is_ignored():
  exif = b'Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0'
  file = encode(Image.new('RGB', (8, 8), 'white'), 'JPEG', exif=exif)
  np.testing.assert_array_equal(pixels_of(file), 255)


@pytest.mark.parametrize('orientation', [1, 6])
@pytest.mark.parametrize('min_px', [0, 75, 100, 150, 299, 301])
def test_scaled_decoding(orientation, min_px):
  image = synthetic_photograph(600, 901)
  exif = Image.Exif()
  exif[0x0112] = orientation
  file = encode(image, 'JPEG', quality=95, exif=exif)
  drafted = image_files.open_rgb(file, min_px=min_px)
  factor = {75: 8, 100: 4, 150: 4, 299: 2}.get(min_px, 1)
  assert min(drafted.size) == 600 // factor >= min_px
  size = (600, 901) if orientation == 1 else (901, 600)
  assert canvas.true_size(drafted) == size
  assert canvas.true_size(drafted.copy()) == size
  assert canvas.true_size(drafted.crop((0, 0, 9, 5))) == (5, 9)
  file.seek(0)
  whole = canvas.make_canvas(image_files.open_rgb(file), 75).astype(int)
  scaled = canvas.make_canvas(drafted, 75).astype(int)
  error = abs(whole - scaled).mean()
  assert error < 2
  assert error < 0.4 * abs(np.roll(whole, 1, axis=0) - scaled).mean()


def test_scaled_decoding_leaves_other_formats_whole():
  image = image_files.open_rgb(encode(Image.fromarray(CORNERS)), min_px=1)
  assert image.size == (2, 2)
  assert canvas.true_size(image) == (2, 2)


def test_canvas_squashes():
  pixels = np.zeros((30, 90, 3), np.uint8)
  pixels[:, :45] = RED
  pixels[15:, 45:] = BLUE
  made = canvas.make_canvas(Image.fromarray(pixels), 10)
  assert made.shape == (10, 10, 3) and made.dtype == np.uint8
  np.testing.assert_array_equal(made[:, :4], np.full((10, 4, 3), RED))
  np.testing.assert_array_equal(made[:4, 6:], np.zeros((4, 4, 3)))
  np.testing.assert_array_equal(made[6:, 6:], np.full((4, 4, 3), BLUE))
  made[:] = 0  # The caller owns it.


def test_canvas_is_antialiased():
  # Stripes of one pixel: without antialiasing they turn into coarse ones.
  stripes = np.zeros((100, 100, 3), np.uint8)
  stripes[:, ::2] = 255
  made = canvas.make_canvas(Image.fromarray(stripes), 30).astype(int)
  assert abs(made - 127.5).max() < 20


def test_canvas_of_photograph_is_close_to_block_means():
  image = photograph(640)
  image = image.crop((0, 0, 640, image.height // 64 * 64))
  made = canvas.make_canvas(image, 64).astype(float)
  reference = box_reference(np.asarray(image), 64)
  # Bicubic is sharper than means, but neither shifted nor brighter.
  assert abs(made.mean() - reference.mean()) < 0.5
  error = abs(made - reference).mean()
  assert error < 6
  assert error < 0.7 * abs(np.roll(made, 1, axis=1) - reference).mean()


def test_canvas_converts_other_modes():
  made = canvas.make_canvas(palette_image(1), 3)
  np.testing.assert_array_equal(made[1, 1], WHITE)


def test_canvases():
  shapes = [(30, 20), (8, 8), (5, 50), (17, 3), (9, 9)]
  files = flat_files(shapes)
  files[1] = files[3] = None
  made = canvas.make_canvases(make_source(files), canvas_px=6)
  kept = [0, 2, 4]
  assert made.name == 'birds/train'
  assert made.images.shape == (3, 6, 6, 3) and made.images.dtype == np.uint8
  for row, index in enumerate(kept):
    colour = [10 * index, 0, 255 - 10 * index]
    np.testing.assert_array_equal(
      made.images[row], np.full((6, 6, 3), colour, np.uint8)
    )
  np.testing.assert_array_equal(made.sizes, [shapes[i] for i in kept])
  assert made.sizes.dtype == np.int32
  np.testing.assert_array_equal(made.labels, [0, 0, 0])
  assert made.labels.dtype == np.int32
  assert made.file_names == ('0.png', '2.png', '4.png')
  assert made.class_names == ('a', 'b')
  assert made.part_ids is None and made.boxes is None
  assert made.skipped == (
    canvas.Skipped('1.png', 'cannot be read'),
    canvas.Skipped('3.png', 'cannot be read'),
  )
  assert canvas.skip_report(made) == (
    'birds/train: 5 images, 3 used, 2 skipped\n'
    '  1.png: cannot be read\n'
    '  3.png: cannot be read\n'
  )


def test_canvases_keep_the_kinds():
  images = [grey_image([[1, 2]]), Image.fromarray(CORNERS), palette_image(1)]
  files = [encode(image).read() for image in images]
  files.insert(1, None)
  made = canvas.make_canvases(make_source(files), canvas_px=4)
  assert made.kinds.shape == (3,) and made.kinds.dtype == np.uint16
  found = {k: kinds.rows_of_kind(made.kinds, k).tolist() for k in kinds.KINDS}
  assert {kind: rows for kind, rows in found.items() if rows} == {
    'grayscale': [0],
    'palette': [2],
    'alpha channel': [2],
  }


def test_names_are_printable():
  assert canvas.printable('a b/ö.jpg') == 'a b/ö.jpg'
  assert canvas.printable('a\nb') == r"'a\nb'"
  assert canvas.printable('\udcff') == r"'\udcff'"


def test_canvases_keep_the_size_before_scaled_decoding():
  file = encode(Image.new('RGB', (900, 600)), 'JPEG').read()
  source = make_source([file])._replace(
    load=lambda i: source_lib.Example(
      image_files.open_rgb(io.BytesIO(file), min_px=20)
    )
  )
  made = canvas.make_canvases(source, canvas_px=20)
  np.testing.assert_array_equal(made.sizes, [[600, 900]])


@pytest.mark.parametrize('seed', range(5))
def test_counts_and_threads(seed):
  rng = np.random.default_rng(seed)
  count = 25
  files = flat_files(rng.integers(1, 40, (count, 2)).tolist())
  masks = [
    np.full(Image.open(io.BytesIO(file)).size[::-1], i, np.uint8)
    for i, file in enumerate(files)
  ]
  boxes = [np.full(4, i / count) for i in range(count)]
  bad = rng.random(count) < rng.random()
  bad[rng.integers(count)] = False
  files = [None if b else file for file, b in zip(files, bad)]
  source = make_source(files, masks, boxes)
  one, many = (
    canvas.make_canvases(source, canvas_px=5, num_threads=n) for n in (1, 7)
  )
  for made in one, many:
    assert len(made.file_names) + len(made.skipped) == count
    skipped = {skip.file_name for skip in made.skipped}
    assert skipped.isdisjoint(made.file_names)
    assert skipped.union(made.file_names) == set(source.file_names)
    good = np.flatnonzero(~bad)
    np.testing.assert_array_equal(made.images[:, 0, 0, 0], 10 * good)
    np.testing.assert_array_equal(made.part_ids[:, 2, 3], good)
    np.testing.assert_array_equal(
      made.boxes, np.repeat(good[:, None] / count, 4, 1).astype(np.float32)
    )
  for a, b in zip(one, many):
    np.testing.assert_array_equal(a, b)


def test_masks_are_nearest_neighbour():
  mask = np.array([[0, 7, 255], [3, 0, 9]], np.uint8)
  files = [encode(Image.new('RGB', (3, 2))).read()]
  made = canvas.make_canvases(make_source(files, [mask]), canvas_px=12)
  expected = np.repeat(np.repeat(mask, 6, axis=0), 4, axis=1)
  np.testing.assert_array_equal(made.part_ids, expected[None])
  assert made.part_ids.dtype == np.uint8


def test_mask_of_another_size_is_skipped():
  files = flat_files([(4, 4), (4, 4)])
  masks = [np.zeros((4, 4), np.uint8), np.zeros((4, 5), np.uint8)]
  made = canvas.make_canvases(make_source(files, masks), canvas_px=4)
  assert made.file_names == ('0.png',)
  assert '4 x 5' in made.skipped[0].reason


@pytest.mark.parametrize('first', [True, False])
def test_mixed_annotations_are_refused(first):
  files = flat_files([(4, 4)] * 3)
  mask, box = np.zeros((4, 4), np.uint8), np.zeros(4)
  order = slice(None) if first else slice(None, None, -1)
  with pytest.raises(errors.UserError, match='birds/train.*masks'):
    source = make_source(files, [mask, mask, None][order])
    canvas.make_canvases(source, canvas_px=4)
  with pytest.raises(errors.UserError, match='birds/train.*boxes'):
    source = make_source(files, boxes=[box, box, None][order])
    canvas.make_canvases(source, canvas_px=4)


def test_nothing_left_is_an_error():
  with pytest.raises(errors.UserError) as caught:
    canvas.make_canvases(make_source([None, None]), canvas_px=4)
  message = str(caught.value)
  assert 'birds/train' in message and 'none of the 2' in message
  assert '0.png: cannot be read' in message and '\n' not in message


def test_empty_source_gives_empty_canvases():
  made = canvas.make_canvases(make_source([]), canvas_px=4)
  assert made.images.shape == (0, 4, 4, 3)
  assert made.sizes.shape == (0, 2) and made.labels.shape == (0,)
  assert made.file_names == () and made.skipped == ()
  assert canvas.skip_report(made).startswith('birds/train: 0 images')


def test_programming_errors_are_not_skipped():
  source = make_source(flat_files([(4, 4)]))._replace(load={}.__getitem__)
  with pytest.raises(KeyError):
    canvas.make_canvases(source, canvas_px=4)


@pytest.mark.parametrize(
  'canvas_px, words', [(0, 'canvas_px'), (10**8, 'memory')]
)
def test_impossible_canvas(canvas_px, words):
  source = make_source(flat_files([(4, 4)]))
  with pytest.raises(errors.UserError, match=words):
    canvas.make_canvases(source, canvas_px=canvas_px)


@pytest.mark.parametrize('progress', [None, True, False])
def test_progress_bar(progress, capsys):
  files = flat_files([(4, 4)] * 3)
  source = make_source(files)
  slept = threading.Event()

  def load(index):
    if index == 1:
      slept.wait(1.2)
    return source.load(index)

  canvas.make_canvases(
    source._replace(load=load), canvas_px=4, num_threads=1, progress=progress
  )
  output = capsys.readouterr()
  assert output.out == ''
  # Under pytest stderr is no terminal.
  assert ('birds/train' in output.err) == (progress is True)


@pytest.mark.parametrize('file_format', ['PNG', 'TIFF'])
@pytest.mark.parametrize('white', [255, 4095, 16383, 65535])
def test_grey_files_of_fewer_bits_are_scaled_by_their_white(file_format, white):
  values = np.array([[0, white // 2, white]], np.uint16)
  file = encode(Image.fromarray(values), file_format)
  image = image_files.open_rgb(file, grey16_white=white)
  expected = np.rint(values / white * 255).astype(np.uint8)
  np.testing.assert_array_equal(
    np.asarray(image), np.repeat(expected[..., None], 3, 2)
  )
  # The range noted is that of the file.
  assert kinds.noted_range(image) == (0, white, white)
  if white > 255:
    with pytest.raises(ValueError, match=f'range from 0 to {white - 1}'):
      file.seek(0)
      image_files.open_rgb(file, grey16_white=white - 1)


def test_other_files_are_not_scaled_by_the_white_of_16_bits():
  image = Image.fromarray(CORNERS)
  for mode in ('RGB', 'L', 'P'):
    file = encode(image.convert(mode))
    got = np.asarray(image_files.open_rgb(file, grey16_white=4095))
    file.seek(0)
    np.testing.assert_array_equal(got, np.asarray(image_files.open_rgb(file)))
