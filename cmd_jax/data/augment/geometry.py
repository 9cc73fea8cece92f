"""Where a view is cut out of its original, and how it is resampled.

A crop is drawn in the frame of the original photograph, whose true height and
width decide its aspect ratio, and is kept as fractions of that frame, so the
same four numbers address the squashed canvas and any mask drawn on it.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

CROP_ATTEMPTS = 10

# A view must not depend on the matmul precision that an accelerator prefers:
# bfloat16 weights alone would cost half a grey level per tap.
_PRECISION = jax.lax.Precision.HIGHEST


def sample_crop_boxes(
  keys: jax.Array,
  sizes: jax.Array,
  *,
  num_views: int,
  scale: tuple[float, float],
  ratio: tuple[float, float],
) -> jax.Array:
  """Draws the boxes of RandomResizedCrop in the frame of the original.

  torchvision `RandomResizedCrop.get_params`: an area uniform in `scale`, an
  aspect ratio (width / height) log-uniform in `ratio`, both rounded to a box of
  whole pixels; the first of ten attempts that fits is placed uniformly. If none
  fits, the largest central box whose ratio lies in `ratio`.

  Args:
    keys: [B] PRNG keys, one per example.
    sizes: [B, 2] int32 height and width of the originals in pixels.
    num_views: V, number of boxes per example.
    scale: smallest and largest area as a fraction of the original's.
    ratio: smallest and largest aspect ratio.

  Returns:
    [B, V, 4] int32 top, left, bottom, right in pixels of the original; bottom
    and right are exclusive.
  """
  draws = jax.vmap(
    lambda key: jax.random.uniform(key, (num_views, 2 * CROP_ATTEMPTS + 2))
  )(keys)
  area_draws = draws[..., :CROP_ATTEMPTS]
  ratio_draws = draws[..., CROP_ATTEMPTS : 2 * CROP_ATTEMPTS]
  full = sizes[:, None].astype(jnp.float32)
  full_height, full_width = full[..., 0], full[..., 1]  # [B, 1]

  area = (full_height * full_width)[..., None] * (
    scale[0] + (scale[1] - scale[0]) * area_draws
  )
  log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
  aspect = jnp.exp(log_low + (log_high - log_low) * ratio_draws)
  height = jnp.round(jnp.sqrt(area / aspect))  # [B, V, CROP_ATTEMPTS]
  width = jnp.round(jnp.sqrt(area * aspect))
  fits = (
    (height > 0)
    & (height <= full_height[..., None])
    & (width > 0)
    & (width <= full_width[..., None])
  )
  first = fits & (jnp.cumsum(fits, axis=-1) == 1)
  any_fits = jnp.any(fits, axis=-1)

  def select(attempts: jax.Array, fallback: jax.Array) -> jax.Array:
    drawn = jnp.sum(jnp.where(first, attempts, 0.0), axis=-1)
    return jnp.where(any_fits, drawn, fallback)

  # An original within `ratio` keeps both sides, another loses from its longer.
  height = select(
    height, jnp.minimum(full_height, jnp.round(full_width / ratio[0]))
  )
  width = select(
    width, jnp.minimum(full_width, jnp.round(full_height * ratio[1]))
  )

  def place(full: jax.Array, side: jax.Array, draw: jax.Array) -> jax.Array:
    slack = full - side
    uniform = jnp.minimum(jnp.floor(draw * (slack + 1)), slack)
    return jnp.where(any_fits, uniform, jnp.floor(slack / 2))

  top = place(full_height, height, draws[..., -2])
  left = place(full_width, width, draws[..., -1])
  boxes = jnp.stack([top, left, top + height, left + width], axis=-1)
  return boxes.astype(jnp.int32)


def as_fractions(boxes: jax.Array, sizes: jax.Array) -> jax.Array:
  """Pixel boxes as fractions of the original.

  Args:
    boxes: [B, V, 4] top, left, bottom, right in pixels of the original.
    sizes: [B, 2] height and width of the originals in pixels.

  Returns:
    [B, V, 4] float32 in 0..1.
  """
  sides = jnp.concatenate([sizes, sizes], axis=-1)[:, None]
  return boxes.astype(jnp.float32) / sides.astype(jnp.float32)


def central_square(sizes: jax.Array, crop_fraction: float) -> jax.Array:
  """The central square of an original.

  Args:
    sizes: [B, 2] height and width of the originals in pixels.
    crop_fraction: side of the square as a fraction of the shorter side.

  Returns:
    [B, 4] float32 top, left, bottom, right as fractions of the original.
  """
  sides = sizes.astype(jnp.float32)
  half = crop_fraction * jnp.min(sides, axis=-1, keepdims=True) / sides / 2
  return jnp.concatenate([0.5 - half, 0.5 + half], axis=-1)


def _sample_points(
  low: jax.Array, high: jax.Array, flip: jax.Array, out_px: int
) -> jax.Array:
  """Centres of the output pixels in the input; [...] -> [..., out_px]."""
  index = jnp.arange(out_px)
  index = jnp.where(flip[..., None], out_px - 1 - index, index)
  step = (high - low) / out_px
  return low[..., None] + (index + 0.5) * step[..., None]


def resampling_matrix(
  low: jax.Array,
  high: jax.Array,
  flip: jax.Array,
  *,
  in_px: int,
  out_px: int,
  truncate: bool,
) -> jax.Array:
  """Weights of an antialiased bicubic resampling along one axis.

  Pillow's `resize(BICUBIC)`: the Keys kernel with a = -0.5, widened by the
  factor of downscaling, renormalised where it is cut off.

  Args:
    low: [...] where the crop begins, in pixels of the input, fractional.
    high: [...] where it ends.
    flip: [...] bool, whether the output is mirrored.
    in_px: number of input pixels.
    out_px: number of output pixels.
    truncate: whether the kernel stops at the border of the crop (crop, then
      resize) or sees the pixels beyond it (resize, then crop). A pixel that the
      border divides counts by the part of it inside.

  Returns:
    [..., out_px, in_px] float32; rows sum to one.
  """
  points = _sample_points(low, high, flip, out_px)[..., None]
  pixels = jnp.arange(in_px, dtype=jnp.float32)
  support = jnp.maximum((high - low) / out_px, 1.0)[..., None, None]
  x = jnp.abs(pixels + 0.5 - points) / support
  near = (1.5 * x - 2.5) * x * x + 1.0
  far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
  weights = jnp.where(x < 1.0, near, jnp.where(x < 2.0, far, 0.0))
  if truncate:
    low, high = low[..., None], high[..., None]
    inside = jnp.minimum(pixels + 1.0, high) - jnp.maximum(pixels, low)
    weights = weights * jnp.clip(inside, 0.0, 1.0)[..., None, :]
  return weights / jnp.sum(weights, axis=-1, keepdims=True)


def crop_and_resize(
  images: jax.Array,
  boxes: jax.Array,
  flips: jax.Array,
  out_px: int,
  *,
  truncate: bool = True,
) -> jax.Array:
  """Cuts boxes out of images and resamples them bicubically.

  Two dense products with the weights of `resampling_matrix`, the horizontal
  first and each clipped to the range of a pixel, as Pillow does it (from 13.0
  on Pillow begins with the vertical where that shrinks much more; the results
  differ only where the first product is clipped).

  Args:
    images: [B, 3, H, W] in 0..1, channels first.
    boxes: [B, V, 4] top, left, bottom, right as fractions of the image.
    flips: [B, V] bool, mirrored horizontally.
    out_px: side G of the output.
    truncate: see `resampling_matrix`.

  Returns:
    [B, V, 3, G, G] float32 in 0..1, channels first.
  """
  height, width = images.shape[2:]
  top, left, bottom, right = jnp.moveaxis(boxes, -1, 0)
  columns = resampling_matrix(
    left * width,
    right * width,
    flips,
    in_px=width,
    out_px=out_px,
    truncate=truncate,
  )
  rows = resampling_matrix(
    top * height,
    bottom * height,
    jnp.zeros_like(flips),
    in_px=height,
    out_px=out_px,
    truncate=truncate,
  )
  narrow = jnp.einsum('bchw,bvxw->bvchx', images, columns, precision=_PRECISION)
  narrow = jnp.clip(narrow, 0.0, 1.0)
  views = jnp.einsum('bvyh,bvchx->bvcyx', rows, narrow, precision=_PRECISION)
  return jnp.clip(views, 0.0, 1.0)


def crop_part_ids(
  part_ids: jax.Array, boxes: jax.Array, flips: jax.Array, out_px: int
) -> jax.Array:
  """Cuts the views' boxes out of part masks, by nearest neighbour.

  Args:
    part_ids: [B, R, R] uint8 part of every pixel of the canvas.
    boxes: [B, V, 4] `Views.global_boxes` or `Views.local_boxes`.
    flips: [B, V] bool, the flips that belong to them.
    out_px: side of the output: a view's, or its number of tokens per side.

  Returns:
    [B, V, out_px, out_px] uint8.
  """

  def one_hot(
    low: jax.Array, high: jax.Array, flip: jax.Array, in_px: int
  ) -> jax.Array:
    points = _sample_points(low * in_px, high * in_px, flip, out_px)
    nearest = jnp.clip(jnp.floor(points), 0, in_px - 1)
    return (nearest[..., None] == jnp.arange(in_px)).astype(jnp.float32)

  top, left, bottom, right = jnp.moveaxis(boxes, -1, 0)
  rows = one_hot(top, bottom, jnp.zeros_like(flips), part_ids.shape[1])
  columns = one_hot(left, right, flips, part_ids.shape[2])
  # One-hot products copy, and no id below 256 is rounded even by bfloat16.
  narrow = jnp.einsum('bhw,bvxw->bvhx', part_ids.astype(jnp.float32), columns)
  return jnp.einsum('bvyh,bvhx->bvyx', rows, narrow).astype(jnp.uint8)
