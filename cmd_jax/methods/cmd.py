"""CMD (Bi et al. 2025): EsViT and distillation across the two levels.

variant='paper', our reading of the paper (cmd_jax/losses has the equations):

  L = w_image L_I + w_region L_R + w_student_bag L_S + w_teacher_bag L_T

An image is a bag of patches; multi-instance attention a decides what each of
them counts in L_R, L_S and L_T, and learns from all three. Without the gradient
of L_R it looked at the background of toybirds (benchmarks/RESEARCH.md).

variant='released', what the published program computes (main_esvit.py
`DDINOLoss`), where that is defined: no attention, L_R as in EsViT, and in place
of L_S and L_T the mean over the pairs of views u != v of

  1/K sum_k r_k (log r_k - p_k)   with r the sum of the region quantities

where p and r are the student's logits / tau_s of view v, and the teacher's
probabilities of view u; elements with r <= 0 contribute neither value nor
gradient. The program itself takes their logarithm, so that its loss is NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from cmd_jax.errors import UserError
from cmd_jax.losses import cmd as losses
from cmd_jax.losses import dino as image_losses
from cmd_jax.methods import dino, esvit
from cmd_jax.methods.base import Method, Setting, weighted_terms
from cmd_jax.methods.distillation import Distillation
from cmd_jax.methods.networks import make_networks
from cmd_jax.models import heads

VARIANTS = ('paper', 'released')


def _weights(
  attention: jax.Array | None, probs: jax.Array, pooling: str
) -> jax.Array | None:
  """[B, V, N] weights of the bag; None pools by the maximum."""
  if pooling == 'max':
    return None
  if attention is not None:
    return attention
  shape = probs.shape[:-1]
  return jnp.full(shape, 1 / shape[-1])


def _paper_values(
  pooling: str, kl_direction: str, attend_regions: bool
) -> Mapping:
  def region(compared):
    return esvit.region_value(
      compared, compared.attention if attend_regions else None
    )

  def student_bag(compared):
    log_probs = compared.student_region_log_probs
    bags = jnp.concatenate(
      [
        losses.bag_distribution(jnp.exp(x), _weights(attention, x, pooling))
        for x, attention in zip(
          log_probs,
          compared.attention or (None,) * len(log_probs),
          strict=True,
        )
      ],
      axis=1,
    )
    image = jnp.exp(compared.student_image_log_probs)
    return losses.cross_level_kl(image, bags, direction=kl_direction)

  def teacher_bag(compared):
    probs = compared.teacher_region_probs
    bags = losses.bag_distribution(
      probs, _weights(compared.teacher_attention, probs, pooling)
    )
    return losses.cross_level_kl(
      compared.teacher_image_probs, bags, direction=kl_direction
    )

  return {
    **dino.VALUES,
    'region': region,
    'student_bag': student_bag,
    'teacher_bag': teacher_bag,
  }


def _released_values(num_prototypes: int) -> Mapping:
  def student_bag(compared):
    image = compared.student.image
    sums = [regions.sum(-2) for regions in compared.student.regions]
    views = losses.released_kl(image, jnp.concatenate(sums, axis=1))
    # A view counts once for every pair that it is in.
    num_teacher, num_student = (
      compared.teacher_image_probs.shape[1],
      image.shape[1],
    )
    count = image_losses.pair_mask(num_teacher, num_student).sum(0)
    pairs = image_losses.num_pairs(num_teacher, num_student)
    return views @ (count / pairs) / num_prototypes

  def teacher_bag(compared):
    views = losses.released_kl(
      compared.teacher_image_probs, compared.teacher_region_probs.sum(-2)
    )
    return views.mean(1) / num_prototypes

  return {
    **esvit.VALUES,
    'student_bag': student_bag,
    'teacher_bag': teacher_bag,
  }


def _attends(pooling: str) -> bool:
  return pooling in ('gated_attention', 'attention')


def _make_released(setting: Setting, weights: Mapping[str, float]) -> Method:
  return Distillation(
    setting,
    make_networks(setting, regions=True),
    weighted_terms(
      _released_values(setting.head['num_prototypes']),
      weights,
      setting.term_warmup,
    ),
  ).as_method()


def _make_paper(
  setting: Setting,
  *,
  mil: Mapping[str, Any],
  weights: Mapping[str, float],
  pooling: str,
  kl_direction: str,
  attend_regions: bool,
  shared_prototypes: bool,
) -> Method:
  for field, value, choices in (
    ('pooling', pooling, losses.POOLINGS),
    ('kl_direction', kl_direction, losses.KL_DIRECTIONS),
  ):
    if value not in choices:
      raise UserError(
        f'config.method.{field} is {value!r}: choose one of '
        f'{", ".join(choices)}'
      )
  if attend_regions and not _attends(pooling):
    raise UserError(
      f'config.method.attend_regions needs attention, but pooling is '
      f'{pooling!r}: set one of attend_regions=False, pooling=gated_attention'
    )
  attention = heads.MilAttention(
    gated=pooling == 'gated_attention', dtype=setting.encoder.dtype, **mil
  )
  return Distillation(
    setting,
    make_networks(
      setting,
      regions=True,
      mil=attention if _attends(pooling) else None,
      shared_prototypes=shared_prototypes,
    ),
    weighted_terms(
      _paper_values(pooling, kl_direction, attend_regions),
      weights,
      setting.term_warmup,
    ),
    # The maximum is normalised by its sum over all prototypes.
    sums_over_prototypes=pooling != 'max',
  ).as_method()


def make_cmd(
  setting: Setting, *, variant: str, weights: Mapping[str, float], **fields
) -> Method:
  """Builds CMD.

  Args:
    setting: what it is built for.
    variant: one of `VARIANTS`; this module's docstring has the formulas.
    weights: weights of the terms `image`, `region`, `student_bag` (L_S) and
      `teacher_bag` (L_T).
    **fields: for 'paper' alone
      mil: arguments of `MilAttention` but `gated`, which `pooling` decides;
      pooling: how a bag is pooled, one of `losses.cmd.POOLINGS`;
      kl_direction: one of `losses.cmd.KL_DIRECTIONS`;
      attend_regions: weights L_R by the attention; otherwise it is EsViT's;
      shared_prototypes: both heads end in the same prototypes.

  Raises:
    UserError: an unknown choice, or one that contradicts another.
  """
  if variant not in VARIANTS:
    raise UserError(
      f'config.method.variant is {variant!r}: choose one of '
      f'{", ".join(VARIANTS)}'
    )
  if variant == 'paper' and 'pooling' not in fields:
    raise UserError(
      "config.method.variant is 'paper', whose fields the config lacks: use "
      '--config=FILE:method=cmd'
    )
  if variant == 'paper':
    return _make_paper(setting, weights=weights, **fields)
  if fields:
    raise UserError(
      "config.method.variant is 'released', which has no "
      f'{", ".join(sorted(fields))}: use --config=FILE:method=cmd_released'
    )
  return _make_released(setting, weights)
