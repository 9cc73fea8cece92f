"""Layers that encoders and heads share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

linear_init = nn.initializers.truncated_normal(0.02)


def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU, x Phi(x), by erf as torch has it.

  `nn.gelu(approximate=False)` goes by erfc, whose gradient XLA's CPU backend
  compiles to several times the instructions (benchmarks/README.md).
  """
  return 0.5 * x * (1 + jax.lax.erf(x * np.float32(0.5**0.5).astype(x.dtype)))


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


def torch_default_init(fan_in: int) -> nn.initializers.Initializer:
  """Uniform in +-1/sqrt(fan_in): torch's default for layers left alone."""

  def init(key, shape, dtype=jnp.float32):
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init
