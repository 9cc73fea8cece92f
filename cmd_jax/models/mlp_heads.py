"""Projector and predictor of parts, PARTICLE's MLP in both of its variants."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from cmd_jax.errors import UserError
from cmd_jax.models.layers import Dense, linear_init, torch_default_init, wide

Initializer = nn.initializers.Initializer


class Initialisation(NamedTuple):
  """How a linear layer starts, as functions of its number of inputs."""

  kernel: Callable[[int], Initializer]
  bias: Callable[[int], Initializer]


INITIALISATIONS = {
  # Both MLPs of the ResNet variant: torch's own.
  'torch': Initialisation(torch_default_init, torch_default_init),
  # The ViT variant's projector, initialised with the rest of the network.
  'normal': Initialisation(
    lambda fan_in: linear_init, lambda fan_in: nn.initializers.zeros
  ),
  # The ViT variant's predictor (train_particle_vit.py `init_weights`).
  'kaiming': Initialisation(
    lambda fan_in: nn.initializers.he_uniform(),
    lambda fan_in: nn.initializers.constant(0.01),
  ),
}


class MlpHead(nn.Module):
  """Linear, layer normalisation, ReLU, linear (models.py `MLP`).

  Attributes:
    hidden_dim: hidden dimension.
    output_dim: dimension of the result.
    initialisation: a key of `INITIALISATIONS`.
    dtype: dtype of the computation; parameters are float32.
  """

  hidden_dim: int
  output_dim: int
  initialisation: str
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., D] -> [..., output_dim], at least float32."""
    init = INITIALISATIONS[self.initialisation]

    def dense(x, features, name):
      fan_in = x.shape[-1]
      return Dense(
        features,
        kernel_init=init.kernel(fan_in),
        bias_init=init.bias(fan_in),
        dtype=self.dtype,
        name=name,
      )(x)

    x = dense(x, self.hidden_dim, 'fc1')
    # torch's default epsilon, unlike that of the encoders.
    x = nn.relu(nn.LayerNorm(1e-5, dtype=self.dtype, name='norm')(x))
    x = dense(x, self.output_dim, 'fc2')
    return x.astype(wide(x.dtype))


def make_mlp_head(
  *,
  hidden_dim: int,
  output_dim: int,
  initialisation: str,
  dtype: jnp.dtype = jnp.float32,
) -> MlpHead:
  """Builds a projector or a predictor.

  Args:
    hidden_dim: hidden dimension; 4096 for ResNet, 2048 for ViT as published.
    output_dim: dimension of the result; 256 as published.
    initialisation: a key of `INITIALISATIONS`.
    dtype: dtype of the computation.

  Raises:
    UserError: unknown initialisation, or no hidden dimension.
  """
  if initialisation not in INITIALISATIONS:
    raise UserError(
      f'config.method: initialisation is {initialisation!r}: choose one of '
      f'{", ".join(INITIALISATIONS)}'
    )
  if hidden_dim < 1:
    raise UserError(
      f'config.method: hidden_dim is {hidden_dim}: it must be at least 1'
    )
  return MlpHead(hidden_dim, output_dim, initialisation, dtype)
