"""Multi-head self-attention, and who computes it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cmd_jax.models.layers import Dense, wide
from cmd_jax.models.positions import rotate

# The largest head of cuDNN's fused attention on any GPU that has it.
_CUDNN_HEAD_DIM = 128


def cudnn_serves(
  dtype: jnp.dtype, head_dim: int, device: jax.Device | None = None
) -> bool:
  """Whether cuDNN's fused attention takes heads of this kind.

  It wants 16 bits, heads of a multiple of 8 channels and a GPU of NVIDIA's
  compute capability 8.0 or later (`jax.nn.dot_product_attention`).

  Args:
    dtype: dtype of the computation.
    head_dim: channels of a head.
    device: where it is computed; the first one here if it is left out. One
      that is only described is not served: cuDNN asks the device itself.
  """
  device = device or jax.local_devices()[0]
  if device.platform != 'gpu' or 'cuda' not in device.client.platform_version:
    return False
  capability = tuple(int(x) for x in device.compute_capability.split('.'))
  return (
    jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    and head_dim % 8 == 0
    and head_dim <= _CUDNN_HEAD_DIM
    and capability >= (8, 0)
  )


def _fused_attention(
  query: jax.Array, key: jax.Array, value: jax.Array
) -> jax.Array:
  """softmax(q k^T / sqrt(d)) v by cuDNN; [B, M, heads, d] each."""
  batch, length = query.shape[:2]
  lengths = None
  if length % 2:
    # JAX refuses the gradient for odd lengths, which a class token makes usual.
    query, key, value = (
      jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (query, key, value)
    )
    lengths = jnp.full(batch, length, jnp.int32)
  y = jax.nn.dot_product_attention(
    query,
    key,
    value,
    query_seq_lengths=lengths,
    key_value_seq_lengths=lengths,
    implementation='cudnn',
  )
  return y[:, :length]


class Attention(nn.Module):
  """Multi-head self-attention, with its weights.

  softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, Eq. 1).

  Attributes:
    num_heads: attention heads.
    dtype: dtype of the computation; the softmax is float32.
    fused: whether cuDNN computes the output, which then never holds the
      weights; they are computed apart and only where they are used.
  """

  num_heads: int
  dtype: jnp.dtype
  fused: bool = False

  @nn.compact
  def __call__(
    self, x: jax.Array, turn: tuple[np.ndarray, np.ndarray] | None
  ) -> tuple[jax.Array, jax.Array]:
    """[B, M, D] -> ([B, M, D], weights [B, heads, M, M]).

    Where 'intermediates' is mutable, `keys` [B, M, heads, d] are kept there.
    """
    batch, length, dim = x.shape
    qkv = Dense(3 * dim, dtype=self.dtype, name='qkv')(x)
    qkv = qkv.reshape(batch, length, 3, self.num_heads, dim // self.num_heads)
    query, key, value = jnp.moveaxis(qkv, 2, 0)
    self.sow('intermediates', 'keys', key)
    if turn is not None:
      query, key = rotate(query, turn), rotate(key, turn)
    logits = jnp.einsum('bqhd,bkhd->bhqk', query, key) * query.shape[-1] ** -0.5
    weights = nn.softmax(logits.astype(wide(self.dtype)))
    if self.fused:
      y = _fused_attention(query, key, value)
    else:
      y = jnp.einsum('bhqk,bkhd->bqhd', weights.astype(self.dtype), value)
    y = y.reshape(batch, length, dim)
    y = Dense(dim, dtype=self.dtype, name='proj')(y)
    return y, weights
