"""DINO (Caron et al. 2021): image-to-image distillation alone."""

from __future__ import annotations

from collections.abc import Mapping

import jax
from flax import linen as nn

from cmd_jax.losses import dino as losses
from cmd_jax.methods import base, distillation


def image_value(outputs: distillation.Outputs, _) -> jax.Array:
  """L_I, [B]."""
  return losses.image_loss(
    outputs.teacher_image_probs, outputs.student_image_log_probs
  )


VALUES = {'image': image_value}


def make_dino(
  encoder: nn.Module,
  *,
  head: Mapping,
  weights: Mapping[str, float],
  **kwargs,
) -> base.Method:
  """Builds DINO.

  Args:
    encoder: images -> `EncoderOutput`.
    head: arguments of `PrototypeHead`.
    weights: weight of the term `image`.
    **kwargs: arguments of `make_distillation`.
  """
  (image_head,) = distillation.make_heads(1, encoder, head)
  return distillation.make_distillation(
    distillation.Networks(encoder, image_head),
    base.weighted_terms(VALUES, weights),
    **kwargs,
  )
