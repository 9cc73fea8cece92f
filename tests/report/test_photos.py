import base64
import io
import types

import numpy as np
import pytest
from PIL import Image

from cmd_jax.report import photos


def _canvases(count, px=20, seed=0):
  images = np.random.default_rng(seed).integers(
    0, 256, (count, px, px, 3), np.uint8
  )
  return types.SimpleNamespace(
    images=images,
    sizes=np.tile(np.int32([[30, 60]]), (count, 1)),
    file_names=tuple(f'{i}.png' for i in range(count)),
  )


def _open(data):
  return Image.open(io.BytesIO(data))


def test_all_photographs_are_shown_or_a_repeatable_sample():
  pretrain, test = _canvases(30), _canvases(10)
  everything = photos.sample(pretrain, test, 40)
  assert [split.name for split in everything] == ['training', 'test']
  assert [split.rows.tolist() for split in everything] == [
    list(range(30)),
    list(range(10)),
  ]
  some = photos.sample(pretrain, test, 12)
  assert sum(len(split.rows) for split in some) == 12
  for split, again in zip(some, photos.sample(pretrain, test, 12)):
    assert split.rows.tolist() == again.rows.tolist()
    assert split.rows.tolist() == sorted(set(split.rows.tolist()))
    assert split.rows.max() < len(split.canvases.file_names)
  assert [split.name for split in photos.sample(pretrain, None, 5)] == [
    'training'
  ]


@pytest.mark.parametrize(
  'size, shown',
  [
    ((300, 600), (160, 80)),
    ((600, 300), (80, 160)),
    ((10, 30_000), (160, 40)),
    ((1, 1), (160, 160)),
  ],
)
def test_thumbnails_have_the_shape_of_the_original(size, shown):
  canvas = np.zeros((256, 256, 3), np.uint8)
  image = _open(photos.make_thumbnail(canvas, size))
  assert image.format == 'WEBP'
  assert image.size == photos.shown_size(*size) == shown


def test_thumbnails_are_not_larger_than_their_canvas():
  canvas = np.full((32, 32, 3), (200, 30, 30), np.uint8)
  image = _open(photos.make_thumbnail(canvas, (300, 600)))
  assert image.size == (32, 16)
  pixel = image.convert('RGB').getpixel((5, 5))
  assert np.abs(np.int32(pixel) - (200, 30, 30)).max() < 8


def test_attention_is_stretched_for_each_image():
  attention = np.array([[1.0, 3.0, 2.0, 1.0], [0.2, 0.2, 0.2, 0.2]])
  grids = photos.make_attention_grids(attention)
  assert grids.dtype == np.uint8
  assert grids[0].tolist() == [[0, 255], [128, 0]]
  assert (grids[1] == 255).all()
  assert photos.make_attention_grids(np.eye(60).reshape(1, -1)).shape == (
    1,
    28,
    28,
  )
  with pytest.raises(ValueError, match='5 patches'):
    photos.make_attention_grids(np.ones((1, 5)))


@pytest.mark.parametrize('background', [True, False])
def test_masks_show_the_photograph_where_the_background_is(background):
  mask = np.zeros((8, 8), np.uint8)
  mask[:, 4:] = 3
  image = _open(photos.make_mask(mask, background)).convert('RGBA')
  left, right = image.getpixel((1, 1)), image.getpixel((6, 1))
  assert left[3] == (0 if background else 255)
  assert right[3] == 255
  assert left[:3] != right[:3]


def test_every_photograph_is_drawn_in_batches_of_one_size():
  splits = photos.sample(_canvases(5), _canvases(3, seed=1), 100)
  shapes = []

  def attend(images, sizes):
    shapes.append((images.shape, sizes.shape))
    means = images.reshape(len(images), -1).mean(1)
    return np.stack([means, 0 * means, 0 * means, 0 * means], axis=1)

  drawn = photos.draw(splits, attend, batch_size=4)
  assert set(shapes) == {((4, 20, 20, 3), (4, 2))}
  assert drawn.attention.shape == (8, 2, 2)
  assert drawn.sizes.tolist() == [[30, 60]] * 8
  expected = [
    photos.make_thumbnail(image, (30, 60))
    for split in splits
    for image in split.canvases.images
  ]
  assert [base64.b64decode(x) for x in drawn.thumbnails] == expected
