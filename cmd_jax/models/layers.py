"""Layers that encoders and heads share."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cmd_jax.devices import sharding
from cmd_jax.errors import UserError

# DINO's trunc_normal_(std=.02) cuts at +-2, a hundred deviations away.
linear_init = nn.initializers.normal(0.02)

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}

# Width of a result over that of what it is computed from. Queries, keys and
# values are three times as wide, the hidden layer of an MLP four times.
_WIDE = 3


def _is_narrow_product(primitive: Any, *avals: Any, **params: Any) -> bool:
  """Whether it is a linear layer whose result is not much wider than its input.

  Args:
    primitive: of JAX.
    *avals: shapes of what it is applied to.
    **params: its parameters.
  """
  is_linear = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  if not is_linear(primitive, *avals, **params):
    return False
  left, right = avals
  (contracted, _), _ = params['dimension_numbers']
  width = math.prod(left.shape[i] for i in contracted)
  return right.size <= _WIDE * width * width


# What of a block is kept for its gradient; the rest is computed again.
REMATS = {
  'none': None,
  # The results of linear layers, not the attention weights.
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  # Those but the hidden layers of MLPs.
  'narrow': _is_narrow_product,
  # Its input alone.
  'full': jax.checkpoint_policies.nothing_saveable,
}


class EncoderOutput(NamedTuple):
  """What an encoder says of a batch of images.

  Attributes:
    image: [B, D] float32 embedding of the image.
    tokens: [B, N, D] float32 embeddings of its regions, row by row.
    attention: [B, heads, N] float32, how much the last block looks at each
      region; None for an encoder without attention.
  """

  image: jax.Array
  tokens: jax.Array
  attention: jax.Array | None


def check_choice(field: str, value, choices) -> None:
  """Raises UserError unless `value`, of config.model, is one of `choices`."""
  if value not in choices:
    raise UserError(
      f'config.model.{field} is {value!r}: choose one of {", ".join(choices)}'
    )


def check_drop_path_rate(rate: float) -> None:
  """Raises UserError unless the rate is in [0, 1)."""
  if not 0 <= rate < 1:
    raise UserError(
      f'config.model.drop_path_rate is {rate}: it must be at least 0 and below '
      '1'
    )


def images_like(encoder: nn.Module, side_px: int) -> jax.ShapeDtypeStruct:
  """One image that an encoder takes, [1, H, H, C], for its shapes.

  Args:
    encoder: the encoder; one without the field `channels` takes three.
    side_px: H.
  """
  shape = (1, side_px, side_px, getattr(encoder, 'channels', 3))
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def wide(dtype: jnp.dtype) -> jnp.dtype:
  """The dtype of norms, softmaxes and sums: at least float32."""
  return jnp.promote_types(dtype, jnp.float32)


def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU, x Phi(x), by erf as torch has it.

  `nn.gelu(approximate=False)` goes by erfc, whose gradient XLA's CPU backend
  compiles to several times the instructions (benchmarks/README.md).
  """
  return 0.5 * x * (1 + jax.lax.erf(x * np.asarray(0.5**0.5, x.dtype)))


# 'tanh' is its approximation (Hendrycks and Gimpel 2016), Flax's default.
GELUS = {'exact': gelu, 'tanh': nn.gelu}


def drop_path(x: jax.Array, rate: float, uniforms: jax.Array) -> jax.Array:
  """Drops whole residual branches: x / (1 - rate) * floor(1 - rate + u).

  Args:
    x: [B, ...] output of a branch.
    rate: probability of dropping it.
    uniforms: [B] draws from [0, 1), one an example.
  """
  keep = jnp.floor(1 - rate + uniforms) / (1 - rate)
  return x * keep.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)


def drop_path_rates(rate: float, depth: int) -> list[float]:
  """The rate of each of `depth` blocks: rises linearly from 0 to `rate`."""
  return np.linspace(0, rate, depth).tolist()


def rematerialised(
  block: type[nn.Module], remat: str, static_argnums: tuple[int, ...] = ()
) -> type[nn.Module]:
  """A block that computes some of its results again for its gradient.

  Values, gradients and the names of the parameters stay as they are.

  Args:
    block: class of the block.
    remat: key of `REMATS`.
    static_argnums: arguments that are no arrays; the module itself is 0.
  """
  if remat == 'none':
    return block
  return nn.remat(block, policy=REMATS[remat], static_argnums=static_argnums)


class Dense(nn.Dense):
  """Linear layer on the last axis, initialised as in DINO.

  The leading axes are merged first: with more than two, XLA's CPU backend turns
  the weight gradient into a transposed copy fused with the activation before
  it, four times as slow as the product itself (benchmarks/README.md).
  """

  kernel_init: nn.initializers.Initializer = linear_init

  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., D] -> [..., features]."""
    flat = super().__call__(x.reshape(-1, x.shape[-1]))
    return flat.reshape(*x.shape[:-1], self.features)


class Mlp(nn.Module):
  """Two layers with a GELU between them, `gelu` of GELUS."""

  hidden_dim: int
  dtype: jnp.dtype
  gelu: str = 'exact'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., D] -> [..., D]."""
    dim = x.shape[-1]
    x = Dense(self.hidden_dim, dtype=self.dtype, name='fc1')(x)
    x = GELUS[self.gelu](x)
    return Dense(dim, dtype=self.dtype, name='fc2')(x)


class SwiGlu(nn.Module):
  """Gated feed-forward, fc2(silu(a) * b) with (a, b) = fc1(x)."""

  hidden_dim: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., D] -> [..., D]."""
    dim = x.shape[-1]
    x = Dense(2 * self.hidden_dim, dtype=self.dtype, name='fc1')(x)
    gate, x = jnp.split(x, 2, axis=-1)
    return Dense(dim, dtype=self.dtype, name='fc2')(nn.silu(gate) * x)


class LayerScale(nn.Module):
  """Multiplies every channel by a parameter (Touvron et al. 2021b)."""

  init_value: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., D] -> [..., D]."""
    init = nn.initializers.constant(self.init_value)
    return x * self.param('gamma', init, x.shape[-1:]).astype(x.dtype)


class BatchNorm(nn.Module):
  """Batch normalisation over all axes but the last, as torch has it.

  With `train` the statistics are those of the global batch (SyncBatchNorm):
  under jit the arrays are global, under pmap `axis_name` tells the axis. The
  running variance is updated with the unbiased batch variance, unlike Flax's.

  Attributes:
    axis_name: axis over which the batch is spread, None if it is global.
    momentum: share of the old running statistics that is kept.
    epsilon: added to the variance.
    dtype: dtype of the result; statistics and parameters are float32.
  """

  axis_name: str | None = None
  momentum: float = 0.9
  epsilon: float = 1e-5
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """[..., D] -> [..., D]; `train` takes the batch's own statistics."""
    shape = x.shape[-1:]
    scale = self.param('scale', nn.initializers.ones, shape)
    bias = self.param('bias', nn.initializers.zeros, shape)
    running_mean = self.variable('batch_stats', 'mean', jnp.zeros, shape)
    running_var = self.variable('batch_stats', 'var', jnp.ones, shape)
    x = x.astype(wide(x.dtype))
    mean, var = running_mean.value, running_var.value
    if train:
      axes = tuple(range(x.ndim - 1))
      # Two passes: E[x^2] - E[x]^2 loses digits where the mean is large.
      mean = sharding.pmean(x.mean(axes), self.axis_name)
      var = sharding.pmean(jnp.square(x - mean).mean(axes), self.axis_name)
      if not self.is_initializing():
        count = sharding.psum(x.size // x.shape[-1], self.axis_name)
        unbiased = var * (count / jnp.maximum(count - 1, 1))
        for running, new in ((running_mean, mean), (running_var, unbiased)):
          running.value = self.momentum * running.value + (
            1 - self.momentum
          ) * jax.lax.stop_gradient(new)
    y = (x - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias
    return y.astype(self.dtype)


def torch_default_init(fan_in: int) -> nn.initializers.Initializer:
  """Uniform in +-1/sqrt(fan_in): torch's default for layers left alone."""

  def init(key, shape, dtype=jnp.float32):
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init
