"""Swin transformer encoder (Liu et al. 2021), as in EsViT's release.

The file there is models/swin_transformer.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from cmd_jax.errors import UserError
from cmd_jax.models.layers import (
  DTYPES,
  REMATS,
  Dense,
  EncoderOutput,
  Mlp,
  check_choice,
  check_drop_path_rate,
  drop_path,
  drop_path_rates,
  linear_init,
  rematerialised,
  torch_default_init,
  wide,
)
from cmd_jax.models.windows import (
  inside,
  merge,
  pad,
  partition,
  received_attention,
  relative_position_index,
  shift_mask,
)


class WindowAttention(nn.Module):
  """Multi-head self-attention within (shifted) windows, with its weights.

  softmax(q k^T / sqrt(d) + bias - 100 [kept apart]) v, the bias looked up by
  relative position (Liu et al. 2021, Eq. 4; EsViT's `WindowAttention`). Maps
  that the windows do not tile are padded with zeros at the right and the
  bottom; the padding takes part as any other position.

  Attributes:
    num_heads: attention heads.
    window: side of a window.
    shift: how far the map is shifted cyclically first.
    dtype: dtype of the computation; the softmax is float32.
  """

  num_heads: int
  window: int
  shift: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[B, H, W, D] -> ([B, H, W, D], weights [B, windows, heads, w^2, w^2])."""
    batch, rows, columns, dim = x.shape
    window, shift, heads = self.window, self.shift, self.num_heads
    height, width = (-(-side // window) * window for side in (rows, columns))
    project = Dense(3 * dim, dtype=self.dtype, name='qkv')
    qkv = project(x)
    if (height, width) != (rows, columns):
      # All padding is projected alike, so once is enough: a 3 x 3 map in a
      # window of 7 would cost five times its own projection.
      blank = project(jnp.zeros((1, dim), x.dtype))
      is_real = inside(rows, columns, height, width)
      qkv = jnp.where(is_real[..., None], pad(qkv, height, width), blank)
    if shift:
      qkv = jnp.roll(qkv, (-shift, -shift), axis=(1, 2))
    qkv = partition(qkv, window)
    qkv = qkv.reshape(*qkv.shape[:3], 3, heads, dim // heads)
    query, key, value = jnp.moveaxis(qkv, 3, 0)
    logits = jnp.einsum('bwqhd,bwkhd->bwhqk', query, key)
    logits = (logits * query.shape[-1] ** -0.5).astype(wide(self.dtype))
    shape = ((2 * window - 1) ** 2, heads)
    table = self.param('relative_position_bias_table', linear_init, shape)
    logits += jnp.moveaxis(table[relative_position_index(window)], 2, 0)
    if shift:
      apart = shift_mask(height, width, window, shift)
      logits = jnp.where(apart[:, None], logits - 100, logits)
    weights = nn.softmax(logits)
    y = jnp.einsum('bwhqk,bwkhd->bwqhd', weights.astype(self.dtype), value)
    y = merge(y.reshape(*y.shape[:3], dim), height, width)
    if shift:
      y = jnp.roll(y, (shift, shift), axis=(1, 2))
    y = y[:, :rows, :columns]
    return Dense(dim, dtype=self.dtype, name='proj')(y), weights


class Block(nn.Module):
  """Pre-norm window attention and MLP with stochastic depth on both."""

  num_heads: int
  window: int
  shift: int
  hidden_dim: int
  norm_epsilon: float
  drop_path_rate: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, x: jax.Array, uniforms: jax.Array | None
  ) -> tuple[jax.Array, jax.Array]:
    """[B, H, W, D], uniforms [B, 2] or None -> (the same, the weights)."""

    def branch(y, which):
      if uniforms is None or not self.drop_path_rate:
        return y
      return drop_path(y, self.drop_path_rate, uniforms[:, which])

    def norm(name):
      return nn.LayerNorm(self.norm_epsilon, dtype=self.dtype, name=name)

    attention = WindowAttention(
      self.num_heads, self.window, self.shift, self.dtype, name='attn'
    )
    attended, weights = attention(norm('norm1')(x))
    x = x + branch(attended, 0)
    mlp = Mlp(self.hidden_dim, self.dtype, name='mlp')
    return x + branch(mlp(norm('norm2')(x)), 1), weights


class PatchMerging(nn.Module):
  """Joins 2 x 2 tokens into one of twice the width (EsViT's `PatchMerging`).

  The channels are those of (even row, even column), (odd, even), (even, odd),
  (odd, odd); an odd map is padded with zeros at the right and the bottom.
  """

  norm_epsilon: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, H, W, D] -> [B, ceil(H / 2), ceil(W / 2), 2 D]."""
    batch, rows, columns, dim = x.shape
    rows, columns = -(-rows // 2), -(-columns // 2)
    x = pad(x, 2 * rows, 2 * columns).reshape(batch, rows, 2, columns, 2, dim)
    x = x.transpose(0, 1, 3, 4, 2, 5).reshape(batch, rows, columns, 4 * dim)
    x = nn.LayerNorm(self.norm_epsilon, dtype=self.dtype, name='norm')(x)
    return Dense(2 * dim, use_bias=False, dtype=self.dtype, name='reduction')(x)


class SwinTransformer(nn.Module):
  """Swin without class token or absolute positions, for images of any size.

  The windows are those of the images it is built for, whatever it is given: a
  stage whose map fits into a window there has one window of that size and no
  shift. Pixels beyond the last whole patch are cut off.

  Attributes:
    image_px: side of the images that it is built for.
    patch_px: side of a patch.
    window: side of a window in tokens.
    width: dimension of the tokens of the first stage; every stage doubles it.
    depths: number of blocks of each stage.
    num_heads: attention heads of the blocks of each stage.
    mlp_ratio: hidden dimension of a block's MLP over the width of its tokens.
    norm_epsilon: epsilon of the layer normalisations.
    drop_path_rate: rate of the last block; it rises linearly from 0.
    dtype: dtype of the computation; parameters are float32.
    remat: what of a block is computed again for its gradient, a key of
      `layers.REMATS`.
  """

  image_px: int
  patch_px: int
  window: int
  width: int
  depths: tuple[int, ...]
  num_heads: tuple[int, ...]
  mlp_ratio: float
  norm_epsilon: float
  drop_path_rate: float
  dtype: jnp.dtype
  remat: str = 'none'

  @property
  def depth(self) -> int:
    """Number of blocks of all stages."""
    return sum(self.depths)

  @property
  def layer_names(self) -> tuple[str, ...]:
    """Names of parameters in the order of computation, from the first block."""
    names = []
    for stage, depth in enumerate(self.depths):
      names += [f'stage_{stage}_merge'] * (stage > 0)
      names += [f'stage_{stage}_block_{index}' for index in range(depth)]
    return (*names, 'norm')

  @property
  def block_names(self) -> tuple[str, ...]:
    """Those of `layer_names` that are blocks."""
    return tuple(name for name in self.layer_names if '_block_' in name)

  def window_and_shift(self, stage: int, block: int) -> tuple[int, int]:
    """Side of the windows of a block, and how far they are shifted."""
    side = self.image_px // self.patch_px // 2**stage
    if side <= self.window:
      return side, 0
    return self.window, self.window // 2 * (block % 2)

  def _embed(self, images: jax.Array) -> jax.Array:
    """Normalised patches, [B, H, W, width]."""
    batch, patch_px = len(images), self.patch_px
    rows, columns = (side // patch_px for side in images.shape[1:3])
    x = images[:, : rows * patch_px, : columns * patch_px].astype(self.dtype)
    x = x.reshape(batch, rows, patch_px, columns, patch_px, 3).swapaxes(2, 3)
    x = x.reshape(batch, rows, columns, -1)
    init = torch_default_init(x.shape[-1])
    x = Dense(
      self.width,
      kernel_init=init,
      bias_init=init,
      dtype=self.dtype,
      name='patch_embed',
    )(x)
    return nn.LayerNorm(self.norm_epsilon, dtype=self.dtype, name='patch_norm')(
      x
    )

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
      train: rematerialises; makes no difference to the results.

    Returns:
      The embeddings: that of the image is the mean of the regions' and the
      attention is `received_attention` of the last block.
    """
    x = self._embed(images)
    block_class = rematerialised(Block, self.remat) if train else Block
    rates = drop_path_rates(self.drop_path_rate, self.depth)
    index = 0
    for stage, (depth, heads) in enumerate(
      zip(self.depths, self.num_heads, strict=True)
    ):
      if stage:
        name = f'stage_{stage}_merge'
        x = PatchMerging(self.norm_epsilon, self.dtype, name=name)(x)
      for block in range(depth):
        window, shift = self.window_and_shift(stage, block)
        uniforms = drop_path_uniforms
        x, weights = block_class(
          heads,
          window,
          shift,
          int(x.shape[-1] * self.mlp_ratio),
          self.norm_epsilon,
          rates[index],
          self.dtype,
          name=f'stage_{stage}_block_{block}',
        )(x, None if uniforms is None else uniforms[:, index])
        index += 1
    x = nn.LayerNorm(self.norm_epsilon, dtype=wide(x.dtype), name='norm')(x)
    batch, rows, columns, dim = x.shape
    tokens = x.reshape(batch, rows * columns, dim)
    attention = received_attention(weights, rows, columns, shift)
    return EncoderOutput(tokens.mean(1), tokens, attention)


# width, depths, heads (Liu et al. 2021, section 3.3, and the released configs).
# Mu is ours: one that a laptop trains.
VARIANTS = {
  'Mu': (32, (2, 2), (2, 4)),
  'T': (96, (2, 2, 6, 2), (3, 6, 12, 24)),
  'S': (96, (2, 2, 18, 2), (3, 6, 12, 24)),
  'B': (128, (2, 2, 18, 2), (4, 8, 16, 32)),
}


def _check(
  image_px: int,
  patch_px: int,
  window: int,
  width: int,
  depths: tuple[int, ...],
  num_heads: tuple[int, ...],
) -> None:
  """Raises UserError unless the sizes fit together."""
  if len(depths) != len(num_heads):
    raise UserError(
      f'config.model.depths {depths} has {len(depths)} stages, num_heads '
      f'{num_heads} has {len(num_heads)}: give one number for every stage in '
      'both'
    )
  for field, values in (
    ('patch_px', (patch_px,)),
    ('window', (window,)),
    ('depths', depths),
    ('num_heads', num_heads),
  ):
    if min(values) < 1:
      raise UserError(
        f'config.model.{field} has {min(values)}: it must be at least 1'
      )
  for stage, heads in enumerate(num_heads):
    if width * 2**stage % heads:
      raise UserError(
        f'config.model.width is {width}, so {width * 2**stage} in stage '
        f'{stage}, not divisible by its {heads} heads: change width or '
        'num_heads'
      )
  if image_px % patch_px:
    raise UserError(
      f'config.model.image_px is {image_px}, not divisible by patch_px '
      f'{patch_px}'
    )
  side = patch_px * 2 ** (len(depths) - 1)
  if image_px < side:
    raise UserError(
      f'config.model.image_px is {image_px}: {len(depths)} stages with patches '
      f'of {patch_px} need at least {side}'
    )


def make_swin(
  *,
  variant: str = 'T',
  image_px: int = 224,
  patch_px: int = 4,
  window: int = 7,
  width: int | None = None,
  depths: Sequence[int] | None = None,
  num_heads: Sequence[int] | None = None,
  mlp_ratio: float = 4.0,
  norm_epsilon: float = 1e-6,
  drop_path_rate: float = 0.1,
  dtype: str = 'float32',
  remat: str = 'none',
) -> SwinTransformer:
  """Builds a Swin from a preset; width, depths and num_heads override it.

  None or an empty sequence leaves the preset's value.

  Raises:
    UserError: an unknown choice, depths and heads of different lengths, a width
      that the heads of a stage cannot share, an image size that patches do not
      tile or that is too small for the stages, or a number out of range.
  """
  check_choice('variant', variant, VARIANTS)
  check_choice('dtype', dtype, DTYPES)
  check_choice('remat', remat, REMATS)
  check_drop_path_rate(drop_path_rate)
  preset = VARIANTS[variant]
  width = width or preset[0]
  depths = tuple(depths or preset[1])
  num_heads = tuple(num_heads or preset[2])
  _check(image_px, patch_px, window, width, depths, num_heads)
  return SwinTransformer(
    image_px=image_px,
    patch_px=patch_px,
    window=window,
    width=width,
    depths=depths,
    num_heads=num_heads,
    mlp_ratio=mlp_ratio,
    norm_epsilon=norm_epsilon,
    drop_path_rate=drop_path_rate,
    dtype=DTYPES[dtype],
    remat=remat,
  )
