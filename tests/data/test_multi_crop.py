import colorsys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats

from cmd_jax.data.augment import geometry, multi_crop
from cmd_jax.errors import UserError

MEAN, STD = (
  np.array(multi_crop.IMAGENET_MEAN),
  np.array(multi_crop.IMAGENET_STD),
)
PLAIN = dict(
  flip_prob=0.0,
  jitter_prob=0.0,
  gray_prob=0.0,
  blur_probs=(0.0, 0.0, 0.0),
  solarize_prob=0.0,
)
WHOLE = dict(global_scale=(1.0, 1.0), ratio=(1.0, 1.0))
STEP_KEY = jax.random.key(7)


def _jit(function):
  # These tests spend their time compiling, not running.
  return jax.jit(
    function, compiler_options={'xla_backend_optimization_level': 0}
  )


# Compiled once for all tests that use them with four canvases.
_crop_part_ids = jax.jit(geometry.crop_part_ids, static_argnames=('out_px',))
published_augment = multi_crop.make_augment(
  global_px=24, local_px=12, num_local=2
)
published = _jit(published_augment)
only_crops = _jit(
  multi_crop.make_augment(
    global_px=48, local_px=24, num_local=2, **{**PLAIN, 'flip_prob': 0.5}
  )
)


def _keys(count, seed=0):
  return jax.random.split(jax.random.key(seed), count)


def _levels(views):
  return 255 * (np.asarray(views) * STD + MEAN)


def _views_of(canvas, count, **kwargs):
  """Views of one square canvas under `count` keys, in 0..1."""
  canvases = jnp.tile(jnp.asarray(canvas, jnp.uint8), (count, 1, 1, 1))
  sizes = jnp.full((count, 2), 400)
  px = canvas.shape[0]
  make = multi_crop.make_augment(
    **{**PLAIN, **WHOLE, 'num_local': 0, 'global_px': px, **kwargs}
  )
  views = _jit(make)(canvases, sizes, _keys(count), STEP_KEY)
  return views, _levels(views.global_views) / 255


def _pillow_resize(image, px, crop):
  """Crop and bicubic resize, the horizontal pass first in every Pillow."""
  cropped = image.crop(crop)
  narrow = cropped.resize((px, cropped.height), Image.Resampling.BICUBIC)
  return np.asarray(narrow.resize((px, px), Image.Resampling.BICUBIC), float)


def _flat(color, px=2):
  return np.tile(np.array(color, np.uint8), (px, px, 1))


def _assert_frequency(happened, probability):
  count = happened.size
  sigma = np.sqrt(probability * (1 - probability) / count)
  assert abs(happened.mean() - probability) < 4 * sigma + 1e-9


def test_shapes_and_ranges_of_the_published_recipe(canvases):
  sizes = jnp.array([[256, 341], [341, 256], [256, 256], [40, 300]])
  views = published(canvases, sizes, _keys(4), STEP_KEY)
  assert views.global_views.shape == (4, 2, 24, 24, 3)
  assert views.local_views.shape == (4, 2, 12, 12, 3)
  assert views.global_boxes.shape == views.local_boxes.shape == (4, 2, 4)
  assert views.global_flips.shape == views.local_flips.shape == (4, 2)
  assert views.global_flips.dtype == views.local_flips.dtype == jnp.bool_
  for images in (views.global_views, views.local_views):
    assert images.dtype == jnp.float32
    levels = _levels(images)
    assert levels.min() > -1e-3 and levels.max() < 255 + 1e-3
  pixels = views.global_boxes * jnp.tile(sizes, 2)[:, None]
  np.testing.assert_allclose(pixels, np.round(pixels), atol=1e-3)
  sides = views.local_boxes[:3, :, 2:] - views.local_boxes[:3, :, :2]
  area = np.prod(sides, -1)
  assert np.all((area > 0.045) & (area < 0.41))


def _made(views):
  """What there is of views without parts and labels."""
  return [x for x in views if x is not None]


def test_views_depend_on_the_example_alone(canvases):
  sizes = np.array([[250 + 20 * i, 400 - 10 * i] for i in range(4)])
  keys = _keys(4)
  whole = published(canvases, sizes, keys, STEP_KEY)
  for chosen in (np.array([2, 0, 3, 1]), np.array([3, 1])):
    part = published(canvases[chosen], sizes[chosen], keys[chosen], STEP_KEY)
    for ours, expected in zip(_made(part), _made(whole), strict=True):
      np.testing.assert_allclose(ours, expected[chosen], atol=1e-5)
  same = np.tile(canvases[:1], (4, 1, 1, 1))
  views = published(same, np.full((4, 2), 96), keys, STEP_KEY)
  views = np.asarray(views.global_views).reshape(8, -1)
  distance = np.abs(views[:, None] - views[None]).mean(-1)
  assert distance[~np.eye(8, dtype=bool)].min() > 0.05


def test_half_of_the_views_are_of_a_partner(canvases):
  make = multi_crop.make_augment(
    **{**PLAIN, 'global_px': 24, 'local_px': 12, 'num_local': 3}
  )
  black = np.zeros_like(canvases), np.full((4, 2), 96)
  sizes = np.full((4, 2), 256)
  views = _jit(make)(canvases, sizes, _keys(4), STEP_KEY, None, black)
  swapped = _jit(make)(*black, _keys(4), STEP_KEY, None, (canvases, sizes))
  for ours, theirs, own in (
    (views.global_views, swapped.global_views, 1),
    (views.local_views, swapped.local_views, 2),
  ):
    assert ours.shape[1] == own + 1
    levels, other = _levels(ours), _levels(theirs)
    assert levels[:, :own].std(axis=(2, 3)).min() > 5
    np.testing.assert_allclose(levels[:, own:], 0, atol=1e-3)
    np.testing.assert_allclose(other[:, :own], 0, atol=1e-3)
    assert other[:, own:].std(axis=(2, 3)).min() > 5


def test_no_two_views_of_an_image_and_itself_as_a_partner_are_equal(canvases):
  sizes = np.full((4, 2), 256)
  views = published(
    canvases, sizes, _keys(4), STEP_KEY, None, (canvases, sizes)
  )
  boxes = np.concatenate([views.global_boxes, views.local_boxes], 1)
  for of_image in boxes:
    assert len(np.unique(of_image, axis=0)) == 4


def test_one_by_one_is_as_all_at_once(canvases, monkeypatch):
  sizes = np.full((4, 2), 256)
  whole = published(canvases, sizes, _keys(4), STEP_KEY)
  # Read when the views are traced.
  monkeypatch.setattr(multi_crop, '_CACHE_BYTES', 1)
  make = multi_crop.make_augment(global_px=24, local_px=12, num_local=2)
  one_by_one = _jit(make)(canvases, sizes, _keys(4), STEP_KEY)
  for ours, expected in zip(_made(one_by_one), _made(whole), strict=True):
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_blocks_follow_the_platform_of_the_mesh(canvases, monkeypatch):
  device = types.SimpleNamespace(platform='tpu')
  mesh = types.SimpleNamespace(size=1, devices=np.array([device]))
  # A CPU's cache alone asks how many examples go together.
  monkeypatch.delattr(multi_crop.chunking, 'examples_in_a_block')
  arguments = canvases, jnp.full((4, 2), 99), _keys(4), STEP_KEY
  sizes = dict(global_px=16, local_px=8, num_local=0)
  views = jax.eval_shape(
    multi_crop.make_augment(mesh=mesh, **sizes), *arguments
  )
  assert views.global_views.shape == (4, 2, 16, 16, 3)
  with pytest.raises(AttributeError, match='examples_in_a_block'):
    jax.eval_shape(multi_crop.make_augment(**sizes), *arguments)


def test_pmap_equals_jit(canvases):
  devices = jax.local_devices()[:2]
  shards = len(devices)
  sizes = np.full((4, 2), 256)
  expected = published(canvases, sizes, _keys(4), STEP_KEY)

  def shard(x):
    return x.reshape(shards, 4 // shards, *x.shape[1:])

  views = jax.pmap(published_augment, in_axes=(0, 0, 0, None), devices=devices)(
    shard(canvases), shard(sizes), shard(_keys(4)), STEP_KEY
  )
  for ours, reference in zip(_made(views), _made(expected), strict=True):
    np.testing.assert_allclose(
      np.asarray(ours).reshape(reference.shape), reference, atol=1e-5
    )


def test_step_key_draws_the_order_of_the_jitter_and_nothing_else(canvases):
  sizes = jnp.full((4, 2), 256)
  outcomes = [
    published(canvases, sizes, _keys(4), key) for key in _keys(8, seed=3)
  ]
  for views in outcomes[1:]:
    for ours, first in zip(views[2:], outcomes[0][2:]):
      np.testing.assert_array_equal(ours, first)
    # The operations commute but for clipping and hue: the views stay close.
    change = np.abs(views.global_views - outcomes[0].global_views).mean()
    assert change < 0.3
  distinct = {np.asarray(views.global_views).tobytes() for views in outcomes}
  assert len(distinct) > 3


def test_without_local_views(canvases):
  make = multi_crop.make_augment(global_px=16, local_px=8, num_local=0)
  sizes = jnp.full((4, 2), 99)
  views = jax.eval_shape(make, canvases, sizes, _keys(4), STEP_KEY)
  assert views.global_views.shape == (4, 2, 16, 16, 3)
  assert views.local_views.shape == (4, 0, 8, 8, 3)
  assert views.local_boxes.shape == (4, 0, 4)
  assert views.local_flips.shape == (4, 0)


def test_a_plain_view_is_pillows_crop_of_the_reported_box(canvases):
  views = only_crops(canvases, jnp.full((4, 2), 96), _keys(4), STEP_KEY)
  assert 0 < views.global_flips.sum() + views.local_flips.sum() < 16
  for images, boxes, flips in zip(views[:2], views[2:4], views[4:]):
    px = images.shape[2]
    boxes = np.round(96 * np.asarray(boxes)).astype(int)
    for b, v in np.ndindex(images.shape[:2]):
      top, left, bottom, right = boxes[b, v]
      expected = _pillow_resize(
        Image.fromarray(canvases[b]), px, (left, top, right, bottom)
      )[:, :: -1 if flips[b, v] else 1]
      error = np.abs(_levels(images[b, v]) - expected)
      assert error.max() < 1.14  # see test_geometry


@pytest.mark.parametrize(
  'name, reach, canvas, observe',
  [
    (
      'brightness',
      0.4,
      _flat((120, 60, 90)),
      lambda x: x[..., 0, 0, 0] * 255 / 120,
    ),
    (
      'contrast',
      0.4,
      np.repeat(np.array([[[100], [150]]] * 2, np.uint8), 3, -1),
      lambda x: (x[..., 0, 1, 0] - x[..., 0, 0, 0]) * 255 / 50,
    ),
    (
      'saturation',
      0.2,
      _flat((150, 100, 100)),
      lambda x: (x[..., 0, 0, 0] - x[..., 0, 0, 1]) * 255 / 50,
    ),
    (
      'hue',
      0.1,
      _flat((60, 150, 60)),
      lambda x: (
        1
        - 1 / 3
        + np.apply_along_axis(
          lambda color: colorsys.rgb_to_hsv(*color)[0], -1, x[..., 0, 0, :]
        )
      ),
    ),
  ],
)
def test_jitter_factors_are_drawn_as_published(name, reach, canvas, observe):
  strengths = dict(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)
  _, views = _views_of(
    canvas, 2000, jitter_prob=0.8, **{**strengths, name: reach}
  )
  factors = observe(views)  # [2000, 2], 1 where nothing happened
  jittered = np.abs(factors - 1) > 2e-5
  _assert_frequency(jittered, 0.8)
  drawn = stats.kstest(
    factors[jittered], stats.uniform(1 - reach, 2 * reach).cdf
  )
  assert drawn.pvalue > 6e-5
  # The views of an example draw independently, as do neighbouring examples.
  a, b = jittered.T
  _assert_frequency(a & b, 0.64)
  _assert_frequency(a[1:] & a[:-1], 0.64)


def test_grayscale_is_drawn_as_published():
  _, views = _views_of(_flat((150, 100, 80)), 2000, gray_prob=0.2)
  gray = np.ptp(views[..., 0, 0, :], axis=-1) < 1e-5
  _assert_frequency(gray, 0.2)
  luma = (0.299 * 150 + 0.587 * 100 + 0.114 * 80) / 255
  np.testing.assert_allclose(views[gray].ravel(), luma, atol=1e-5)


def test_flip_blur_and_solarize_are_drawn_as_published():
  # Dark left and bright right half: a blur of up to a pixel shows at the edge
  # between them, a flip and a solarisation in the corners.
  canvas = np.full((8, 8, 3), 40, np.uint8)
  canvas[:, 4:] = 250
  # 14..28 pixels at 224 are 0.5..1 in a view of 8.
  make = multi_crop.make_augment(
    **{
      **PLAIN,
      'flip_prob': 0.5,
      'blur_probs': (1.0, 0.1, 0.5),
      'blur_sigma': (14.0, 28.0),
      'solarize_prob': 0.2,
      'global_scale': (1.0, 1.0),
      'local_scale': (1.0, 1.0),
      'ratio': (1.0, 1.0),
    },
    global_px=8,
    local_px=8,
    num_local=2,
  )
  count = 3000
  canvases = jnp.tile(jnp.asarray(canvas), (count, 1, 1, 1))
  views = _jit(make)(
    canvases, jnp.full((count, 2), 300), _keys(count), STEP_KEY
  )
  images = np.concatenate([views.global_views, views.local_views], 1)
  levels = _levels(images)[..., 4, :, 0]  # [count, 4, 8]
  flips = np.concatenate([views.global_flips, views.local_flips], 1)
  left, right = levels[..., 0], levels[..., 7]
  dark = np.where(flips, right, left)
  bright = np.where(flips, left, right)
  np.testing.assert_allclose(dark, 40, atol=0.5)
  inverted = bright < 128
  np.testing.assert_allclose(bright, np.where(inverted, 5, 250), atol=0.5)
  edge = np.where(flips, levels[..., 4], levels[..., 3])
  blurred = np.abs(edge - 40) > 1
  for view, prob in enumerate((1.0, 0.1, 0.5, 0.5)):
    _assert_frequency(blurred[:, view], prob)
    _assert_frequency(flips[:, view], 0.5)
    _assert_frequency(inverted[:, view], 0.2 if view == 1 else 0.0)
  _assert_frequency(flips[:, 0] & flips[:, 1], 0.25)
  # The weight of the far side one pixel from the edge, as SciPy has it, grows
  # with sigma: its range is that of sigma.
  step = canvas[0, :, 0].astype(float)
  soft = [
    ndimage.gaussian_filter1d(step, sigma, mode='nearest')[3]
    for sigma in (0.5, 1.0)
  ]
  sharpest, softest = edge[:, 0].min(), edge[:, 0].max()
  assert soft[0] - 0.1 < sharpest < soft[0] + 0.5
  assert soft[1] - 0.5 < softest < soft[1] + 0.1


def test_order_of_the_recipe_gray_blur_solarize_normalise(canvases):
  px = canvases.shape[1]
  sigma = 4.0
  make = multi_crop.make_augment(
    **{
      **PLAIN,
      **WHOLE,
      'gray_prob': 1.0,
      'blur_probs': (1.0, 1.0, 0.0),
      'blur_sigma': (sigma, sigma),
      'solarize_prob': 1.0,
    },
    global_px=px,
    local_px=8,
    num_local=0,
  )
  views = _jit(make)(canvases, jnp.full((4, 2), px), _keys(4), STEP_KEY)
  for b, canvas in enumerate(canvases):
    gray = canvas.astype(float) @ [0.299, 0.587, 0.114] / 255
    blurred = ndimage.gaussian_filter(gray, sigma * px / 224, mode='nearest')
    solarized = np.where(blurred >= 0.5, 1 - blurred, blurred)
    for v, expected in enumerate((blurred, solarized)):
      expected = (expected[..., None] - MEAN) / STD
      # A pixel at the threshold itself may fall to either side.
      sure = (np.abs(blurred - 0.5) > 1e-5) | (v == 0)
      np.testing.assert_allclose(
        views.global_views[b, v][sure], expected[sure], atol=1e-4
      )


@pytest.mark.parametrize('size', [(256, 256), (256, 400), (300, 200)])
def test_eval_view_is_pillows(photos, size):
  height, width = size
  canvas = Image.fromarray(photos[0]).resize((256, 256))
  view = _jit(multi_crop.make_eval_view(view_px=64))(
    jnp.asarray(canvas)[None], jnp.array([size])
  )[0]
  side = 0.875 * min(size) * 256
  box = (
    128 - side / width / 2,
    128 - side / height / 2,
    128 + side / width / 2,
    128 + side / height / 2,
  )
  left, top, right, bottom = box
  bicubic = Image.Resampling.BICUBIC
  narrow = canvas.resize((64, 256), bicubic, box=(left, 0, right, 256))
  expected = narrow.resize((64, 64), bicubic, box=(0, top, 64, bottom))
  error = np.abs(_levels(view) - np.asarray(expected, float))
  assert error.max() < 1.14  # see test_geometry


def test_eval_view_is_resize_256_and_centre_crop_224(photos):
  original = Image.fromarray(photos[0]).resize((400, 320))
  canvas = original.resize((320, 320), Image.Resampling.BICUBIC)
  view = _jit(multi_crop.make_eval_view())(
    jnp.asarray(canvas)[None], jnp.array([[320, 400]])
  )[0]
  resized = original.resize((320, 256), Image.Resampling.BICUBIC)

  def difference(left, top):
    expected = resized.crop((left, top, left + 224, top + 224))
    return np.abs(_levels(view) - np.asarray(expected, float)).mean()

  # What is left is the detail that the canvas has lost.
  aligned = difference(48, 16)
  assert aligned < 4
  for left, top in ((47, 16), (49, 16), (48, 15), (48, 17)):
    assert difference(left, top) > 1.5 * aligned


def test_eval_view_of_the_whole_image(canvases):
  sizes = jnp.array([[10, 20], [20, 10], [5, 5], [100, 1]])
  views = _jit(multi_crop.make_eval_view(view_px=32, crop_fraction=None))(
    canvases, sizes
  )
  for canvas, view in zip(canvases, views):
    expected = Image.fromarray(canvas).resize(
      (32, 32), Image.Resampling.BICUBIC
    )
    assert np.abs(_levels(view) - np.asarray(expected, float)).max() < 1.2


def test_part_ids_follow_the_views(canvases):
  # The canvas shows its own part ids, so a view shows those of its masks.
  rng = np.random.default_rng(0)
  ids = rng.integers(0, 2, (4, 3, 3)).repeat(32, 1).repeat(32, 2)
  shown = np.repeat(ids[..., None] * 255, 3, -1).astype(np.uint8)
  sizes = jnp.array([[96, 96], [60, 90], [90, 60], [200, 30]])
  views = only_crops(shown, sizes, _keys(4), STEP_KEY)
  for images, boxes, flips in zip(views[:2], views[2:4], views[4:]):
    masks = _crop_part_ids(ids.astype(np.uint8), boxes, flips, images.shape[2])
    levels = _levels(images)[..., 0] / 255
    clear = np.abs(levels - 0.5) > 0.45  # away from the borders of parts
    assert clear.mean() > 0.6
    np.testing.assert_array_equal((levels > 0.5)[clear], masks[clear] == 1)


@pytest.mark.parametrize(
  'kwargs, named',
  [
    (dict(global_px=0), 'global_px'),
    (dict(local_px=-1), 'local_px'),
    (dict(num_local=-1), 'num_local'),
    (dict(global_scale=(0.4, 1.2)), 'global_scale'),
    (dict(local_scale=(0.4, 0.05)), 'local_scale'),
    (dict(ratio=(2.0, 1.0)), 'ratio'),
    (dict(gray_prob=1.2), 'gray_prob'),
    (dict(solarize_prob=-0.1), 'solarize_prob'),
    (dict(blur_probs=(1.0, 0.1)), 'blur_probs'),
    (dict(blur_probs=(1.0, 0.1, 5)), 'blur_probs'),
    (dict(blur_sigma=(0.0, 1.0)), 'blur_sigma'),
    (dict(contrast=-1.0), 'contrast'),
    (dict(hue=0.7), 'hue'),
  ],
)
def test_values_out_of_range_are_named(kwargs, named):
  with pytest.raises(UserError, match=f'augment.{named}') as error:
    multi_crop.make_augment(**kwargs)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('kwargs', [dict(view_px=0), dict(crop_fraction=1.5)])
def test_eval_values_out_of_range_are_named(kwargs):
  with pytest.raises(UserError, match=f'config.eval.{next(iter(kwargs))}'):
    multi_crop.make_eval_view(**kwargs)
