"""Vision transformer encoder, pre-norm, as in DINO's vision_transformer.py.

With layer scale and registers it is DINOv2's, with rotary positions DINOv3's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cmd_jax.errors import UserError
from cmd_jax.models.attention import (
  Attention,
  cudnn_serves,
  keeps_heads_apart,
)
from cmd_jax.models.layers import (
  DTYPES,
  GELUS,
  REMATS,
  Dense,
  EncoderOutput,
  LayerScale,
  Mlp,
  SwiGlu,
  check_choice,
  check_drop_path_rate,
  drop_path,
  drop_path_rates,
  linear_init,
  rematerialised,
  torch_default_init,
  wide,
)
from cmd_jax.models.positions import (
  INTERPOLATIONS,
  interpolate_positions,
  rotary_turn,
)


class Block(nn.Module):
  """Pre-norm transformer block with stochastic depth on both branches."""

  num_heads: int
  hidden_dim: int
  ffn: str
  layer_scale: float
  norm_epsilon: float
  drop_path_rate: float
  dtype: jnp.dtype
  fused: bool = False
  gelu: str = 'exact'
  apart: bool = False

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    uniforms: jax.Array | None,
    turn: tuple[np.ndarray, np.ndarray] | None,
  ) -> tuple[jax.Array, jax.Array]:
    """[B, M, D], uniforms [B, 2] or None -> ([B, M, D], [B, heads, M, M])."""

    def branch(y, which):
      if self.layer_scale:
        y = LayerScale(self.layer_scale, name=f'ls{which + 1}')(y)
      if uniforms is None or not self.drop_path_rate:
        return y
      return drop_path(y, self.drop_path_rate, uniforms[:, which])

    def norm(name):
      return nn.LayerNorm(self.norm_epsilon, dtype=self.dtype, name=name)

    attention = Attention(
      self.num_heads, self.dtype, self.fused, self.apart, name='attn'
    )
    attended, weights = attention(norm('norm1')(x), turn)
    x = x + branch(attended, 0)
    if self.ffn == 'swiglu':
      mlp = SwiGlu(self.hidden_dim, self.dtype, name='mlp')
    else:
      mlp = Mlp(self.hidden_dim, self.dtype, self.gelu, name='mlp')
    return x + branch(mlp(norm('norm2')(x)), 1), weights


class VisionTransformer(nn.Module):
  """ViT for images of any size that patches tile.

  Attributes:
    image_px: side of the images whose grid the position embeddings have.
    patch_px: side of a patch.
    patch_stride_px: distance of neighbouring patches; below `patch_px` they
      overlap (Amir et al. 2021). No parameter depends on it.
    width: D, dimension of the tokens.
    depth: number of blocks.
    num_heads: attention heads of a block.
    hidden_dim: hidden dimension of a block's feed-forward layers.
    ffn: 'mlp', or 'swiglu' of DINOv2's and DINOv3's largest models.
    positions: 'learned' embeddings, or 'rotary' (DINOv3).
    interpolation: how they meet another grid, of `positions.INTERPOLATIONS`.
    num_registers: tokens beside the class token that stand for no patch.
    layer_scale: initial value of the layer scale; 0 for none.
    norm_epsilon: epsilon of the layer normalisations.
    drop_path_rate: rate of the last block; it rises linearly from 0.
    pool: 'cls' takes the class token as the image embedding (DINO), 'mean'
      the mean of the patch tokens; 'cls' needs `class_token`.
    dtype: dtype of the computation; parameters are float32.
    remat: what a block computes again for its gradient, of `layers.REMATS`.
    class_token: without one, attention is what a patch receives on average.
    gelu: of the MLPs, a key of `layers.GELUS`.
    channels: C of the images.
    device: where it is trained, see `make_encoder`.
  """

  image_px: int
  patch_px: int
  patch_stride_px: int
  width: int
  depth: int
  num_heads: int
  hidden_dim: int
  ffn: str
  positions: str
  interpolation: str
  num_registers: int
  layer_scale: float
  norm_epsilon: float
  drop_path_rate: float
  pool: str
  dtype: jnp.dtype
  remat: str = 'none'
  class_token: bool = True
  gelu: str = 'exact'
  channels: int = 3
  device: jax.Device | None = None

  @property
  def num_prefix(self) -> int:
    """Number of tokens that stand for no patch, before those that do."""
    return self.class_token + self.num_registers

  @property
  def block_names(self) -> tuple[str, ...]:
    """Names of the blocks' parameters in the order of computation."""
    return tuple(f'block_{index}' for index in range(self.depth))

  @property
  def layer_names(self) -> tuple[str, ...]:
    """`block_names` and what comes after or between the blocks."""
    return (*self.block_names, 'norm')

  def grid(self, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of patches of an image; an incomplete patch is cut."""
    rows, columns = (
      (side - self.patch_px) // self.patch_stride_px + 1
      for side in (height, width)
    )
    return rows, columns

  def _patches(self, images: jax.Array, rows: int, columns: int) -> jax.Array:
    """[B, H, W, C] -> [B, N, patch_px^2 C], row by row."""
    batch, patch_px = len(images), self.patch_px
    if self.patch_stride_px == patch_px:
      x = images[:, : rows * patch_px, : columns * patch_px]
      x = x.reshape(batch, rows, patch_px, columns, patch_px, -1)
    else:
      x = images
      for axis, count in ((1, rows), (3, columns)):
        first = np.arange(count)[:, None] * self.patch_stride_px
        x = jnp.take(x, first + np.arange(patch_px), axis)
    return x.swapaxes(2, 3).reshape(batch, rows * columns, -1)

  def _embed(self, images: jax.Array, rows: int, columns: int) -> jax.Array:
    """Class token, registers and patches, [B, num_prefix + N, D]."""
    x = self._patches(images.astype(self.dtype), rows, columns)
    init = torch_default_init(x.shape[-1])
    x = Dense(
      self.width,
      kernel_init=init,
      bias_init=init,
      dtype=self.dtype,
      name='patch_embed',
    )(x)
    prefix = []
    if self.class_token:
      prefix += [self.param('cls_token', linear_init, (1, 1, self.width))]
    if self.positions == 'learned':
      count = (self.image_px // self.patch_px) ** 2 + self.class_token
      shape = (1, count, self.width)
      positions = self.param('pos_embed', linear_init, shape)
      if prefix:
        prefix = [prefix[0] + positions[:, :1]]
      positions = interpolate_positions(
        positions[:, len(prefix) :], (rows, columns), self.interpolation
      )
      x = x + positions.astype(self.dtype)
    if self.num_registers:
      shape = (1, self.num_registers, self.width)
      prefix += [self.param('reg_token', linear_init, shape)]
    if not prefix:
      return x
    prefix = jnp.concatenate(prefix, axis=1)
    prefix = jnp.broadcast_to(prefix, (len(x), *prefix.shape[1:]))
    return jnp.concatenate([prefix.astype(self.dtype), x], axis=1)

  @nn.compact
  def __call__(
    self,
    images: jax.Array,
    drop_path_uniforms: jax.Array | None = None,
    train: bool = False,
  ) -> EncoderOutput:
    """Encodes a batch of images.

    Args:
      images: [B, H, W, 3] normalised.
      drop_path_uniforms: [B, depth, 2] draws from [0, 1) that decide which
        residual branches are dropped; None keeps them all.
      train: rematerialises and, on GPUs that have it, uses cuDNN's attention;
        without, the results are the same to rounding on every device.

    Returns:
      The embeddings.
    """
    rows, columns = self.grid(*images.shape[1:3])
    x = self._embed(images, rows, columns)
    turn, head_dim = None, self.width // self.num_heads
    if self.positions == 'rotary':
      turn = rotary_turn(rows, columns, head_dim)
    block = rematerialised(Block, self.remat) if train else Block
    fused = train and cudnn_serves(self.dtype, head_dim, self.device)
    rates = drop_path_rates(self.drop_path_rate, self.depth)
    for index, rate in enumerate(rates):
      uniforms = drop_path_uniforms
      x, attention = block(
        self.num_heads,
        self.hidden_dim,
        self.ffn,
        self.layer_scale,
        self.norm_epsilon,
        rate,
        self.dtype,
        fused,
        self.gelu,
        keeps_heads_apart(self.device),
        name=f'block_{index}',
      )(x, None if uniforms is None else uniforms[:, index], turn)
    x = nn.LayerNorm(self.norm_epsilon, dtype=wide(x.dtype), name='norm')(x)
    tokens = x[:, self.num_prefix :]
    image = x[:, 0] if self.pool == 'cls' else tokens.mean(1)
    if self.class_token:
      attention = attention[:, :, 0, self.num_prefix :]
    else:
      attention = attention[..., self.num_prefix :].mean(2)
    return EncoderOutput(image, tokens, attention)


def encode_with_keys(
  encoder: VisionTransformer, variables: Mapping[str, Any], images: jax.Array
) -> tuple[EncoderOutput, jax.Array]:
  """Encodes images and gives the keys of the last block too, in one pass.

  Args:
    encoder: a ViT; with a smaller stride than it was trained with, it is
      `encoder.clone(patch_stride_px=...)`.
    variables: of the encoder.
    images: [B, H, W, 3] normalised.

  Returns:
    The embeddings, and the keys of the patches, [B, N, heads, D / heads].
  """
  output, state = encoder.apply(variables, images, mutable=['intermediates'])
  last = state['intermediates'][encoder.block_names[-1]]
  (keys,) = last['attn']['keys']
  return output, keys[:, encoder.num_prefix :]


# width, depth, heads (Touvron et al. 2021, Table 1; Dosovitskiy et al. 2021).
# Mu is ours: the smallest that learns something on a laptop.
VARIANTS = {
  'Mu': (96, 4, 3),
  'Ti': (192, 12, 3),
  'S': (384, 12, 6),
  'B': (768, 12, 12),
  'L': (1024, 24, 16),
  'g': (1536, 40, 24),
}
POOLS = ('cls', 'mean')
FFNS = ('mlp', 'swiglu')
POSITIONS = ('learned', 'rotary')


def make_vit(
  *,
  variant: str = 'S',
  image_px: int = 224,
  patch_px: int = 16,
  patch_stride_px: int | None = None,
  width: int | None = None,
  depth: int | None = None,
  num_heads: int | None = None,
  mlp_ratio: float = 4.0,
  ffn: str = 'mlp',
  positions: str = 'learned',
  interpolation: str = 'dino',
  num_registers: int = 0,
  layer_scale: float = 0.0,
  norm_epsilon: float = 1e-6,
  drop_path_rate: float = 0.1,
  pool: str = 'cls',
  dtype: str = 'float32',
  remat: str = 'none',
  class_token: bool = True,
  gelu: str = 'exact',
  channels: int = 3,
) -> VisionTransformer:
  """Builds a ViT from a preset; width, depth and num_heads override it.

  `patch_stride_px` is `patch_px` unless it is given. `mlp_ratio` is the hidden
  dimension of a block's MLP over its width; that of 'swiglu' is two thirds of
  it, rounded up to a multiple of 8 (DINOv2).

  Raises:
    UserError: an unknown choice, a width that the heads cannot share, an image
      size that patches do not tile, a stride or rate out of range, or pool
      'cls' without a class token.
  """
  for field, value, choices in (
    ('variant', variant, VARIANTS),
    ('ffn', ffn, FFNS),
    ('positions', positions, POSITIONS),
    ('interpolation', interpolation, INTERPOLATIONS),
    ('pool', pool, POOLS),
    ('dtype', dtype, DTYPES),
    ('remat', remat, REMATS),
    ('gelu', gelu, GELUS),
  ):
    check_choice(field, value, choices)
  check_drop_path_rate(drop_path_rate)
  if pool == 'cls' and not class_token:
    raise UserError(
      "config.model.pool is 'cls', which needs class_token=true: use 'mean'"
    )
  preset = VARIANTS[variant]
  width, depth, num_heads = (
    given or default
    for given, default in zip((width, depth, num_heads), preset, strict=True)
  )
  if width % num_heads:
    raise UserError(
      f'config.model.width is {width}, not divisible by num_heads {num_heads}'
    )
  if positions == 'rotary' and width // num_heads % 4:
    raise UserError(
      f'config.model.positions is rotary, which needs heads of a multiple of 4 '
      f'channels, not {width // num_heads}: change width or num_heads'
    )
  if image_px % patch_px:
    raise UserError(
      f'config.model.image_px is {image_px}, not divisible by patch_px '
      f'{patch_px}'
    )
  if patch_stride_px is None:
    patch_stride_px = patch_px
  if not 0 < patch_stride_px <= patch_px:
    raise UserError(
      f'patch_stride_px is {patch_stride_px}: it must be from 1 '
      f'to patch_px {patch_px}'
    )
  hidden_dim = int(width * mlp_ratio)
  if ffn == 'swiglu':
    hidden_dim = -(-int(hidden_dim * 2 / 3) // 8) * 8
  return VisionTransformer(
    image_px=image_px,
    patch_px=patch_px,
    patch_stride_px=patch_stride_px,
    width=width,
    depth=depth,
    num_heads=num_heads,
    hidden_dim=hidden_dim,
    ffn=ffn,
    positions=positions,
    interpolation=interpolation,
    num_registers=num_registers,
    layer_scale=layer_scale,
    norm_epsilon=norm_epsilon,
    drop_path_rate=drop_path_rate,
    pool=pool,
    dtype=DTYPES[dtype],
    remat=remat,
    class_token=class_token,
    gelu=gelu,
    channels=channels,
  )
