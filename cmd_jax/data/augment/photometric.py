"""What happens to the colours and the sharpness of a view.

Every function takes views [..., 3, H, W], channels first, in 0..1, and one
parameter per view [...]; a parameter's neutral value leaves the view as it is,
which is how an operation drawn with a probability is left out.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

_LUMA = (0.299, 0.587, 0.114)
_TRUNCATE = 4.0


class JitterFactors(NamedTuple):
  """Factors of the colour jitter, [...] float32 each.

  Attributes:
    brightness: neutral at 1, black at 0.
    contrast: neutral at 1, plain grey at 0.
    saturation: neutral at 1, grayscale at 0.
    hue: shift in turns of the colour wheel, neutral at 0.
  """

  brightness: jax.Array
  contrast: jax.Array
  saturation: jax.Array
  hue: jax.Array


def _per_view(parameter: jax.Array) -> jax.Array:
  return parameter[..., None, None, None]


def has_colours(views: jax.Array) -> bool:
  """Whether views [..., C, H, W] are red, green and blue."""
  return views.shape[-3] == 3


def to_gray(views: jax.Array) -> jax.Array:
  """Luma of ITU-R 601, as Pillow's mode L; [..., 3, H, W] -> [..., 1, H, W]."""
  red, green, blue = _LUMA
  gray = (
    red * views[..., 0, :, :]
    + green * views[..., 1, :, :]
    + blue * views[..., 2, :, :]
  )
  return gray[..., None, :, :]


def _blend(views: jax.Array, other: jax.Array, factor: jax.Array) -> jax.Array:
  factor = _per_view(factor)
  return jnp.clip(factor * views + (1.0 - factor) * other, 0.0, 1.0)


def adjust_brightness(views: jax.Array, factor: jax.Array) -> jax.Array:
  """Blends with black (torchvision `adjust_brightness`).

  Args:
    views: [..., 3, H, W] in 0..1.
    factor: [...] weight of the view.

  Returns:
    [..., 3, H, W] in 0..1.
  """
  return jnp.clip(_per_view(factor) * views, 0.0, 1.0)


def adjust_contrast(views: jax.Array, factor: jax.Array) -> jax.Array:
  """Blends with the mean luma of the view (torchvision `adjust_contrast`).

  Args:
    views: [..., 3, H, W] in 0..1.
    factor: [...] weight of the view.

  Returns:
    [..., 3, H, W] in 0..1.
  """
  gray = to_gray(views) if has_colours(views) else views
  mean = jnp.mean(gray, axis=(-3, -2, -1), keepdims=True)
  return _blend(views, mean, factor)


def adjust_saturation(views: jax.Array, factor: jax.Array) -> jax.Array:
  """Blends with the luma of each pixel (torchvision `adjust_saturation`).

  Args:
    views: [..., 3, H, W] in 0..1.
    factor: [...] weight of the view.

  Returns:
    [..., 3, H, W] in 0..1.
  """
  return _blend(views, to_gray(views), factor)


def adjust_hue(views: jax.Array, shift: jax.Array) -> jax.Array:
  """Turns the hue in HSV space (torchvision `adjust_hue`).

  The way back from HSV is written without its six cases: a channel is
  value - chroma * clip(min(k, 4 - k), 0, 1) with k = (n + 6 hue) mod 6 and
  n = 5, 3, 1 for red, green, blue.

  Args:
    views: [..., 3, H, W] in 0..1.
    shift: [...] in turns, -0.5..0.5.

  Returns:
    [..., 3, H, W] in 0..1.
  """
  red, green, blue = jnp.moveaxis(views, -3, 0)
  value = jnp.maximum(jnp.maximum(red, green), blue)
  chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
  scale = 1.0 / jnp.where(chroma > 0.0, chroma, 1.0)
  sextant = jnp.where(
    value == red,
    (green - blue) * scale,
    jnp.where(
      value == green,
      2.0 + (blue - red) * scale,
      4.0 + (red - green) * scale,
    ),
  )
  sextant = sextant + 6.0 * shift[..., None, None]

  def channel(offset: float) -> jax.Array:
    k = (offset + sextant) / 6.0
    k = 6.0 * (k - jnp.floor(k))
    return value - chroma * jnp.clip(jnp.minimum(k, 4.0 - k), 0.0, 1.0)

  return jnp.stack([channel(5.0), channel(3.0), channel(1.0)], axis=-3)


def color_jitter(
  views: jax.Array, factors: JitterFactors, order: jax.Array
) -> jax.Array:
  """Brightness, contrast, saturation and hue in a given order.

  The order is one for all views, so each of its four places is a scalar
  `lax.switch` that runs one operation. An order per view, as published, would
  be a batched switch, which evaluates all four operations at each place for
  every view.

  Args:
    views: [..., 3, H, W] in 0..1.
    factors: [...] each.
    order: [4] int32 permutation of 0..3: brightness, contrast, saturation, hue.

  Returns:
    [..., 3, H, W] in 0..1.
  """
  operations = [
    lambda x: adjust_brightness(x, factors.brightness),
    lambda x: adjust_contrast(x, factors.contrast),
    lambda x: adjust_saturation(x, factors.saturation),
    lambda x: adjust_hue(x, factors.hue),
  ]
  if not has_colours(views):
    # The others stay in the order: two of the four do nothing.
    operations[2:] = [lambda x: x, lambda x: x]
  for place in range(len(operations)):
    views = jax.lax.switch(order[place], operations, views)
  return views


def gaussian_blur(
  views: jax.Array, sigma: jax.Array, *, max_sigma: float
) -> jax.Array:
  """A Gaussian cut off at four sigma, the border replicated.

  `scipy.ndimage.gaussian_filter(mode='nearest')`; Pillow's GaussianBlur, which
  the published recipe calls, approximates the same by repeated box filters.
  Written as a sum of shifted views, because the kernels of a batch differ and
  have few taps (17 at 224 px).

  Args:
    views: [..., 3, H, W] in 0..1.
    sigma: [...] in pixels, at most `max_sigma`; 0 leaves the view sharp.
    max_sigma: decides the number of taps, which is static.

  Returns:
    [..., 3, H, W] in 0..1.
  """
  reach = int(_TRUNCATE * max_sigma + 0.5)
  taps = jnp.arange(reach + 1)
  cut = jnp.floor(_TRUNCATE * sigma + 0.5)[..., None]
  spread = jnp.maximum(sigma, 1e-3)[..., None]
  kernel = jnp.where(taps <= cut, jnp.exp(-0.5 * (taps / spread) ** 2), 0.0)
  kernel = kernel / (2.0 * jnp.sum(kernel, -1, keepdims=True) - kernel[..., :1])

  for axis in (views.ndim - 2, views.ndim - 1):
    size = views.shape[axis]
    padding = [(0, 0)] * views.ndim
    padding[axis] = (reach, reach)
    padded = jnp.pad(views, padding, mode='edge')

    def shifted(offset: int, padded=padded, size=size, axis=axis) -> jax.Array:
      return jax.lax.slice_in_dim(
        padded, reach + offset, reach + offset + size, axis=axis
      )

    views = _per_view(kernel[..., 0]) * shifted(0)
    for tap in range(1, reach + 1):
      pair = shifted(-tap) + shifted(tap)
      views = views + _per_view(kernel[..., tap]) * pair
  return views


def solarize(views: jax.Array, apply: jax.Array) -> jax.Array:
  """Inverts the pixels from 0.5 up (Pillow `ImageOps.solarize`).

  Args:
    views: [..., 3, H, W] in 0..1.
    apply: [...] bool.

  Returns:
    [..., 3, H, W] in 0..1.
  """
  return jnp.where(_per_view(apply) & (views >= 0.5), 1.0 - views, views)
