import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from cmd_jax.data.augment import geometry

RATIO = (3 / 4, 4 / 3)

_sample_crop_boxes = jax.jit(
  geometry.sample_crop_boxes, static_argnames=('num_views', 'scale', 'ratio')
)
_crop_and_resize = jax.jit(
  geometry.crop_and_resize, static_argnames=('out_px', 'truncate')
)
_crop_part_ids = jax.jit(geometry.crop_part_ids, static_argnames=('out_px',))


def _planes(image):
  return jnp.moveaxis(jnp.asarray(image, jnp.float32) / 255, -1, 0)[None]


def _pillow_resize(image, out_px):
  """Both passes of Pillow's bicubic resize, always the horizontal one first."""
  narrow = image.resize((out_px, image.height), Image.Resampling.BICUBIC)
  return narrow.resize((out_px, out_px), Image.Resampling.BICUBIC)


def _sample(count, size, scale, seed=0, num_views=1):
  keys = jax.random.split(jax.random.key(seed), count)
  sizes = jnp.tile(jnp.array(size), (count, 1))
  boxes = _sample_crop_boxes(
    keys, sizes, num_views=num_views, scale=scale, ratio=RATIO
  )
  return np.asarray(boxes)


def _reference_box(rng, height, width, scale):
  """torchvision RandomResizedCrop.get_params, transcribed into NumPy."""
  for _ in range(10):
    area = height * width * rng.uniform(*scale)
    aspect = np.exp(rng.uniform(*np.log(RATIO)))
    w = round(np.sqrt(area * aspect))
    h = round(np.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      top = rng.integers(0, height - h + 1)
      left = rng.integers(0, width - w + 1)
      return top, left, top + h, left + w
  raise AssertionError('the test uses no size that needs the fallback')


@pytest.mark.parametrize('scale', [(0.4, 1.0), (0.05, 0.4)])
def test_boxes_have_the_distribution_of_torchvision(scale):
  height, width = 375, 500
  ours = _sample(4000, (height, width), scale)[:, 0].astype(float)
  rng = np.random.default_rng(1)
  theirs = np.array(
    [_reference_box(rng, height, width, scale) for _ in range(4000)], float
  )

  def describe(boxes):
    top, left, bottom, right = boxes.T
    h, w = bottom - top, right - left
    return {
      'area': h * w,
      'aspect': w / h,
      'top': top / np.maximum(height - h, 1),
      'left': left / np.maximum(width - w, 1),
    }

  reference = describe(theirs)
  for name, values in describe(ours).items():
    # A two-sided 4 sigma event has probability 6e-5.
    assert stats.ks_2samp(values, reference[name]).pvalue > 6e-5, name


def test_area_is_uniform_and_aspect_log_uniform_where_every_box_fits():
  boxes = _sample(4000, (2000, 2000), (0.05, 0.4))[:, 0]
  h, w = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
  area = stats.kstest(h * w / 4e6, stats.uniform(0.05, 0.35).cdf)
  low = np.log(RATIO[0])
  aspect = stats.kstest(np.log(w / h), stats.uniform(low, -2 * low).cdf)
  assert area.pvalue > 6e-5
  assert aspect.pvalue > 6e-5


def test_boxes_lie_inside_images_of_every_shape():
  rng = np.random.default_rng(0)
  sizes = np.concatenate(
    [rng.integers(1, 8, (300, 2)), rng.integers(1, 3000, (700, 2))]
  )
  keys = jax.random.split(jax.random.key(3), len(sizes))
  for scale in ((0.4, 1.0), (0.05, 0.4)):
    boxes = _sample_crop_boxes(
      keys, jnp.array(sizes), num_views=3, scale=scale, ratio=RATIO
    )
    assert boxes.dtype == jnp.int32
    top, left, bottom, right = np.moveaxis(np.asarray(boxes), -1, 0)
    assert np.all((top >= 0) & (top < bottom) & (bottom <= sizes[:, :1]))
    assert np.all((left >= 0) & (left < right) & (right <= sizes[:, 1:]))


@pytest.mark.parametrize(
  'size, expected',
  [
    ((30, 1000), (0, 480, 30, 520)),
    ((1000, 30), (480, 0, 520, 30)),
    ((31, 1000), (0, 479, 31, 520)),
  ],
)
def test_an_extreme_shape_falls_back_to_the_central_crop(size, expected):
  boxes = _sample(5, size, (0.4, 1.0), num_views=2)
  np.testing.assert_array_equal(boxes, np.broadcast_to(expected, (5, 2, 4)))


def test_a_shape_within_the_ratio_falls_back_to_the_whole_image():
  # Twice the area of the image never fits.
  boxes = _sample(5, (90, 100), (2.0, 2.0))
  np.testing.assert_array_equal(boxes[:, 0], [[0, 0, 90, 100]] * 5)


@pytest.mark.parametrize('out_px', [24, 96, 224])
def test_crop_and_resize_is_pillows(photos, out_px):
  boxes = [
    (0, 0, 256, 256),
    (13, 40, 200, 171),
    (101, 90, 160, 151),
    (250, 3, 256, 11),
    (31, 0, 255, 224),
  ]
  flips = [False, True, False, True, False]
  canvas = Image.fromarray(photos[0]).resize((256, 256))
  views = _crop_and_resize(
    _planes(canvas), jnp.array([boxes]) / 256, jnp.array([flips]), out_px
  )
  for view, (top, left, bottom, right), flip in zip(views[0], boxes, flips):
    expected = _pillow_resize(canvas.crop((left, top, right, bottom)), out_px)
    expected = np.asarray(expected, float)[:, :: -1 if flip else 1]
    error = np.abs(255 * np.moveaxis(np.asarray(view), 0, -1) - expected)
    # Pillow rounds to 8 bits after each of two passes; the second multiplies
    # the first's error by the sum of |weights|, at most 1.25 for this kernel.
    assert error.max() < 0.5 * 1.25 + 0.5 + 0.01
    assert error.mean() < 0.4


def test_result_is_clipped_as_pillows():
  # Bars two pixels wide: bicubic overshoots and undershoots in both passes.
  bars = (np.indices((64, 64)) // 2 % 2).astype(np.uint8) * 255
  image = np.stack([bars[0], bars[1], bars[0] ^ bars[1]], -1)
  box = jnp.array([[[0.0, 0.0, 1.0, 1.0]]])
  view = _crop_and_resize(_planes(image), box, jnp.zeros((1, 1), bool), 150)[
    0, 0
  ]
  expected = Image.fromarray(image).resize((150, 150), Image.Resampling.BICUBIC)
  assert view.min() == 0 and view.max() == 1
  error = 255 * np.moveaxis(np.asarray(view), 0, -1) - np.asarray(expected)
  assert np.abs(error).max() < 1.2


def test_a_box_of_the_canvas_is_that_region_of_the_original(photos):
  shifts = np.array(
    [[0, 0, 0, 0], [2, 0, 2, 0], [0, 2, 0, 2], [0, 0, 4, 0], [0, 0, 0, 4]]
  )
  for photo in photos:
    height, width = photo.shape[:2]
    original = Image.fromarray(photo)
    canvas = original.resize((256, 256), Image.Resampling.BICUBIC)
    box = np.array([height // 5, width // 3, height * 4 // 5, width * 5 // 6])
    crop = original.crop((box[1], box[0], box[3], box[2]))
    expected = np.asarray(_pillow_resize(crop, 96), float)
    boxes = geometry.as_fractions(
      jnp.array([box + shifts]), jnp.array([[height, width]])
    )
    views = _crop_and_resize(
      _planes(canvas), boxes, jnp.zeros((1, 5), bool), 96
    )
    views = 255 * np.moveaxis(np.asarray(views[0]), 1, -1)
    aligned, *shifted = np.abs(views - expected).mean((1, 2, 3))
    # The canvas has lost the finest detail of the longer side; a box that is
    # off by two pixels of the original is already further away.
    assert aligned < 4
    assert min(shifted) > 1.05 * aligned


def test_weights_sum_to_one_even_for_boxes_below_a_pixel():
  rng = np.random.default_rng(0)
  low = rng.uniform(0, 31.5, 500).astype(np.float32)
  high = low + rng.uniform(0.05, 32 - low).astype(np.float32)
  high[:250] = low[:250] + 0.3
  weights = geometry.resampling_matrix(
    low, high, jnp.zeros(500, bool), in_px=32, out_px=7, truncate=True
  )
  np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
  # An overshoot beyond this would mean a division by a vanishing sum.
  assert np.abs(weights).sum(-1).max() < 1.6


def test_central_square_of_the_original():
  box = geometry.central_square(jnp.array([[200, 400], [400, 100]]), 0.5)
  expected = [[50, 150, 150, 250], [175, 25, 225, 75]]
  expected = np.array(expected) / [[200, 400] * 2, [400, 100] * 2]
  np.testing.assert_allclose(box, expected, atol=1e-6)


@pytest.mark.parametrize('out_px', [14, 64])
def test_part_ids_are_pillows_nearest_neighbour(out_px):
  rng = np.random.default_rng(0)
  ids = rng.integers(0, 256, (2, 48, 48), dtype=np.uint8)
  pixels = np.array([[3, 8, 40, 31], [0, 0, 48, 48], [20, 5, 25, 48]])
  boxes = jnp.tile(jnp.array(pixels) / 48, (2, 1, 1))
  flips = jnp.array([[False, True, True], [True, False, False]])
  views = _crop_part_ids(ids, boxes, flips, out_px)
  assert views.dtype == jnp.uint8
  for b in range(2):
    for v, (top, left, bottom, right) in enumerate(pixels):
      expected = Image.fromarray(ids[b]).crop((left, top, right, bottom))
      expected = expected.resize((out_px, out_px), Image.Resampling.NEAREST)
      expected = np.asarray(expected)[:, :: -1 if flips[b, v] else 1]
      # A point on the border of two pixels may fall to either.
      assert np.mean(views[b, v] == expected) > 0.9


def test_part_ids_share_the_geometry_of_the_image():
  rows, columns = np.mgrid[:128, :128].astype(np.uint8)
  image = np.stack([rows, columns, columns], -1)
  keys = jax.random.split(jax.random.key(0), 20)
  sizes = jnp.tile(jnp.array([[300, 200]]), (20, 1))
  boxes = _sample_crop_boxes(
    keys, sizes, num_views=2, scale=(0.05, 1.0), ratio=RATIO
  )
  boxes = geometry.as_fractions(boxes, sizes)
  flips = jax.random.bernoulli(keys[0], 0.5, (20, 2))
  views = _crop_and_resize(
    jnp.tile(_planes(image), (20, 1, 1, 1)), boxes, flips, 16
  )
  for channel, encoded in enumerate((rows, columns)):
    ids = _crop_part_ids(jnp.tile(encoded, (20, 1, 1)), boxes, flips, 16)
    # Where the border cuts off the kernel the mean of a ramp is off its centre.
    interior = np.s_[:, :, 2:-2, 2:-2]
    error = 255 * views[:, :, channel][interior] - ids[interior].astype(float)
    # Nearest neighbour is off by at most half a pixel.
    assert np.abs(error).max() < 0.51
