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

from cmd_jax.errors import UserError
from cmd_jax.losses import cmd as losses
from cmd_jax.losses import dino as image_losses
from cmd_jax.methods import dino, esvit
from cmd_jax.methods.base import Method, Setting, Term, weighted_terms
from cmd_jax.methods.distillation import Distillation
from cmd_jax.methods.features import BagTerms
from cmd_jax.methods.networks import make_networks
from cmd_jax.models import heads

VARIANTS = ('paper', 'released')


def _paper_values(
  pooling: str, kl_direction: str, attend_regions: bool
) -> Mapping:
  def region(compared):
    return esvit.region_value(
      compared, compared.attention if attend_regions else None
    )

  def divergence(sums):
    if pooling == 'max':
      divergence = losses.normalised_kl(*sums, direction=kl_direction)
    else:
      (divergence,) = sums
    return divergence.mean(1)

  return {
    **dino.VALUES,
    'region': region,
    'student_bag': lambda compared: divergence(compared.student_bag),
    'teacher_bag': lambda compared: divergence(compared.teacher_bag),
  }


def _paper_bags(
  pooling: str, kl_direction: str, terms: Mapping[str, Term]
) -> BagTerms:
  def compare(image, bag):
    divergence = losses.cross_level_kl(image, bag, direction=kl_direction)
    return (divergence, bag.sum(-1)) if pooling == 'max' else (divergence,)

  return BagTerms(
    compare,
    'attention' if pooling in heads.ATTENTIONS else pooling,
    'student_bag' in terms,
    'teacher_bag' in terms,
  )


def _released_values(num_prototypes: int) -> Mapping:
  def student_bag(compared):
    # A view counts once for every pair that it is in.
    num_teacher, num_student = (
      compared.expected_images.shape[1],
      compared.logit_bag.shape[1],
    )
    count = image_losses.pair_mask(num_teacher, num_student).sum(0)
    pairs = image_losses.num_pairs(num_teacher, num_student)
    return compared.logit_bag @ (count / pairs) / num_prototypes

  def teacher_bag(compared):
    (divergence,) = compared.teacher_bag
    return divergence.mean(1) / num_prototypes

  return {
    **esvit.VALUES,
    'student_bag': student_bag,
    'teacher_bag': teacher_bag,
  }


def _released_bags(terms: Mapping[str, Term]) -> BagTerms:
  return BagTerms(
    lambda image, region_sum: (losses.released_kl(image, region_sum),),
    'sum',
    False,
    'teacher_bag' in terms,
    losses.released_kl if 'student_bag' in terms else None,
  )


def _make_released(setting: Setting, weights: Mapping[str, float]) -> Method:
  terms = weighted_terms(
    _released_values(setting.head['num_prototypes']),
    weights,
    setting.term_warmup,
  )
  return Distillation(
    setting,
    make_networks(setting, regions=True),
    terms,
    _released_bags(terms),
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
  attention = heads.make_attention(pooling, dtype=setting.encoder.dtype, **mil)
  if attend_regions and attention is None:
    raise UserError(
      f'config.method.attend_regions needs attention, but pooling is '
      f'{pooling!r}: set one of attend_regions=False, pooling=gated_attention'
    )
  terms = weighted_terms(
    _paper_values(pooling, kl_direction, attend_regions),
    weights,
    setting.term_warmup,
  )
  return Distillation(
    setting,
    make_networks(
      setting,
      regions=True,
      mil=attention,
      shared_prototypes=shared_prototypes,
    ),
    terms,
    _paper_bags(pooling, kl_direction, terms),
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
      mil: arguments of `make_attention` besides `pooling`;
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
