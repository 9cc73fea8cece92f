"""How the feature map of an image becomes the vector it is found by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cmd_jax.errors import UserError

# The encoder's own, or the generalised mean.
POOLINGS = ('encoder', 'gem')
# Chosen on validation splits of real photographs: benchmarks/RESEARCH.md.
# Radenovic et al. start from 3.
_EXPONENT = 2.0
# Below it there is no power with a finite gradient (their eps).
_SMALLEST = 1e-6


def check_pooling(encoder: nn.Module, pooling: str, field: str) -> None:
  """Raises UserError, naming the field, for what the encoder does not have."""
  if pooling not in POOLINGS:
    raise UserError(
      f'{field} is {pooling!r}: choose one of {", ".join(POOLINGS)}'
    )
  if pooling == 'gem' and not hasattr(encoder, 'stages'):
    raise UserError(
      f"{field} is 'gem', a mean of non-negative feature maps, which "
      f'{type(encoder).__name__} does not have: choose encoder'
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
  return generalised_mean(maps[-1])
