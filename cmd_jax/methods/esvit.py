"""EsViT (Li et al. 2022): DINO and region-to-region distillation."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from cmd_jax.losses import esvit as losses
from cmd_jax.methods import dino
from cmd_jax.methods.base import Method, Setting, weighted_terms
from cmd_jax.methods.distillation import Distillation
from cmd_jax.methods.features import Comparison
from cmd_jax.methods.networks import make_networks


def region_value(
  compared: Comparison,
  weights: tuple[jax.Array, ...] | None = None,
) -> jax.Array:
  """L_R, [B].

  Args:
    compared: both networks.
    weights: [B, V, N] of the tokens for each view size; uniform without.
  """
  regions = compared.student_regions
  if weights is None:
    weights = tuple(jnp.full(x.shape[:-1], 1 / x.shape[-2]) for x in regions)
  return losses.region_loss(
    compared.expected_regions,
    regions,
    compared.region_normalisers,
    compared.matches,
    weights,
  )


VALUES = {**dino.VALUES, 'region': region_value}


def make_esvit(setting: Setting, *, weights: Mapping[str, float]) -> Method:
  """Builds EsViT.

  Args:
    setting: what it is built for.
    weights: weights of the terms `image` and `region`.

  Raises:
    UserError: a choice that cannot be.
  """
  return Distillation(
    setting,
    make_networks(setting, regions=True),
    weighted_terms(VALUES, weights, setting.term_warmup),
  ).as_method()
