"""Residual network encoder (He et al. 2016), version 1.5 as in torchvision.

The step of a bottleneck sits in its 3x3 convolution. PARTICLE's networks are
the same class.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from cmd_jax.errors import UserError
from cmd_jax.models.layers import (
  DTYPES,
  REMATS,
  BatchNorm,
  EncoderOutput,
  check_choice,
  rematerialised,
  wide,
)

# The stem keeps its width whatever that of the stages, as in the released code.
STEM_CHANNELS = 64

# torchvision's kaiming_normal_ by fan_out: N(0, sqrt(2 / (k * k * out))).
_conv_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


def _conv(
  features: int, side: int, stride: int, dtype: jnp.dtype, name: str
) -> nn.Conv:
  """Convolution without bias."""
  return nn.Conv(
    features,
    (side, side),
    strides=stride,
    # 'SAME' would pad an even image on one side only when the stride is 2.
    padding=side // 2,
    use_bias=False,
    dtype=dtype,
    kernel_init=_conv_init,
    name=name,
  )


class Block(nn.Module):
  """Residual block: relu(shortcut + branch).

  Attributes:
    channels: width of the block; a bottleneck puts out four times as many.
    stride: step of the 3x3 convolution, in a basic block of the first.
    bottleneck: 1x1, 3x3, 1x1 convolutions rather than two of 3x3.
    downsample: whether the shortcut is a 1x1 convolution.
    dtype: dtype of the computation.
    axis_name: see `ResNet`.
  """

  channels: int
  stride: int
  bottleneck: bool
  downsample: bool
  dtype: jnp.dtype
  axis_name: str | None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """[B, h, w, C] -> [B, ceil(h / stride), ceil(w / stride), C']."""

    def norm(y, name):
      layer = BatchNorm(self.axis_name, dtype=self.dtype, name=name)
      return layer(y, train)

    convs = [(self.channels, 3, self.stride), (self.channels, 3, 1)]
    if self.bottleneck:
      convs = [
        (self.channels, 1, 1),
        (self.channels, 3, self.stride),
        (4 * self.channels, 1, 1),
      ]
    y = x
    for index, (features, side, stride) in enumerate(convs, 1):
      if index > 1:
        y = nn.relu(y)
      y = _conv(features, side, stride, self.dtype, f'conv{index}')(y)
      y = norm(y, f'bn{index}')
    if self.downsample:
      name = 'downsample_conv'
      x = _conv(y.shape[-1], 1, self.stride, self.dtype, name)(x)
      x = norm(x, 'downsample_bn')
    return nn.relu(x + y)


class ResNet(nn.Module):
  """ResNet without its classifier, for images of any size.

  Its variables are 'params' and 'batch_stats'; with `train` the latter change,
  so apply it with `mutable=['batch_stats']`.

  Attributes:
    bottleneck: kind of the blocks.
    stage_sizes: number of blocks of each of the four stages.
    base_channels: width of the first stage's blocks; every stage doubles it.
    last_stride: step of the last stage, 2, or 1 for maps twice as fine out of
      the same parameters, as PARTICLE segments (evaluation/fcn.py).
    dtype: dtype of the computation; parameters and statistics are float32.
    axis_name: axis over which the batch is spread, None if it is global.
    remat: what of a block is computed again for its gradient, a key of
      `layers.REMATS`.
    channels: C of the images.
  """

  bottleneck: bool
  stage_sizes: tuple[int, ...]
  base_channels: int
  last_stride: int = 2
  dtype: jnp.dtype = jnp.float32
  axis_name: str | None = None
  remat: str = 'none'
  channels: int = 3

  @property
  def depth(self) -> int:
    """Number of blocks with stochastic depth: none."""
    return 0

  @property
  def block_names(self) -> tuple[str, ...]:
    """Names of the blocks' parameters in the order of computation."""
    return tuple(
      f'layer{stage}_{index}'
      for stage, size in enumerate(self.stage_sizes, 1)
      for index in range(size)
    )

  @property
  def layer_names(self) -> tuple[str, ...]:
    """`block_names`: nothing with parameters comes after them."""
    return self.block_names

  def has_downsample(self, stage: int) -> bool:
    """Whether the first block of a stage, 1 to 4, projects its shortcut."""
    channels = self.base_channels * (4 if self.bottleneck else 1)
    return stage > 1 or channels != STEM_CHANNELS

  @nn.compact
  def stages(
    self, images: jax.Array, train: bool = False
  ) -> tuple[jax.Array, ...]:
    """The feature maps after the max-pool and after every stage.

    Args:
      images: [B, H, W, 3] normalised.
      train: normalises by the batch's statistics and updates the running ones.

    Returns:
      Five [B, h, w, C] in the dtype of the computation; the sides are those of
      the images divided by 4, 4, 8, 16 and 32 (16 with a last stride of 1),
      rounded up.
    """
    x = _conv(STEM_CHANNELS, 7, 2, self.dtype, 'conv1')(images)
    x = BatchNorm(self.axis_name, dtype=self.dtype, name='bn1')(x, train)
    x = nn.max_pool(nn.relu(x), (3, 3), (2, 2), ((1, 1), (1, 1)))
    outputs = [x]
    strides = (1, 2, 2, self.last_stride)
    block = rematerialised(Block, self.remat, (2,)) if train else Block
    for stage, size in enumerate(self.stage_sizes, 1):
      for index in range(size):
        x = block(
          channels=self.base_channels * 2 ** (stage - 1),
          stride=strides[stage - 1] if index == 0 else 1,
          bottleneck=self.bottleneck,
          downsample=index == 0 and self.has_downsample(stage),
          dtype=self.dtype,
          axis_name=self.axis_name,
          name=f'layer{stage}_{index}',
        )(x, train)
      outputs.append(x)
    return tuple(outputs)

  def __call__(
    self,
    images: jax.Array,
    drop_path_uniforms: jax.Array | None = None,
    train: bool = False,
  ) -> EncoderOutput:
    """Encodes a batch of images.

    Args:
      images: [B, H, W, 3] normalised.
      drop_path_uniforms: makes no difference; encoders with stochastic depth
        need them.
      train: normalises by the batch's statistics and updates the running ones.

    Returns:
      The mean over the last stage's positions, and the positions themselves.
    """
    del drop_path_uniforms
    last = self.stages(images, train)[-1]
    last = last.astype(wide(last.dtype))
    tokens = last.reshape(len(last), -1, last.shape[-1])
    return EncoderOutput(tokens.mean(1), tokens, None)


# bottleneck, blocks of each stage, width of the first stage (He et al. 2016,
# Table 1). Mu is ours: the smallest that learns something on a laptop.
VARIANTS = {
  'Mu': (False, (1, 1, 1, 1), 16),
  '18': (False, (2, 2, 2, 2), 64),
  '34': (False, (3, 4, 6, 3), 64),
  '50': (True, (3, 4, 6, 3), 64),
  '101': (True, (3, 4, 23, 3), 64),
}


def make_resnet(
  *,
  variant: str = '50',
  width_ratio: float = 1.0,
  dtype: str = 'float32',
  remat: str = 'none',
  axis_name: str | None = None,
  channels: int = 3,
) -> ResNet:
  """Builds a ResNet from a preset.

  Args:
    variant: a key of VARIANTS.
    width_ratio: multiplies the channels of the stages, rounded down; the stem
      has 64 in any case.
    dtype: dtype of the computation, 'float32' or 'bfloat16'.
    remat: key of `layers.REMATS`; convolutions are no products to 'dots'.
    axis_name: axis over which the batch is spread, None if it is global.
    channels: C of the images.

  Raises:
    UserError: an unknown choice, or a width that leaves no channel.
  """
  check_choice('variant', variant, VARIANTS)
  check_choice('dtype', dtype, DTYPES)
  check_choice('remat', remat, REMATS)
  bottleneck, stage_sizes, width = VARIANTS[variant]
  base_channels = int(width * width_ratio)
  if base_channels < 1:
    raise UserError(
      f'config.model.width_ratio is {width_ratio}, which leaves no channel of '
      f'the {width} of variant {variant}: use at least 1/{width}'
    )
  return ResNet(
    bottleneck=bottleneck,
    stage_sizes=stage_sizes,
    base_channels=base_channels,
    dtype=DTYPES[dtype],
    axis_name=axis_name,
    remat=remat,
    channels=channels,
  )
