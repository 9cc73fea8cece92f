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

import jax
import jax.numpy as jnp
from flax import linen as nn

from cmd_jax.errors import UserError
from cmd_jax.losses import cmd as losses
from cmd_jax.losses import dino as image_losses
from cmd_jax.methods import base, dino, distillation, esvit
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
  def region(outputs):
    return esvit.region_value(
      outputs, outputs.attention if attend_regions else None
    )

  def student_bag(outputs):
    log_probs = outputs.student_region_log_probs
    bags = jnp.concatenate(
      [
        losses.bag_distribution(jnp.exp(x), _weights(attention, x, pooling))
        for x, attention in zip(
          log_probs,
          outputs.attention or (None,) * len(log_probs),
          strict=True,
        )
      ],
      axis=1,
    )
    image = jnp.exp(outputs.student_image_log_probs)
    return losses.cross_level_kl(image, bags, direction=kl_direction)

  def teacher_bag(outputs):
    probs = outputs.teacher_region_probs
    bags = losses.bag_distribution(
      probs, _weights(outputs.teacher_attention, probs, pooling)
    )
    return losses.cross_level_kl(
      outputs.teacher_image_probs, bags, direction=kl_direction
    )

  return {
    **dino.VALUES,
    'region': region,
    'student_bag': student_bag,
    'teacher_bag': teacher_bag,
  }


def _released_values(num_prototypes: int) -> Mapping:
  def student_bag(outputs):
    image = outputs.student.image
    sums = [regions.sum(-2) for regions in outputs.student.regions]
    views = losses.released_kl(image, jnp.concatenate(sums, axis=1))
    # A view counts once for every pair that it is in.
    num_teacher, num_student = (
      outputs.teacher_image_probs.shape[1],
      image.shape[1],
    )
    count = image_losses.pair_mask(num_teacher, num_student).sum(0)
    pairs = image_losses.num_pairs(num_teacher, num_student)
    return views @ (count / pairs) / num_prototypes

  def teacher_bag(outputs):
    views = losses.released_kl(
      outputs.teacher_image_probs, outputs.teacher_region_probs.sum(-2)
    )
    return views.mean(1) / num_prototypes

  return {
    **esvit.VALUES,
    'student_bag': student_bag,
    'teacher_bag': teacher_bag,
  }


def _make_released(
  encoder: nn.Module,
  *,
  head: Mapping,
  weights: Mapping[str, float],
  lora: Mapping,
  axis_name: str | None,
  **kwargs,
) -> base.Method:
  networks = make_networks(
    encoder, head=head, axis_name=axis_name, lora=lora, regions=True
  )
  return distillation.make_distillation(
    networks,
    base.weighted_terms(_released_values(head['num_prototypes']), weights),
    axis_name=axis_name,
    **kwargs,
  )


def _make_paper(
  encoder: nn.Module,
  *,
  head: Mapping,
  mil: Mapping,
  weights: Mapping[str, float],
  pooling: str,
  kl_direction: str,
  attend_regions: bool,
  shared_prototypes: bool,
  lora: Mapping,
  axis_name: str | None,
  **kwargs,
) -> base.Method:
  for field, value, choices in (
    ('pooling', pooling, losses.POOLINGS),
    ('kl_direction', kl_direction, losses.KL_DIRECTIONS),
  ):
    if value not in choices:
      raise UserError(
        f'config.method.{field} is {value!r}: choose one of '
        f'{", ".join(choices)}'
      )
  attends = pooling in ('gated_attention', 'attention')
  if attend_regions and not attends:
    raise UserError(
      f'config.method.attend_regions needs attention, but pooling is '
      f'{pooling!r}: set one of attend_regions=False, pooling=gated_attention'
    )
  attention = heads.MilAttention(
    gated=pooling == 'gated_attention', dtype=encoder.dtype, **mil
  )
  networks = make_networks(
    encoder,
    head=head,
    axis_name=axis_name,
    lora=lora,
    regions=True,
    mil=attention if attends else None,
    shared_prototypes=shared_prototypes,
  )
  method = distillation.make_distillation(
    networks,
    base.weighted_terms(
      _paper_values(pooling, kl_direction, attend_regions), weights
    ),
    axis_name=axis_name,
    **kwargs,
  )
  # The maximum is normalised by its sum over all prototypes.
  return method._replace(sums_over_prototypes=pooling != 'max')


def make_cmd(encoder: nn.Module, *, variant: str, **kwargs) -> base.Method:
  """Builds CMD.

  Args:
    encoder: images -> `EncoderOutput`.
    variant: one of `VARIANTS`; this module's docstring has the formulas.
    **kwargs: for both variants
      head: arguments of `PrototypeHead`, both for images and for regions;
      weights: weights of the terms `image`, `region`, `student_bag` (L_S) and
        `teacher_bag` (L_T);
      lora, axis_name: arguments of `make_networks`;
      and the arguments of `make_distillation`. For 'paper' alone
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
  if variant == 'paper' and 'pooling' not in kwargs:
    raise UserError(
      "config.method.variant is 'paper', whose fields the config lacks: use "
      '--config=FILE:method=cmd'
    )
  if variant == 'paper':
    return _make_paper(encoder, **kwargs)
  unused = sorted({'mil', 'pooling', 'kl_direction'} & set(kwargs))
  if unused:
    raise UserError(
      f"config.method.variant is 'released', which has no {', '.join(unused)}: "
      'use --config=FILE:method=cmd_released'
    )
  return _make_released(encoder, **kwargs)
