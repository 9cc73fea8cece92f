"""Multi-head self-attention, and who computes it.

Queries, keys and values are [B, heads, M, d]: that is how their products want
them. Two forms make them of the same packed parameters (benchmarks/README.md,
"The encoder on a TPU"). A TPU writes what a product over the tokens' channels
gives in any layout, but not once it is one matrix with the channels of all
heads: cutting that into heads of 64 are copies, forward and backward. On a CPU
one product of a matrix and cuts of its columns are faster.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cmd_jax.models.layers import linear_init, wide
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


def keeps_heads_apart(device: jax.Device | None = None) -> bool:
  """Whether products make and take heads, instead of matrices that are cut.

  Args:
    device: where it is computed; the first one here if it is left out.
  """
  return (device or jax.local_devices()[0]).platform == 'tpu'


def _fused_attention(
  query: jax.Array, key: jax.Array, value: jax.Array
) -> jax.Array:
  """softmax(q k^T / sqrt(d)) v by cuDNN; [B, heads, M, d] each."""
  query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
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
  return y[:, :length].swapaxes(1, 2)


class Heads(nn.Module):
  """A linear layer between tokens and heads, with the parameters of `Dense`.

  Attributes:
    num_heads: attention heads.
    dtype: dtype of the computation.
    apart: whether products make and take heads, see `keeps_heads_apart`.
  """

  num_heads: int
  dtype: jnp.dtype
  apart: bool

  def _parameters(
    self, inputs: int, outputs: int
  ) -> tuple[jax.Array, jax.Array]:
    """Kernel [inputs, outputs] and bias [outputs], in `dtype`."""
    kernel = self.param('kernel', linear_init, (inputs, outputs))
    bias = self.param('bias', nn.initializers.zeros, (outputs,))
    return kernel.astype(self.dtype), bias.astype(self.dtype)

  @nn.compact
  def split(self, x: jax.Array, count: int) -> tuple[jax.Array, ...]:
    """[B, M, D] -> `count` times [B, heads, M, D / heads]."""
    batch, length, dim = x.shape
    heads = (self.num_heads, dim // self.num_heads)
    kernel, bias = self._parameters(dim, count * dim)
    x = x.astype(self.dtype)
    if self.apart:
      kernel = kernel.reshape(dim, count, *heads)
      bias = bias.reshape(count, heads[0], 1, heads[1])
      return tuple(
        jnp.einsum('bmc,chd->bhmd', x, kernel[:, i]) + bias[i]
        for i in range(count)
      )
    # One matrix of all tokens, see `Dense`.
    flat = jnp.dot(x.reshape(-1, dim), kernel) + bias
    return tuple(
      y.reshape(batch, length, *heads).swapaxes(1, 2)
      for y in jnp.split(flat, count, axis=-1)
    )

  @nn.compact
  def join(self, x: jax.Array) -> jax.Array:
    """[B, heads, M, d] -> [B, M, heads d]."""
    batch, heads, length, channels = x.shape
    dim = heads * channels
    kernel, bias = self._parameters(dim, dim)
    if self.apart:
      kernel = kernel.reshape(heads, channels, dim)
      return jnp.einsum('bhmd,hdc->bmc', x, kernel) + bias
    flat = jnp.dot(x.swapaxes(1, 2).reshape(-1, dim), kernel) + bias
    return flat.reshape(batch, length, dim)


class Attention(nn.Module):
  """Multi-head self-attention, with its weights.

  softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, Eq. 1).

  Attributes:
    num_heads: attention heads.
    dtype: dtype of the computation; the softmax is float32.
    fused: whether cuDNN computes the output, which then never holds the
      weights; they are computed apart and only where they are used.
    apart: see `Heads`; the parameters are the same.
  """

  num_heads: int
  dtype: jnp.dtype
  fused: bool = False
  apart: bool = False

  @nn.compact
  def __call__(
    self, x: jax.Array, turn: tuple[np.ndarray, np.ndarray] | None
  ) -> tuple[jax.Array, jax.Array]:
    """[B, M, D] -> ([B, M, D], weights [B, heads, M, M]).

    Where 'intermediates' is mutable, `keys` [B, M, heads, d] are kept there.
    """

    def heads(name):
      return Heads(self.num_heads, self.dtype, self.apart, name=name)

    query, key, value = heads('qkv').split(x, 3)
    self.sow('intermediates', 'keys', key.swapaxes(1, 2))
    if turn is not None:
      query, key = rotate(query, turn), rotate(key, turn)
    logits = jnp.einsum('bhqd,bhkd->bhqk', query, key) * query.shape[-1] ** -0.5
    weights = nn.softmax(logits.astype(wide(self.dtype)))
    if self.fused:
      y = _fused_attention(query, key, value)
    else:
      y = jnp.einsum('bhqk,bhkd->bhqd', weights.astype(self.dtype), value)
    return heads('proj').join(y), weights
