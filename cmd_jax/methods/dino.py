"""DINO (Caron et al. 2021): image-to-image distillation alone."""

from __future__ import annotations

from collections.abc import Mapping

import jax
from flax import linen as nn

from cmd_jax.losses import dino as losses
from cmd_jax.methods import base, distillation
from cmd_jax.methods.comparison import Outputs
from cmd_jax.methods.networks import make_networks


def image_value(outputs: Outputs) -> jax.Array:
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
  lora: Mapping,
  axis_name: str | None,
  **kwargs,
) -> base.Method:
  """Builds DINO.

  Args:
    encoder: images -> `EncoderOutput`.
    head: arguments of `PrototypeHead`.
    weights: weight of the term `image`.
    lora: argument of `make_networks`.
    axis_name: axis over which the batch is spread, None if it is global.
    **kwargs: arguments of `make_distillation`.
  """
  networks = make_networks(
    encoder, head=head, axis_name=axis_name, lora=lora, regions=False
  )
  return distillation.make_distillation(
    networks,
    base.weighted_terms(VALUES, weights),
    axis_name=axis_name,
    **kwargs,
  )
