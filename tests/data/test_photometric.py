import colorsys
import functools
import itertools

import jax
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage

from cmd_jax.data.augment import photometric

FACTORS = (0.0, 0.6, 0.8, 1.0, 1.17, 1.4)


def _planes(images):
  return np.moveaxis(np.float32(images) / np.float32(255), -1, -3)


_adjust_hue = jax.jit(photometric.adjust_hue)
_blur = jax.jit(
  functools.partial(photometric.gaussian_blur, max_sigma=2.0),
)


def _levels(views):
  return 255 * np.moveaxis(np.asarray(views), -3, -1)


@pytest.mark.parametrize(
  'adjust, enhancer',
  [
    (photometric.adjust_brightness, ImageEnhance.Brightness),
    (photometric.adjust_contrast, ImageEnhance.Contrast),
    (photometric.adjust_saturation, ImageEnhance.Color),
  ],
)
def test_blends_are_pillows(canvases, adjust, enhancer):
  adjust = jax.jit(adjust)
  for factor in FACTORS:
    factors = np.full(4, factor, np.float32)
    ours = _levels(adjust(_planes(canvases), factors))
    for canvas, view in zip(canvases, ours):
      pillow = enhancer(Image.fromarray(canvas)).enhance(factor)
      # Pillow rounds the luma (half a level, times at most 1) and truncates the
      # blend (up to one level).
      assert np.abs(view - np.asarray(pillow, float)).max() < 1.51


def test_neutral_parameters_change_nothing(canvases):
  views = _planes(canvases)
  one, zero = np.ones(4, np.float32), np.zeros(4, np.float32)
  for adjust, parameter in (
    (photometric.adjust_brightness, one),
    (photometric.adjust_contrast, one),
    (photometric.adjust_saturation, one),
    (_blur, zero),
    (photometric.solarize, zero > 0),
  ):
    np.testing.assert_array_equal(jax.jit(adjust)(views, parameter), views)
  np.testing.assert_allclose(_adjust_hue(views, zero), views, atol=1e-6)


def test_gray_is_pillows_mode_l(canvases):
  gray = _levels(jax.jit(photometric.to_gray)(_planes(canvases)))[..., 0]
  for canvas, ours in zip(canvases, gray):
    pillow = np.asarray(Image.fromarray(canvas).convert('L'), float)
    assert np.abs(ours - pillow).max() < 0.51  # rounding


@pytest.mark.parametrize('shift', [-0.5, -0.1, 0.0, 0.03, 0.1, 0.37])
def test_hue_turns_as_colorsys(canvases, shift):
  rng = np.random.default_rng(0)
  pixels = rng.permutation(canvases.reshape(-1, 3))[:400]
  corners = list(itertools.product((0, 100, 255), repeat=3))
  pixels = np.concatenate([pixels, corners]).astype(np.uint8)
  ours = _adjust_hue(_planes(pixels[None, None]), np.float32([shift]))
  expected = []
  for pixel in pixels / 255.0:
    hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
    turned = (hue + shift) % 1  # colorsys takes no negative hue
    expected.append(colorsys.hsv_to_rgb(turned, saturation, value))
  np.testing.assert_allclose(
    np.moveaxis(ours, 1, -1)[0, 0], expected, atol=5e-6
  )


@pytest.mark.parametrize('sigma', [0.0, 0.1, 0.4, 1.0, 2.0])
def test_blur_is_scipys(canvases, sigma):
  ours = np.asarray(_blur(_planes(canvases), np.full(4, sigma, np.float32)))
  for canvas, view in zip(canvases, ours):
    expected = ndimage.gaussian_filter(
      canvas / 255.0, (sigma, sigma, 0), mode='nearest', truncate=4.0
    )
    np.testing.assert_allclose(np.moveaxis(view, 0, -1), expected, atol=2e-6)


def test_every_view_has_its_own_blur_even_wider_than_itself():
  views = np.random.default_rng(0).random((2, 3, 3, 5, 5), np.float32)
  sigma = np.float32([[0.0, 0.3, 1.1], [2.0, 0.7, 1.9]])
  ours = np.asarray(_blur(views, sigma))
  for index in np.ndindex(2, 3):
    expected = ndimage.gaussian_filter(
      np.asarray(views[index], float),
      (0, sigma[index], sigma[index]),
      mode='nearest',
    )
    np.testing.assert_allclose(ours[index], expected, atol=2e-6)


def test_solarize_is_pillows(canvases):
  apply = np.array([True, False, True, True])
  ours = _levels(jax.jit(photometric.solarize)(_planes(canvases), apply))
  for canvas, view, applied in zip(canvases, ours, apply):
    expected = ImageOps.solarize(Image.fromarray(canvas)) if applied else canvas
    np.testing.assert_allclose(view, np.asarray(expected, float), atol=1e-4)


def test_jitter_applies_the_operations_in_the_given_order():
  # Colours all over the cube: where operations clip, their order matters.
  image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  factors = photometric.JitterFactors(
    brightness=np.float32([1.4]),
    contrast=np.float32([0.5]),
    saturation=np.float32([1.4]),
    hue=np.float32([0.0]),
  )
  jitter = jax.jit(photometric.color_jitter)

  def pillow(order):
    enhanced = Image.fromarray(image)
    for operation in order:
      if operation < 3:
        enhancer = (
          ImageEnhance.Brightness,
          ImageEnhance.Contrast,
          ImageEnhance.Color,
        )[operation]
        enhanced = enhancer(enhanced).enhance(float(factors[operation][0]))
    return np.asarray(enhanced, float)

  natural = pillow(range(4))
  for order in [(0, 1, 2, 3), (1, 0, 3, 2), (3, 2, 1, 0), (3, 1, 2, 0)]:
    ours = _levels(jitter(_planes(image[None]), factors, np.array(order)))[0]
    # Each of Pillow's three blends loses up to 1.5 levels, and a later one
    # multiplies that by up to 1.4 (contrast shrinks it again).
    error = np.abs(ours - pillow(order))
    assert error.max() < 1.5 * (1.4 * 1.4 + 1.4 + 1)
    if order[:3] != (0, 1, 2):
      assert error.mean() < 0.5 * np.abs(ours - natural).mean()


def test_jitter_turns_the_hue_in_its_place():
  views = np.float32([0.9, 0.4, 0.3]).reshape(1, 3, 1, 1)
  factors = photometric.JitterFactors(
    brightness=np.float32([1.4]),
    contrast=np.float32([1.0]),
    saturation=np.float32([1.0]),
    hue=np.float32([0.1]),
  )

  def turned(color):
    hue, saturation, value = colorsys.rgb_to_hsv(*color)
    return np.array(colorsys.hsv_to_rgb(hue + 0.1, saturation, value))

  brighter = np.minimum(np.array([0.9, 0.4, 0.3]) * 1.4, 1)
  jitter = jax.jit(photometric.color_jitter)
  before, after = (
    np.ravel(jitter(views, factors, np.array(order)))
    for order in ([3, 0, 1, 2], [0, 1, 2, 3])
  )
  np.testing.assert_allclose(after, turned(brighter), atol=1e-5)
  np.testing.assert_allclose(
    before,
    np.minimum(turned([0.9, 0.4, 0.3]) * 1.4, 1),
    atol=1e-5,
  )
