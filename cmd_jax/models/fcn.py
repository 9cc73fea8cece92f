"""Decoders that turn a feature map into the part of every pixel.

The fully convolutional networks of PARTICLE's few-shot part segmentation
(evaluation/fcn.py and evaluation/fcn_dino.py), without their encoders.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cmd_jax.errors import UserError
from cmd_jax.models.layers import BatchNorm, Dense, torch_default_init


def corner_aligned_matrix(old: int, new: int) -> np.ndarray:
  """Weights [new, old] of linear interpolation from the first to the last.

  Sample i lies at i (old - 1) / (new - 1), as in torch with align_corners; a
  single new sample is the first old one.
  """
  position = np.arange(new) * ((old - 1) / max(new - 1, 1))
  lower = np.minimum(position.astype(int), max(old - 2, 0))
  upper = np.minimum(lower + 1, old - 1)
  matrix = np.zeros((new, old))
  np.add.at(matrix, (np.arange(new), lower), 1 - (position - lower))
  np.add.at(matrix, (np.arange(new), upper), position - lower)
  return matrix.astype(np.float32)


def resize_corner_aligned(x: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Bilinear interpolation that keeps the corners where they are.

  Args:
    x: [B, h, w, C].
    size: rows and columns wanted; those of `x` leave it untouched.

  Returns:
    [B, rows, columns, C].
  """
  for axis, new in ((1, size[0]), (2, size[1])):
    if x.shape[axis] != new:
      matrix = jnp.asarray(corner_aligned_matrix(x.shape[axis], new), x.dtype)
      x = jnp.moveaxis(jnp.tensordot(x, matrix, (axis, 1)), -1, axis)
  return x


class UpBlock(nn.Module):
  """Doubles a map's sides: x2, then convolutions with BatchNorm and ReLU.

  Attributes:
    channels: width of the convolutions.
    kernel_px: side of their kernels, 1 or 3.
    num_convs: how many there are.
  """

  channels: int
  kernel_px: int
  num_convs: int

  def _conv(self, x: jax.Array, name: str) -> jax.Array:
    init = torch_default_init(x.shape[-1] * self.kernel_px**2)
    options = dict(kernel_init=init, bias_init=init, name=name)
    if self.kernel_px == 1:
      return Dense(self.channels, **options)(x)
    side = (self.kernel_px, self.kernel_px)
    return nn.Conv(self.channels, side, **options)(x)

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """[B, h, w, C] -> [B, 2h, 2w, channels]."""
    size = (2 * x.shape[1], 2 * x.shape[2])
    if self.kernel_px > 1:
      x = resize_corner_aligned(x, size)
    for index in range(self.num_convs):
      x = self._conv(x, f'conv_{index}')
      # The weights of an interpolation sum to 1, so a 1x1 convolution may come
      # first, at a quarter of the cost; afterwards the size is right already.
      x = resize_corner_aligned(x, size)
      x = nn.relu(BatchNorm(name=f'bn_{index}')(x, train))
    return x


class Decoder(nn.Module):
  """Up-blocks, a 1x1 convolution, and a last resize to the masks' size.

  The released head for ResNet stops at half the side of the images and so can't
  be trained on their masks (cross entropy raises); here the logits always have
  the size that is asked for. Where the up-blocks reach it by themselves, as the
  released head for ViT does, the last resize does nothing. Up-blocks that would
  go beyond it are left out, all but the first.

  Attributes:
    num_classes: K, background included.
    channels: width of every up-block, each of which doubles the sides.
    kernel_px: side of the up-blocks' kernels.
    num_convs: convolutions of an up-block.
  """

  num_classes: int
  channels: tuple[int, ...]
  kernel_px: int
  num_convs: int

  @nn.compact
  def __call__(
    self, maps: jax.Array, size: tuple[int, int], train: bool = False
  ) -> jax.Array:
    """Classifies every pixel.

    Args:
      maps: [B, h, w, C] features; computed with in float32.
      size: rows H and columns W of the masks.
      train: normalises by the batch's statistics and updates the running ones
        (`mutable=['batch_stats']`).

    Returns:
      [B, H, W, K] float32 logits.
    """
    x = maps.astype(jnp.float32)
    for index, channels in enumerate(self.channels):
      if index and 2 * x.shape[1] > size[0]:
        break
      name = f'up_{index}'
      x = UpBlock(channels, self.kernel_px, self.num_convs, name=name)(x, train)
    init = torch_default_init(x.shape[-1])
    x = Dense(
      self.num_classes,
      kernel_init=init,
      bias_init=init,
      name='classifier',
    )(x)
    return resize_corner_aligned(x, size)


# kernel_px and num_convs, by the released file: on the last stage of a ResNet,
# and on the keys of a ViT.
VARIANTS = {'fcn': (1, 1), 'fcn_dino': (3, 2)}


def make_decoder(
  *,
  num_classes: int,
  variant: str = 'fcn',
  channels: tuple[int, ...] = (256, 128, 64),
) -> Decoder:
  """Builds a decoder.

  Args:
    num_classes: parts and background.
    variant: 'fcn' classifies every position by itself, 'fcn_dino' looks at its
      neighbours too, at many times the cost.
    channels: width of the up-blocks.

  Raises:
    UserError: an unknown choice, or fewer than two classes.
  """
  if variant not in VARIANTS:
    raise UserError(
      f'the part decoder {variant!r} is unknown: choose one of '
      f'{", ".join(VARIANTS)}'
    )
  if num_classes < 2:
    raise UserError(
      f'the part decoder has {num_classes} class(es): give it masks with a '
      'background and at least one part'
    )
  kernel_px, num_convs = VARIANTS[variant]
  return Decoder(num_classes, tuple(channels), kernel_px, num_convs)
