"""Heads on top of an encoder: prototypes and multi-instance attention."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from cmd_jax.models.layers import (
  BatchNorm,
  Dense,
  gelu,
  torch_default_init,
  wide,
)

# Squared; the attention is even where all tokens are zeros.
_SHORTEST = 1e-12


def l2_normalise(x: jax.Array, epsilon: float = 1e-12) -> jax.Array:
  """x / max(|x|, epsilon) along the last axis, as torch's F.normalize.

  The gradient at 0 is defined: the maximum is taken under the root.
  """
  square = jnp.sum(x * x, axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, epsilon**2))


def prototype_logits(x: jax.Array, prototypes: jax.Array) -> jax.Array:
  """Products of features [..., D] with prototypes [D, K], [..., K] float32."""
  logits = jnp.dot(
    x.reshape(-1, x.shape[-1]),
    prototypes.astype(x.dtype),
    preferred_element_type=wide(x.dtype),
  )
  return logits.reshape(*x.shape[:-1], prototypes.shape[1])


class PrototypeWeights(NamedTuple):
  """A weight-normalised last layer, w_k = g_k v_k / |v_k|.

  Attributes:
    direction: v, [D, K].
    scale: g, [1, K]; None where it is 1.
  """

  direction: jax.Array
  scale: jax.Array | None

  def kernel(self) -> jax.Array:
    """[D, K]: the prototypes."""
    square = jnp.sum(self.direction * self.direction, axis=0, keepdims=True)
    kernel = self.direction * jax.lax.rsqrt(square)
    return kernel if self.scale is None else kernel * self.scale


class WeightNormDense(nn.Module):
  """Weight-normalised linear layer without bias: w_k = g_k v_k / |v_k|.

  Attributes:
    num_prototypes: K, number of outputs.
    trainable_scale: whether g is a parameter; otherwise it is 1.
  """

  num_prototypes: int
  trainable_scale: bool

  @nn.compact
  def weights(self, dim: int) -> PrototypeWeights:
    """The weights, for features [..., dim]."""
    shape = (dim, self.num_prototypes)
    # torch's default for a bias-free Linear, which DINO leaves in place here.
    direction = self.param('weight_v', torch_default_init(dim), shape)
    scale = None
    if self.trainable_scale:
      scale = self.param('weight_g', nn.initializers.ones, (1, shape[1]))
    return PrototypeWeights(direction, scale)

  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., D] -> [..., K] float32."""
    return prototype_logits(x, self.weights(x.shape[-1]).kernel())


class PrototypeHead(nn.Module):
  """MLP, l2 bottleneck, weight-normalised prototypes (DINO's DINOHead).

  Attributes:
    num_prototypes: K.
    hidden_dim: hidden dimension of the MLP.
    bottleneck_dim: dimension of the normalised bottleneck.
    num_layers: linear layers of the MLP.
    norm_last_layer: fixes the length of the prototypes to 1.
    use_bn: batch normalisation after the hidden layers.
    axis_name: axis over which the batch is spread, None if it is global.
    dtype: dtype of the computation; parameters and logits are float32.
  """

  num_prototypes: int
  hidden_dim: int = 2048
  bottleneck_dim: int = 256
  num_layers: int = 3
  norm_last_layer: bool = True
  use_bn: bool = False
  axis_name: str | None = None
  dtype: jnp.dtype = jnp.float32

  def setup(self) -> None:
    """Makes the layers."""
    last = self.num_layers - 1
    self.mlp = [
      Dense(
        self.bottleneck_dim if index == last else self.hidden_dim,
        dtype=self.dtype,
      )
      for index in range(self.num_layers)
    ]
    self.bn = [
      BatchNorm(self.axis_name, dtype=self.dtype)
      for _ in range(last if self.use_bn else 0)
    ]
    self.last_layer = WeightNormDense(
      self.num_prototypes, not self.norm_last_layer
    )

  def bottleneck(self, x: jax.Array, train: bool = False) -> jax.Array:
    """[..., D] -> [..., bottleneck_dim] of length 1."""
    for index, dense in enumerate(self.mlp):
      x = dense(x)
      if index < len(self.mlp) - 1:
        if self.use_bn:
          x = self.bn[index](x, train)
        x = gelu(x)
    # The norm is taken in float32: bfloat16 squares lose half the digits.
    return l2_normalise(x.astype(wide(x.dtype))).astype(self.dtype)

  def prototypes(self) -> PrototypeWeights:
    """The last layer, [bottleneck_dim, K] float32."""
    return self.last_layer.weights(self.bottleneck_dim)

  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """[..., D] -> logits [..., K] float32."""
    return self.last_layer(self.bottleneck(x, train))


class MilAttention(nn.Module):
  """Multi-instance attention (Ilse, Tomczak & Welling 2018, Eq. 8 and 9).

  a_i = softmax_i( w^T ( tanh(V h_i) * sigmoid(U h_i) ) ); without the gate the
  second factor is 1.

  Attributes:
    hidden_dim: dimension of the hidden layer.
    gated: Eq. 9 rather than Eq. 8.
    dtype: dtype of the computation; the softmax is float32.
  """

  hidden_dim: int = 128
  gated: bool = True
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Tokens [..., N, D] -> attention [..., N] float32 that adds up to 1."""

    def dense(features, name):
      return Dense(features, dtype=self.dtype, name=name)

    hidden = nn.tanh(dense(self.hidden_dim, 'hidden')(tokens))
    if self.gated:
      hidden = hidden * nn.sigmoid(dense(self.hidden_dim, 'gate')(tokens))
    scores = dense(1, 'score')(hidden)[..., 0]
    return nn.softmax(scores.astype(wide(scores.dtype)))


class StrengthAttention(nn.Module):
  """Attention by the squared length of tokens, a_i = |h_i|^2 / sum_j |h_j|^2.

  It learns nothing, and no gradient goes through it. A convolutional encoder
  that was trained by labels has long features where objects are; attention
  that learns from it may leave them for what is around (benchmarks/RESEARCH.md,
  hypotheses 33 and 34).

  Attributes:
    dtype: as of `MilAttention`; the lengths are at least float32.
  """

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Tokens [..., N, D] -> attention [..., N] float32 that adds up to 1."""
    tokens = jax.lax.stop_gradient(tokens)
    squares = jnp.square(tokens.astype(wide(tokens.dtype))).sum(-1) + _SHORTEST
    return squares / squares.sum(-1, keepdims=True)


# Poolings of a bag by attention over its instances.
ATTENTIONS = ('gated_attention', 'attention', 'strength')


def make_attention(
  pooling: str, *, hidden_dim: int, dtype: jnp.dtype
) -> nn.Module | None:
  """The attention by which a bag is pooled; None where it is by another way.

  Args:
    pooling: one of `losses.cmd.POOLINGS`.
    hidden_dim: of attention that learns.
    dtype: dtype of the computation.
  """
  if pooling not in ATTENTIONS:
    return None
  if pooling == 'strength':
    return StrengthAttention(dtype=dtype)
  return MilAttention(hidden_dim, pooling == 'gated_attention', dtype)
