"""Images of other than three channels: read, squashed, measured, augmented."""

import io

import jax
import numpy as np
import pytest
from PIL import Image

from cmd_jax.data import canvas, channels, image_files
from cmd_jax.data.augment import multi_crop
from cmd_jax.data.pipeline.lazy import lazy_canvases
from cmd_jax.data.sources import folder


def _stack(planes, **options):
  """A TIFF file whose pages are the channels."""
  pages = [Image.fromarray(plane) for plane in planes]
  file = io.BytesIO()
  pages[0].save(file, 'TIFF', save_all=True, append_images=pages[1:], **options)
  file.seek(0)
  return file


def _planes(count, shape=(6, 9), top=65536, dtype=np.uint16):
  rng = np.random.default_rng(count)
  return rng.integers(0, top, (count, *shape)).astype(dtype)


@pytest.mark.parametrize('count', [1, 2, 5])
def test_pages_of_16_bits_are_kept_exactly(count):
  planes = _planes(count)
  got = image_files.open_image(_stack(planes), channels=count)
  assert got.dtype == np.uint16
  np.testing.assert_array_equal(got, np.moveaxis(planes, 0, -1))


@pytest.mark.parametrize(
  'mode, count', [('L', 1), ('LA', 2), ('RGBA', 4), ('CMYK', 4), ('1', 1)]
)
def test_8_bits_are_scaled_to_the_same_white(mode, count):
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (6, 9, 4), dtype=np.uint8)
  image = Image.fromarray(pixels).convert(mode)
  file = io.BytesIO()
  image.save(file, 'TIFF')
  got = image_files.open_image(file, channels=count)
  want = np.asarray(image.convert('L') if mode == '1' else image)
  want = np.uint16(257) * want
  np.testing.assert_array_equal(got.reshape(want.shape), want)


def test_12_bits_have_their_own_white():
  planes = _planes(2, top=4096)
  got = image_files.open_image(_stack(planes), channels=2, grey16_white=4095)
  want = np.rint(np.moveaxis(planes, 0, -1) * (65535 / 4095))
  np.testing.assert_array_equal(got, want)
  with pytest.raises(ValueError, match='outside the range from 0 to 1000'):
    image_files.open_image(_stack(planes), channels=2, grey16_white=1000)


def test_turned_images_are_upright():
  exif = Image.Exif()
  exif[0x0112] = 6
  pixels = _planes(1, dtype=np.uint8, top=256)[0]
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, 'PNG', exif=exif)
  got = image_files.open_image(file, channels=1)
  np.testing.assert_array_equal(
    got[..., 0], np.uint16(257) * np.rot90(pixels, -1)
  )


@pytest.mark.parametrize(
  'count, words', [(1, '1 channel,'), (5, '5 channels,')]
)
def test_another_number_of_channels_is_told(count, words):
  with pytest.raises(ValueError, match=f'has {words} and config.model') as told:
    image_files.open_image(_stack(_planes(count)), channels=4)
  assert '\n' not in str(told.value)


def test_pages_of_other_sizes_and_damage_are_told():
  file = _stack([np.zeros((4, 4), np.uint16), np.zeros((5, 4), np.uint16)])
  with pytest.raises(ValueError, match='pages have different sizes'):
    image_files.open_image(file, channels=2)
  content = _stack(_planes(3)).getvalue()
  with pytest.raises(OSError):
    image_files.open_image(io.BytesIO(content[: len(content) // 2]), channels=3)
    image_files.open_image(io.BytesIO(content[: len(content) // 2]), channels=4)


def test_three_channels_are_photographs_as_ever():
  file = io.BytesIO()
  Image.fromarray(np.full((4, 5), 9, np.uint8)).save(file, 'PNG')
  got = image_files.open_image(file, channels=3)
  assert isinstance(got, Image.Image) and got.mode == 'RGB'
  assert channels.measure(np.zeros((2, 4, 4, 3), np.uint8)) == channels.IMAGENET


def _folder(path, count, num=5):
  for number in range(num):
    planes = _planes(count, (8 + number, 12)) // (number + 1)
    (path / f'{number}.tif').write_bytes(_stack(planes).getvalue())
  Image.new('RGB', (3, 3)).save(path / 'x.png')
  return folder.folder_source(str(path), 'pretrain', channels=count)


@pytest.mark.parametrize('count', [1, 4, 5])
def test_canvases_in_memory_and_lazy_ones_agree(tmp_path, count):
  source = _folder(tmp_path, count)
  made = canvas.make_canvases(source, canvas_px=8)
  assert made.images.shape == (5, 8, 8, count)
  assert made.images.dtype == np.uint16
  assert made.sizes.tolist() == [[8 + i, 12] for i in range(5)]
  (skipped,) = made.skipped
  assert skipped.file_name == 'x.png' and '3 channels' in skipped.reason
  lazy = lazy_canvases(source, canvas_px=8)
  assert lazy.images.dtype == np.uint16
  np.testing.assert_array_equal(np.asarray(lazy.images)[:5], made.images)
  # The first fills its canvas: nothing is resampled but in width.
  assert (
    abs(int(made.images[0].mean()) - int(_planes(count, (8, 12)).mean())) < 600
  )


def test_statistics_are_those_of_the_pixels():
  images = _planes(4, (6, 6, 2))
  found = channels.measure(images)
  np.testing.assert_allclose(found.mean, images.mean((0, 1, 2)) / 65535)
  np.testing.assert_allclose(found.std, images.std((0, 1, 2)) / 65535)
  flat = channels.measure(np.full((3, 4, 4, 1), 65535, np.uint16))
  assert flat.mean == (1.0,) and flat.std == (1e-3,)


@pytest.mark.parametrize('count', [1, 5])
def test_views_are_normalised_by_them(count):
  images = _planes(8, (16, 16, count))
  statistics = channels.measure(images)
  view = jax.jit(
    multi_crop.make_eval_view(
      view_px=16, crop_fraction=None, **statistics._asdict()
    )
  )
  views = view(images, np.full((8, 2), 16))
  want = (images / 65535 - statistics.mean) / statistics.std
  np.testing.assert_allclose(views, want, atol=1e-3)
  augment = multi_crop.make_augment(
    global_px=16, local_px=8, num_local=1, **statistics._asdict()
  )
  keys = jax.random.split(jax.random.key(0), 8)
  made = jax.jit(augment)(images, np.full((8, 2), 16), keys, keys[0])
  assert made.global_views.shape == (8, 2, 16, 16, count)
  assert made.local_views.shape == (8, 1, 8, 8, count)
  assert np.isfinite(made.global_views).all()


def test_what_is_shown_of_them():
  images = _planes(2, (4, 4, 5))
  shown = channels.as_pictures(images)
  assert shown.dtype == np.uint8 and shown.shape == (2, 4, 4, 3)
  np.testing.assert_allclose(shown, images[..., :3] / 257, atol=0.5)
  grey = channels.as_pictures(images[..., :2])
  np.testing.assert_array_equal(grey[..., 0], grey[..., 2])
  photographs = np.zeros((1, 2, 2, 3), np.uint8)
  assert channels.as_pictures(photographs) is photographs
