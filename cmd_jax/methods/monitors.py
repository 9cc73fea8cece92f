"""What shows a collapse before the loss does."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cmd_jax.devices import sharding
from cmd_jax.losses import dino as losses
from cmd_jax.methods.comparison import Outputs
from cmd_jax.models.heads import l2_normalise
from cmd_jax.models.layers import wide


def example_monitors(outputs: Outputs) -> dict[str, jax.Array]:
  """[B] of each, of the distributions."""
  entropy = losses.entropy(outputs.teacher_image_probs).mean(1)
  cross_entropy = losses.image_loss(
    outputs.teacher_image_probs, outputs.student_image_log_probs
  )
  return {
    'teacher_entropy': entropy,
    'student_teacher_kl': cross_entropy - entropy,
  }


def attention_entropy(
  attention: jax.Array, axis_name: str | None
) -> dict[str, jax.Array]:
  """1 for uniform attention, 0 for attention on a single patch.

  Args:
    attention: [B, T, N] that adds up to 1 over N.
    axis_name: axis over which the batch is spread, None if it is global.
  """
  if attention.shape[-1] == 1:
    return {}  # Of a single patch it says nothing.
  relative = losses.entropy(attention).mean() / jnp.log(attention.shape[-1])
  return {'attention_entropy': sharding.pmean(relative, axis_name)}


def feature_spread(
  embedding: jax.Array, axis_name: str | None
) -> dict[str, jax.Array]:
  """1 for directions spread evenly over the sphere, 0 for a single one.

  Args:
    embedding: [B, T, D] of the teacher.
    axis_name: axis over which the batch is spread, None if it is global.
  """
  unit = l2_normalise(embedding)
  mean = sharding.pmean(unit.mean((0, 1)), axis_name)
  return {'feature_spread': jnp.sqrt(jnp.maximum(1 - jnp.sum(mean**2), 0))}


def centre_norm(
  bottleneck: jax.Array, axis_name: str | None
) -> dict[str, jax.Array]:
  """Length of the centre before the prototypes: 1 if all logits are the same.

  The centre of a batch's logits is the product of this mean and the prototypes.

  Args:
    bottleneck: [B, T, d] of the teacher, of length 1.
    axis_name: axis over which the batch is spread, None if it is global.
  """
  mean = sharding.pmean(
    bottleneck.astype(wide(bottleneck.dtype)).mean((0, 1)), axis_name
  )
  return {'centre_norm': jnp.linalg.norm(mean)}
