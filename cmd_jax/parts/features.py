"""Features of a frozen encoder, in which parts are looked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from cmd_jax.errors import UserError
from cmd_jax.models.vit import VisionTransformer, encode_with_keys
from cmd_jax.parts.points import einsum, resize_matrix


class KeyMaps(NamedTuple):
  """What a ViT says of every patch of a batch of images.

  Attributes:
    keys: [B, h, w, D] float32 keys of the last block, the head's index fastest.
    saliency: [B, h, w] float32 attention of the class token, from 0 to 1 within
      each image.
    rows: [h] centres of the rows of patches as fractions of the height.
    columns: [w] centres of the columns as fractions of the width.
  """

  keys: jax.Array
  saliency: jax.Array
  rows: jax.Array
  columns: jax.Array


def resize_bilinear(x: jax.Array, grid: tuple[int, int]) -> jax.Array:
  """Resizes [B, h, w, C] to a grid as torch does, without antialiasing."""
  rows, columns = (
    resize_matrix(old, new) for old, new in zip(x.shape[1:3], grid)
  )
  return einsum('yh,xw,bhwc->byxc', rows, columns, x)


def hypercolumn(maps: Sequence[jax.Array], grid: tuple[int, int]) -> jax.Array:
  """Maps resized to a grid and concatenated (Hariharan et al. 2015).

  `resnet_hypercolumn` of ContrastLandmark (models/resnet.py), PARTICLE's
  predecessor. k-means has no need of it: `kmeans_of_maps` takes the maps.

  Args:
    maps: [B, h, w, C] each, of any size.
    grid: H and W of the result.

  Returns:
    [B, H, W, sum of C].
  """
  return jnp.concatenate([resize_bilinear(x, grid) for x in maps], axis=-1)


def hypercolumn_maps(
  encoder: nn.Module,
  variables: Mapping[str, Any],
  images: jax.Array,
  num_layers: int = 4,
) -> tuple[jax.Array, ...]:
  """The maps of a convolutional network's hypercolumn, the deepest first.

  Args:
    encoder: network with a method `stages`, a ResNet or an EfficientNet.
    variables: of the encoder.
    images: [B, H, W, 3] normalised.
    num_layers: maps taken, from the smallest on; at most five, of which a
      ResNet's largest is the max-pool's and an EfficientNet's smallest the
      head's. PARTICLE takes 4.

  Returns:
    [B, h, w, C] float32 each.

  Raises:
    UserError: an encoder without stages.
  """
  if not hasattr(encoder, 'stages'):
    raise UserError(
      f'hypercolumns need a convolutional network, not '
      f'{type(encoder).__name__}: use --config=FILE:encoder=resnet or '
      'efficientnet, or parts=cosegmentation'
    )
  maps = encoder.apply(variables, images, method='stages')
  return tuple(x.astype(jnp.float32) for x in maps[::-1][:num_layers])


def key_maps(
  encoder: VisionTransformer,
  variables: Mapping[str, Any],
  images: jax.Array,
  *,
  stride_px: int,
  saliency_heads: Sequence[int] = (),
) -> KeyMaps:
  """Keys and saliency of overlapping patches (Amir et al. 2021).

  `ViTExtractor` of PARTICLE's extractor.py with facet 'key' and the last layer.
  The released saliency is scaled by the extremes of the whole batch; this is
  scaled image by image.

  Args:
    encoder: a ViT.
    variables: of the encoder.
    images: [B, H, W, 3] normalised; an incomplete patch at the border is cut.
    stride_px: distance of neighbouring patches, at most the patch's side.
    saliency_heads: heads whose attention is averaged, none for all; the
      released code takes 0, 2, 4 and 5 of the six heads of a ViT-S.

  Raises:
    UserError: another encoder, or a stride, an image or a head that cannot be.
  """
  if not isinstance(encoder, VisionTransformer):
    raise UserError(
      f'keys need a ViT, not {type(encoder).__name__}: use '
      '--config=FILE:encoder=vit, or another source of parts'
    )
  if not 0 < stride_px <= encoder.patch_px:
    raise UserError(
      f'the stride of the patches is {stride_px}: it must be from 1 to '
      f'patch_px {encoder.patch_px}'
    )
  height, width = images.shape[1:3]
  if min(height, width) < encoder.patch_px:
    raise UserError(
      f'images of {height} x {width} are smaller than a patch of '
      f'{encoder.patch_px}: make the view larger'
    )
  if not set(saliency_heads) <= set(range(encoder.num_heads)):
    raise UserError(
      f'config.parts.settings.saliency_heads is {tuple(saliency_heads)}: give '
      f'some of 0 to {encoder.num_heads - 1}, or none for all'
    )
  heads = list(saliency_heads) or list(range(encoder.num_heads))
  encoder = encoder.clone(patch_stride_px=stride_px, interpolation='dinov2')
  output, keys = encode_with_keys(encoder, variables, images)
  grid = encoder.grid(height, width)
  attention = output.attention[:, jnp.array(heads)].mean(1)
  low = attention.min(-1, keepdims=True)
  span = attention.max(-1, keepdims=True) - low
  saliency = (attention - low) / jnp.where(span > 0, span, 1.0)
  keys = keys.swapaxes(-1, -2).astype(jnp.float32)
  rows, columns = (
    (jnp.arange(count) * stride_px + encoder.patch_px / 2) / side
    for count, side in zip(grid, (height, width))
  )
  return KeyMaps(
    keys.reshape(len(images), *grid, -1),
    saliency.reshape(len(images), *grid),
    rows,
    columns,
  )


def log_bin(maps: jax.Array, levels: int = 2) -> jax.Array:
  """Descriptors with their surroundings in bins (Amir et al. 2021, Sec. 3).

  At level l the eight neighbours at a distance of 3^l are means over windows
  of 3^l patches a side; `_log_bin` of PARTICLE's extractor.py. Outside, the
  nearest patch's mean stands in; a window counts the patches inside alone.

  Args:
    maps: [B, h, w, D].
    levels: number of rings.

  Returns:
    [B, h, w, (1 + 8 levels) D].
  """
  _, height, width, _ = maps.shape
  bins = []
  for level in range(levels):
    side = 3**level
    means = nn.avg_pool(
      maps,
      (side, side),
      padding=((side // 2,) * 2,) * 2,
      count_include_pad=False,
    )
    for down in (-side, 0, side):
      for right in (-side, 0, side):
        if level and not down and not right:
          continue
        rows = jnp.clip(jnp.arange(height) + down, 0, height - 1)
        columns = jnp.clip(jnp.arange(width) + right, 0, width - 1)
        bins.append(means[:, rows[:, None], columns])
  return jnp.concatenate(bins, axis=-1)
