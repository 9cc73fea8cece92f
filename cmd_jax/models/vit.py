"""Vision transformer encoder, pre-norm, as in DINO's vision_transformer.py."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cmd_jax.errors import UserError
from cmd_jax.models.layers import Dense, gelu, linear_init, torch_default_init


class EncoderOutput(NamedTuple):
  """What an encoder says of a batch of images.

  Attributes:
    image: [B, D] float32 embedding of the image.
    tokens: [B, N, D] float32 patch tokens, row by row.
    attention: [B, heads, N] float32 attention of the class token to the
      patches in the last block.
  """

  image: jax.Array
  tokens: jax.Array
  attention: jax.Array


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
  x = np.abs(x)
  near = (a + 2) * x**3 - (a + 3) * x**2 + 1
  far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
  return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def bicubic_matrix(old: int, new: int, scale: float) -> np.ndarray:
  """Weights [new, old] of torch's bicubic interpolation without antialiasing.

  A = -0.75, border samples clamped, source coordinate (i + 0.5) / scale - 0.5.
  """
  centre = (np.arange(new) + 0.5) / scale - 0.5
  first = np.floor(centre).astype(int) - 1
  matrix = np.zeros((new, old))
  for tap in range(4):
    column = np.clip(first + tap, 0, old - 1)
    weight = _cubic(centre - (first + tap), a=-0.75)
    np.add.at(matrix, (np.arange(new), column), weight)
  return matrix.astype(np.float32)


def interpolate_positions(
  positions: jax.Array, grid: tuple[int, int]
) -> jax.Array:
  """Resizes patch position embeddings to another grid.

  DINO's `interpolate_pos_encoding`: one scale sqrt(new count / old count) for
  both axes; an equal count leaves the embeddings untouched.

  Args:
    positions: [1, N, D] embeddings of a square grid.
    grid: rows and columns wanted.

  Returns:
    [1, rows * columns, D].
  """
  rows, columns = grid
  _, count, dim = positions.shape
  if rows * columns == count:
    return positions
  old = int(round(count**0.5))
  scale = (rows * columns / count) ** 0.5
  square = positions.reshape(old, old, dim)
  resized = jnp.einsum(
    'yh,xw,hwd->yxd',
    bicubic_matrix(old, rows, scale),
    bicubic_matrix(old, columns, scale),
    square,
    precision='highest',
  )
  return resized.reshape(1, rows * columns, dim)


def drop_path(x: jax.Array, rate: float, uniforms: jax.Array) -> jax.Array:
  """Drops whole residual branches: x / (1 - rate) * floor(1 - rate + u).

  Args:
    x: [B, N, D] output of a branch.
    rate: probability of dropping it.
    uniforms: [B] draws from [0, 1), one an example.
  """
  keep = jnp.floor(1 - rate + uniforms)[:, None, None]
  return x * (keep / (1 - rate)).astype(x.dtype)


class Attention(nn.Module):
  """Multi-head self-attention; returns the class token's attention as well."""

  num_heads: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[B, M, D] -> ([B, M, D], attention [B, heads, M] of token 0)."""
    batch, length, dim = x.shape
    qkv = Dense(3 * dim, dtype=self.dtype, name='qkv')(x)
    qkv = qkv.reshape(batch, length, 3, self.num_heads, dim // self.num_heads)
    query, key, value = jnp.moveaxis(qkv, 2, 0)
    logits = jnp.einsum('bqhd,bkhd->bhqk', query, key) * query.shape[-1] ** -0.5
    weights = nn.softmax(logits.astype(jnp.float32))
    y = jnp.einsum('bhqk,bkhd->bqhd', weights.astype(self.dtype), value)
    y = y.reshape(batch, length, dim)
    y = Dense(dim, dtype=self.dtype, name='proj')(y)
    return y, weights[:, :, 0]


class Mlp(nn.Module):
  """Two layers with an exact GELU between them."""

  hidden_dim: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., D] -> [..., D]."""
    dim = x.shape[-1]
    x = gelu(Dense(self.hidden_dim, dtype=self.dtype, name='fc1')(x))
    return Dense(dim, dtype=self.dtype, name='fc2')(x)


class Block(nn.Module):
  """Pre-norm transformer block with stochastic depth on both branches."""

  num_heads: int
  mlp_ratio: float
  drop_path_rate: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, x: jax.Array, uniforms: jax.Array | None
  ) -> tuple[jax.Array, jax.Array]:
    """[B, M, D], uniforms [B, 2] or None -> ([B, M, D], [B, heads, M])."""

    def branch(y, which):
      if uniforms is None or not self.drop_path_rate:
        return y
      return drop_path(y, self.drop_path_rate, uniforms[:, which])

    norm1 = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name='norm1')
    norm2 = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name='norm2')
    attended, weights = Attention(self.num_heads, self.dtype, name='attn')(
      norm1(x)
    )
    x = x + branch(attended, 0)
    hidden_dim = int(x.shape[-1] * self.mlp_ratio)
    mlp = Mlp(hidden_dim, self.dtype, name='mlp')
    return x + branch(mlp(norm2(x)), 1), weights


class VisionTransformer(nn.Module):
  """ViT with a class token, for images of any size divisible by the patch.

  Attributes:
    image_px: side of the images whose grid the position embeddings have.
    patch_px: side of a patch.
    width: D, dimension of the tokens.
    depth: number of blocks.
    num_heads: attention heads of a block.
    mlp_ratio: hidden dimension of a block's MLP over its width.
    drop_path_rate: rate of the last block; it rises linearly from 0.
    pool: 'cls' takes the class token as the image embedding (DINO), 'mean'
      the mean of the patch tokens.
    dtype: dtype of the computation; parameters are float32.
  """

  image_px: int
  patch_px: int
  width: int
  depth: int
  num_heads: int
  mlp_ratio: float
  drop_path_rate: float
  pool: str
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, images: jax.Array, drop_path_uniforms: jax.Array | None = None
  ) -> EncoderOutput:
    """Encodes a batch of images.

    Args:
      images: [B, H, W, 3] normalised.
      drop_path_uniforms: [B, depth, 2] draws from [0, 1) that decide which
        residual branches are dropped; None keeps them all.

    Returns:
      The embeddings.
    """
    batch, height, columns, _ = images.shape
    rows, columns = height // self.patch_px, columns // self.patch_px
    x = images.astype(self.dtype).reshape(
      batch, rows, self.patch_px, columns, self.patch_px, 3
    )
    x = x.swapaxes(2, 3).reshape(batch, rows * columns, -1)
    x = Dense(
      self.width,
      kernel_init=torch_default_init(x.shape[-1]),
      bias_init=torch_default_init(x.shape[-1]),
      dtype=self.dtype,
      name='patch_embed',
    )(x)

    count = (self.image_px // self.patch_px) ** 2
    cls_token = self.param('cls_token', linear_init, (1, 1, self.width))
    positions = self.param('pos_embed', linear_init, (1, count + 1, self.width))
    cls_token = cls_token + positions[:, :1]
    x = x + interpolate_positions(positions[:, 1:], (rows, columns)).astype(
      self.dtype
    )
    cls_token = jnp.broadcast_to(cls_token, (batch, 1, self.width))
    x = jnp.concatenate([cls_token.astype(self.dtype), x], axis=1)

    rates = np.linspace(0, self.drop_path_rate, self.depth)
    for index, rate in enumerate(rates):
      uniforms = (
        None if drop_path_uniforms is None else drop_path_uniforms[:, index]
      )
      x, attention = Block(
        self.num_heads,
        self.mlp_ratio,
        float(rate),
        self.dtype,
        name=f'block_{index}',
      )(x, uniforms)
    x = nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name='norm')(x)
    tokens = x[:, 1:]
    image = x[:, 0] if self.pool == 'cls' else tokens.mean(1)
    return EncoderOutput(image, tokens, attention[:, :, 1:])


# width, depth, heads (Touvron et al. 2021, Table 1; Dosovitskiy et al. 2021).
# Mu is ours: the smallest that learns something on a laptop.
VARIANTS = {
  'Mu': (96, 4, 3),
  'Ti': (192, 12, 3),
  'S': (384, 12, 6),
  'B': (768, 12, 12),
  'L': (1024, 24, 16),
}
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}
POOLS = ('cls', 'mean')


def _check(field: str, value, choices) -> None:
  if value not in choices:
    raise UserError(
      f'config.model.{field} is {value!r}: choose one of {", ".join(choices)}'
    )


def make_vit(
  *,
  variant: str = 'S',
  image_px: int = 224,
  patch_px: int = 16,
  width: int | None = None,
  depth: int | None = None,
  num_heads: int | None = None,
  mlp_ratio: float = 4.0,
  drop_path_rate: float = 0.1,
  pool: str = 'cls',
  dtype: str = 'float32',
) -> VisionTransformer:
  """Builds a ViT from a preset; width, depth and num_heads override it.

  Raises:
    UserError: unknown variant, pool or dtype, a width that the heads cannot
      share, an image size that patches do not tile, or a rate out of range.
  """
  _check('variant', variant, VARIANTS)
  _check('pool', pool, POOLS)
  _check('dtype', dtype, DTYPES)
  preset = VARIANTS[variant]
  width, depth, num_heads = (
    given or default
    for given, default in zip((width, depth, num_heads), preset, strict=True)
  )
  if width % num_heads:
    raise UserError(
      f'config.model.width is {width}, not divisible by num_heads {num_heads}'
    )
  if image_px % patch_px:
    raise UserError(
      f'config.model.image_px is {image_px}, not divisible by patch_px '
      f'{patch_px}'
    )
  if not 0 <= drop_path_rate < 1:
    raise UserError(
      f'config.model.drop_path_rate is {drop_path_rate}: it must be at least 0 '
      'and below 1'
    )
  return VisionTransformer(
    image_px=image_px,
    patch_px=patch_px,
    width=width,
    depth=depth,
    num_heads=num_heads,
    mlp_ratio=mlp_ratio,
    drop_path_rate=drop_path_rate,
    pool=pool,
    dtype=DTYPES[dtype],
  )
