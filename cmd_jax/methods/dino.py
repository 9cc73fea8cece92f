"""DINO (Caron et al. 2021): image-to-image distillation alone."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from cmd_jax.losses import dino as losses
from cmd_jax.methods.base import Method, Setting, weighted_terms
from cmd_jax.methods.distillation import Distillation
from cmd_jax.methods.features import Comparison
from cmd_jax.methods.networks import make_networks


def image_value(compared: Comparison) -> jax.Array:
  """L_I, [B]."""
  return losses.image_loss(
    compared.expected_images,
    compared.student_images,
    compared.image_normalisers,
  )


VALUES = {'image': image_value}


def make_dino(setting: Setting, *, weights: Mapping[str, float]) -> Method:
  """Builds DINO.

  Args:
    setting: what it is built for.
    weights: weight of the term `image`.

  Raises:
    UserError: a choice that cannot be.
  """
  return Distillation(
    setting,
    make_networks(setting, regions=False),
    weighted_terms(VALUES, weights, setting.term_warmup),
  ).as_method()
