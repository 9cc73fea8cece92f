"""EsViT (Li et al. 2022): DINO and region-to-region distillation."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from cmd_jax.losses import esvit as losses
from cmd_jax.methods import base, dino, distillation
from cmd_jax.methods.comparison import Outputs
from cmd_jax.methods.networks import make_networks


def region_value(
  outputs: Outputs,
  weights: tuple[jax.Array, ...] | None = None,
) -> jax.Array:
  """L_R, [B].

  Args:
    outputs: of both networks.
    weights: [B, V, N] of the tokens for each view size; uniform without.
  """
  logits = outputs.student.regions
  if weights is None:
    weights = tuple(jnp.full(x.shape[:-1], 1 / x.shape[-2]) for x in logits)
  return losses.region_loss(
    outputs.teacher_region_probs,
    logits,
    outputs.normalisers.regions,
    outputs.matches,
    weights,
    share=outputs.share,
  )


VALUES = {**dino.VALUES, 'region': region_value}


def make_esvit(
  encoder: nn.Module,
  *,
  head: Mapping,
  weights: Mapping[str, float],
  lora: Mapping,
  axis_name: str | None,
  **kwargs,
) -> base.Method:
  """Builds EsViT.

  Args:
    encoder: images -> `EncoderOutput`.
    head: arguments of `PrototypeHead`, both for images and for regions.
    weights: weights of the terms `image` and `region`.
    lora: argument of `make_networks`.
    axis_name: axis over which the batch is spread, None if it is global.
    **kwargs: arguments of `make_distillation`.
  """
  networks = make_networks(
    encoder, head=head, axis_name=axis_name, lora=lora, regions=True
  )
  return distillation.make_distillation(
    networks,
    base.weighted_terms(VALUES, weights),
    axis_name=axis_name,
    **kwargs,
  )
