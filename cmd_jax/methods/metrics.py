"""What shows a collapse before the loss does.

Means over examples first, so that the parts of a batch and the devices add up;
what is watched is a function of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from cmd_jax.losses import dino as losses
from cmd_jax.methods.features import Comparison
from cmd_jax.models.heads import l2_normalise
from cmd_jax.models.layers import wide


def distribution_metrics(compared: Comparison) -> dict[str, jax.Array]:
  """[B] of each, of the distributions."""
  entropy = compared.teacher_entropy.mean(1)
  cross_entropy = losses.image_loss(
    compared.expected_images,
    compared.student_images,
    compared.image_normalisers,
  )
  return {
    'teacher_entropy': entropy,
    'student_teacher_kl': cross_entropy - entropy,
  }


def mean_direction(embedding: jax.Array) -> jax.Array:
  """[D], mean of [..., D] embeddings of length 1."""
  return l2_normalise(embedding).mean(tuple(range(embedding.ndim - 1)))


def spread(direction: jax.Array) -> jax.Array:
  """1 for directions spread evenly over the sphere, 0 for a single one.

  Args:
    direction: [D] from `mean_direction`.
  """
  return jnp.sqrt(jnp.maximum(1 - jnp.sum(direction**2), 0))


def relative_entropy(attention: jax.Array) -> jax.Array | None:
  """1 for uniform attention, 0 for attention on a single patch.

  Args:
    attention: [B, T, N] that adds up to 1 over N.

  Returns:
    Scalar; None where there is a single patch, of which it says nothing.
  """
  if attention.shape[-1] == 1:
    return None
  return losses.entropy(attention).mean() / jnp.log(attention.shape[-1])


def mean_bottleneck(bottleneck: jax.Array) -> jax.Array:
  """[d], mean of the [B, T, d] inputs of the prototypes, of length 1.

  The centre of a batch's logits is the product of it and the prototypes.
  """
  return bottleneck.astype(wide(bottleneck.dtype)).mean((0, 1))


def finish(stats: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """What is watched, of the means over all examples.

  Args:
    stats: scalars, which are watched as they are; `mean_direction` [D] and
      `mean_bottleneck` [d] as far as there are.
  """
  values = {name: x for name, x in stats.items() if not x.ndim}
  if 'mean_direction' in stats:
    values['feature_spread'] = spread(stats['mean_direction'])
  if 'mean_bottleneck' in stats:
    # 1 if all logits are the same.
    values['centre_norm'] = jnp.linalg.norm(stats['mean_bottleneck'])
  return values
