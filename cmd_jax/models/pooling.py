"""How the feature map of an image becomes the vector it is found by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cmd_jax.errors import UserError

# The encoder's own; means of the last feature map, generalised or by strength.
POOLINGS = ('encoder', 'gem', 'strength')
# Of two and three the better on photographs of groceries, benchmarks/README.md.
# Radenovic et al. start from three.
_EXPONENT = 2.0
# Below it there is no power with a finite gradient (their eps).
_SMALLEST = 1e-6


def check_pooling(encoder: nn.Module, pooling: str, field: str) -> None:
  """Raises UserError, naming the field, for what the encoder does not have."""
  if pooling not in POOLINGS:
    raise UserError(
      f'{field} is {pooling!r}: choose one of {", ".join(POOLINGS)}'
    )
  if pooling != 'encoder' and not hasattr(encoder, 'stages'):
    raise UserError(
      f'{field} is {pooling!r}, a mean of feature maps of a convolutional '
      f'network, which {type(encoder).__name__} is not: choose encoder'
    )


def generalised_mean(maps: jax.Array, exponent: float = _EXPONENT) -> jax.Array:
  """GeM, (mean of x^p)^(1/p) over an image's places (Radenovic et al. 2018).

  Between the mean, p = 1, and the maximum, p = infinity: what is strong at few
  places counts for more.

  Args:
    maps: [B, h, w, C] not negative.
    exponent: p.

  Returns:
    [B, C] float32.
  """
  maps = jnp.maximum(maps.astype(jnp.float32), _SMALLEST)
  # Divided by the largest, so that no power overflows or vanishes.
  largest = maps.max((1, 2), keepdims=True)
  powers = ((maps / largest) ** exponent).mean((1, 2))
  return largest[:, 0, 0] * powers ** (1 / exponent)


def mean_by_strength(maps: jax.Array) -> jax.Array:
  """The mean over an image's places, weighted by the length of their features.

  What an encoder without attention looks at, as the report shows it, is where
  its features are long.

  Args:
    maps: [B, h, w, C].

  Returns:
    [B, C] float32; the mean where all is 0.
  """
  maps = maps.astype(jnp.float32)
  lengths = jnp.linalg.norm(maps, axis=-1, keepdims=True) + _SMALLEST
  return (lengths * maps).sum((1, 2)) / lengths.sum((1, 2))


def pooled(
  encoder: nn.Module,
  variables: Mapping[str, Any],
  images: jax.Array,
  pooling: str,
) -> jax.Array:
  """The embeddings of images.

  Args:
    encoder: the encoder.
    variables: of the encoder.
    images: [B, H, W, 3] normalised.
    pooling: one of `POOLINGS` that `check_pooling` accepts.

  Returns:
    [B, D] float32.
  """
  if pooling == 'encoder':
    return encoder.apply(variables, images).image
  maps = encoder.apply(variables, images, method='stages')
  pool = {'gem': generalised_mean, 'strength': mean_by_strength}[pooling]
  return pool(maps[-1])
