"""What a network's features have in common: their mean and deviation.

After a ReLU most of a feature is what it shares with all others, and a cosine
sees little else. Agglomerative distillation takes it away first, channel by
channel (Ranzinger et al. 2024, "PHI-S").
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from cmd_jax.devices import sharding
from cmd_jax.models.layers import wide

# Of the running moments: they last about a hundred steps.
_MOMENTUM = 0.99
# Of the mean variance of the channels, added to each: a channel that is all but
# constant says nothing.
_FLOOR = 0.01

# Sums from nothing, weighed by how much of them is from steps:
# {'weight': [], 'mean': [D], 'square': [D]}, of features and of their squares.
Moments = Mapping[str, jax.Array]


def no_moments(dim: int) -> Moments:
  """Before the first step."""
  return {
    'weight': jnp.zeros(()),
    'mean': jnp.zeros(dim),
    'square': jnp.zeros(dim),
  }


def follow(
  moments: Moments, features: jax.Array, axis_name: str | None
) -> Moments:
  """The moments after a step.

  Args:
    moments: before it.
    features: [..., D], what the network said in it.
    axis_name: axis over which the examples are spread, None if they are global.
  """
  x = features.astype(jnp.float32).reshape(-1, features.shape[-1])
  new = {
    'weight': jnp.ones(()),
    'mean': x.mean(0),
    'square': jnp.square(x).mean(0),
  }
  new = sharding.pmean(new, axis_name)
  return jax.tree.map(
    lambda old, x: old + (1 - _MOMENTUM) * (x - old), moments, new
  )


def standardise(moments: Moments, features: jax.Array) -> jax.Array:
  """Features less their mean, over their deviation; at first as they are.

  Args:
    moments: of earlier steps.
    features: [..., D].

  Returns:
    [..., D], in the type of the features.
  """
  is_known = moments['weight'] > 0
  weight = jnp.where(is_known, moments['weight'], 1.0)
  mean = moments['mean'] / weight
  variance = jnp.maximum(moments['square'] / weight - jnp.square(mean), 0)
  scale = jax.lax.rsqrt(variance + _FLOOR * variance.mean())
  scale = jnp.where(is_known, scale, 1.0)
  x = features.astype(wide(features.dtype))
  return ((x - mean) * scale).astype(features.dtype)
