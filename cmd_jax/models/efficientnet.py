"""EfficientNet-Lite encoder (Tan & Le 2019; tensorflow/tpu, efficientnet/lite).

EfficientNet without squeeze and excitation, with ReLU6 in place of swish, and
with the stem and the head of the smallest whatever the width of the stages.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from cmd_jax.errors import UserError
from cmd_jax.models.depthwise import depthwise
from cmd_jax.models.layers import (
  DTYPES,
  REMATS,
  BatchNorm,
  Dense,
  EncoderOutput,
  check_choice,
  check_drop_path_rate,
  drop_path,
  rematerialised,
  wide,
)

# The stem and the head keep their width whatever that of the stages.
STEM_CHANNELS, HEAD_CHANNELS = 32, 1280

# Of the seven stages: side of the depthwise kernels, step of the first block,
# and how many times as wide a block is inside.
KERNELS_PX = (3, 3, 5, 3, 5, 5, 3)
STRIDES = (1, 2, 2, 2, 1, 2, 1)
EXPANSIONS = (1, 6, 6, 6, 6, 6, 6)

# Which map the tokens are, by the step in pixels from one to the next.
TOKENS = ('stride16', 'stride32')
BATCH_STATISTICS = ('synchronised', 'frozen')
INPUT_NORMALISATIONS = ('tensorflow', 'imagenet')

# Means and deviations of ImageNet, by which all views here are normalised
# (cmd_jax/data/augment/multi_crop.py), and those of the published weights.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_TENSORFLOW = (127 / 255, 128 / 255)

# As published; layers.BatchNorm has torch's. The published momentum, 0.99, is
# for hundreds of thousands of steps.
EPSILON = 1e-3

# N(0, sqrt(2 / fan_out)), and for a kernel of one channel its own size.
_conv_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')
_depthwise_init = nn.initializers.variance_scaling(2.0, 'fan_in', 'normal')


class DepthwiseConv(nn.Module):
  """Depthwise convolution without bias.

  Attributes:
    kernel_px: side of the kernels.
    stride: step.
    dtype: dtype of the computation.
  """

  kernel_px: int
  stride: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, h, w, C] -> [B, ceil(h / stride), ceil(w / stride), C]."""
    shape = (self.kernel_px, self.kernel_px, 1, x.shape[-1])
    kernel = self.param('kernel', _depthwise_init, shape)
    return depthwise(
      x.astype(self.dtype), kernel.astype(self.dtype), self.stride
    )


class Block(nn.Module):
  """Inverted residual block: widen, convolve each channel, narrow.

  There is a shortcut where the block keeps the step and the width.

  Attributes:
    channels: width of the output.
    kernel_px: side of the depthwise kernels.
    stride: step of the depthwise convolution.
    expansion: how many times as wide the block is inside; 1 does without the
      widening layer.
    drop_path_rate: probability of dropping the branch beside a shortcut.
    dtype: dtype of the computation.
    axis_name: see `EfficientNet`.
  """

  channels: int
  kernel_px: int
  stride: int
  expansion: int
  drop_path_rate: float
  dtype: jnp.dtype
  axis_name: str | None

  @nn.compact
  def __call__(
    self, x: jax.Array, uniforms: jax.Array | None, by_batch: bool
  ) -> jax.Array:
    """[B, h, w, C], uniforms [B] or None -> [B, ceil(h / stride), ..., C'].

    `by_batch` normalises by the batch's statistics.
    """

    def norm(y, name):
      layer = BatchNorm(
        self.axis_name, epsilon=EPSILON, dtype=self.dtype, name=name
      )
      return layer(y, by_batch)

    y = x
    if self.expansion > 1:
      y = _pointwise(self.expansion * x.shape[-1], self.dtype, 'expand_conv')(y)
      y = nn.relu6(norm(y, 'expand_bn'))
    y = DepthwiseConv(
      self.kernel_px, self.stride, self.dtype, name='depthwise_conv'
    )(y)
    y = nn.relu6(norm(y, 'depthwise_bn'))
    y = _pointwise(self.channels, self.dtype, 'project_conv')(y)
    y = norm(y, 'project_bn')
    if self.stride > 1 or self.channels != x.shape[-1]:
      return y
    if uniforms is not None and self.drop_path_rate:
      y = drop_path(y, self.drop_path_rate, uniforms)
    return x + y


def _pointwise(features: int, dtype: jnp.dtype, name: str) -> Dense:
  """Convolution of 1x1 without bias, as the linear layer that it is."""
  return Dense(
    features, use_bias=False, dtype=dtype, kernel_init=_conv_init, name=name
  )


class EfficientNet(nn.Module):
  """EfficientNet-Lite without its classifier, for images of any size.

  Its variables are 'params' and 'batch_stats'; with `train` the latter change
  unless they are frozen, so apply it with `mutable=['batch_stats']`.

  Attributes:
    stage_sizes: number of blocks of each of the seven stages.
    stage_channels: width of each stage.
    tokens: what the tokens are, one of TOKENS: 'stride16' the output of the
      fifth stage, 'stride32' that of the head, whose mean is the embedding of
      the image.
    batch_statistics: one of BATCH_STATISTICS: 'synchronised' normalises by
      those of the global batch in training, 'frozen' by the running ones, which
      stay as they are, also in training.
    input_normalisation: one of INPUT_NORMALISATIONS: 'tensorflow' turns images
      normalised by ImageNet's means and deviations into (x - 127) / 128 of
      their 8-bit values x, which the published weights were trained with;
      'imagenet' takes them as they are.
    drop_path_rate: stochastic depth; of n blocks the i-th, from 0, has
      drop_path_rate * i / n as published.
    dtype: dtype of the computation; parameters and statistics are float32.
    axis_name: axis over which the batch is spread, None if it is global.
    remat: what of a block is computed again for its gradient, a key of
      `layers.REMATS`.
  """

  stage_sizes: tuple[int, ...]
  stage_channels: tuple[int, ...]
  tokens: str = 'stride16'
  batch_statistics: str = 'synchronised'
  input_normalisation: str = 'tensorflow'
  drop_path_rate: float = 0.0
  dtype: jnp.dtype = jnp.float32
  axis_name: str | None = None
  remat: str = 'none'

  @property
  def depth(self) -> int:
    """Number of blocks."""
    return sum(self.stage_sizes)

  @property
  def block_names(self) -> tuple[str, ...]:
    """Names of the blocks' parameters in the order of computation."""
    return tuple(f'block_{index}' for index in range(self.depth))

  @property
  def layer_names(self) -> tuple[str, ...]:
    """`block_names` and what has parameters after them."""
    return (*self.block_names, 'conv_head', 'bn_head')

  @property
  def token_layer_names(self) -> tuple[str, ...]:
    """Those of `layer_names` that the tokens are made by."""
    if self.tokens == 'stride32':
      return self.layer_names
    last = max(i for i, stride in enumerate(STRIDES) if stride > 1)
    return self.block_names[: sum(self.stage_sizes[:last])]

  @nn.compact
  def stages(
    self,
    images: jax.Array,
    drop_path_uniforms: jax.Array | None = None,
    train: bool = False,
  ) -> tuple[jax.Array, ...]:
    """The last feature map of every size.

    Args:
      images: [B, H, W, 3] normalised by ImageNet's means and deviations.
      drop_path_uniforms: [B, depth, 2] draws from [0, 1), the first of which
        decides whether a block's branch is kept; None turns it off.
      train: normalises by the batch's statistics and updates the running ones,
        unless they are frozen.

    Returns:
      Five [B, h, w, C] in the dtype of the computation; the sides are those of
      the images divided by 2, 4, 8, 16 and 32, rounded up. The last one has
      been through the head.
    """
    by_batch = train and self.batch_statistics == 'synchronised'

    def activate(y, name):
      norm = BatchNorm(
        self.axis_name, epsilon=EPSILON, dtype=self.dtype, name=name
      )
      return nn.relu6(norm(y, by_batch))

    if self.input_normalisation == 'tensorflow':
      images = _as_in_tensorflow(images)
    x = nn.Conv(
      STEM_CHANNELS,
      (3, 3),
      strides=2,
      padding='SAME',
      use_bias=False,
      dtype=self.dtype,
      kernel_init=_conv_init,
      name='conv_stem',
    )(images)
    x = activate(x, 'bn_stem')
    block = rematerialised(Block, self.remat, (3,)) if train else Block
    outputs = []
    index = 0
    for stage, size in enumerate(self.stage_sizes):
      if STRIDES[stage] > 1:
        outputs.append(x)
      for first in [True] + [False] * (size - 1):
        uniforms = drop_path_uniforms
        x = block(
          channels=self.stage_channels[stage],
          kernel_px=KERNELS_PX[stage],
          stride=STRIDES[stage] if first else 1,
          expansion=EXPANSIONS[stage],
          drop_path_rate=self.drop_path_rate * index / self.depth,
          dtype=self.dtype,
          axis_name=self.axis_name,
          name=f'block_{index}',
        )(x, None if uniforms is None else uniforms[:, index, 0], by_batch)
        index += 1
    x = _pointwise(HEAD_CHANNELS, self.dtype, 'conv_head')(x)
    return (*outputs, activate(x, 'bn_head'))

  def __call__(
    self,
    images: jax.Array,
    drop_path_uniforms: jax.Array | None = None,
    train: bool = False,
  ) -> EncoderOutput:
    """Encodes a batch of images.

    Args:
      images: [B, H, W, 3] normalised by ImageNet's means and deviations.
      drop_path_uniforms: see `stages`.
      train: see `stages`.

    Returns:
      The mean over the head's positions, as the published classifier sees it,
      and the tokens, whose width is another where they are of 'stride16'.
    """
    maps = self.stages(images, drop_path_uniforms, train)
    head = maps[-1].astype(wide(maps[-1].dtype))
    tokens = head if self.tokens == 'stride32' else maps[-2]
    tokens = tokens.reshape(len(tokens), -1, tokens.shape[-1])
    return EncoderOutput(head.mean((1, 2)), tokens.astype(head.dtype), None)


def _as_in_tensorflow(images: jax.Array) -> jax.Array:
  """[B, H, W, 3] normalised by ImageNet's statistics -> (x - 127) / 128.

  Before the stem, not folded into it: its padding is 0 after this.
  """
  mean, std = (jnp.asarray(x, images.dtype) for x in _IMAGENET)
  mean_of_weights, std_of_weights = _TENSORFLOW
  return (images * std + (mean - mean_of_weights)) / std_of_weights


# Blocks and width of each stage. The lite ones are the published scalings of
# lite0: in depth 1.1 and 1.2, in width 1 and 1.1 rounded to multiples of 8. Mu
# is ours: the smallest that learns something on a laptop.
VARIANTS = {
  'Mu': ((1, 1, 1, 1, 1, 1, 1), (8, 12, 16, 24, 32, 48, 64)),
  'lite0': ((1, 2, 2, 3, 3, 4, 1), (16, 24, 40, 80, 112, 192, 320)),
  'lite1': ((1, 3, 3, 4, 4, 5, 1), (16, 24, 40, 80, 112, 192, 320)),
  'lite2': ((1, 3, 3, 4, 4, 5, 1), (16, 24, 48, 88, 120, 208, 352)),
}


def make_efficientnet(
  *,
  variant: str = 'lite0',
  width_ratio: float = 1.0,
  tokens: str = 'stride16',
  batch_statistics: str = 'synchronised',
  input_normalisation: str = 'tensorflow',
  drop_path_rate: float = 0.2,
  dtype: str = 'float32',
  remat: str = 'none',
  axis_name: str | None = None,
) -> EfficientNet:
  """Builds an EfficientNet-Lite from a preset.

  Args:
    variant: a key of VARIANTS.
    width_ratio: multiplies the channels of the stages, rounded down; the stem
      and the head keep theirs.
    tokens: one of TOKENS, see `EfficientNet`.
    batch_statistics: one of BATCH_STATISTICS, see `EfficientNet`.
    input_normalisation: one of INPUT_NORMALISATIONS, see `EfficientNet`.
    drop_path_rate: rate towards which stochastic depth rises; 0.2 as published.
    dtype: dtype of the computation, 'float32' or 'bfloat16'.
    remat: key of `layers.REMATS`.
    axis_name: axis over which the batch is spread, None if it is global.

  Raises:
    UserError: an unknown choice, a rate outside [0, 1), or a width that leaves
      no channel.
  """
  check_choice('variant', variant, VARIANTS)
  check_choice('tokens', tokens, TOKENS)
  check_choice('batch_statistics', batch_statistics, BATCH_STATISTICS)
  check_choice('input_normalisation', input_normalisation, INPUT_NORMALISATIONS)
  check_choice('dtype', dtype, DTYPES)
  check_choice('remat', remat, REMATS)
  check_drop_path_rate(drop_path_rate)
  stage_sizes, channels = VARIANTS[variant]
  if int(channels[0] * width_ratio) < 1:
    raise UserError(
      f'config.model.width_ratio is {width_ratio}, which leaves no channel of '
      f'the {channels[0]} of variant {variant}: use at least 1/{channels[0]}'
    )
  return EfficientNet(
    stage_sizes=stage_sizes,
    stage_channels=tuple(int(width * width_ratio) for width in channels),
    tokens=tokens,
    batch_statistics=batch_statistics,
    input_normalisation=input_normalisation,
    drop_path_rate=drop_path_rate,
    dtype=DTYPES[dtype],
    axis_name=axis_name,
    remat=remat,
  )
