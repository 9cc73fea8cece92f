"""CMD (Bi et al. 2025): EsViT and distillation across the two levels.

  L = w_image L_I + w_region L_R + w_student_bag L_S + w_teacher_bag L_T

An image is a bag of patches; multi-instance attention a decides what each of
them counts in L_R, L_S and L_T (cmd_jax/losses has the equations).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn

from cmd_jax.errors import UserError
from cmd_jax.losses import cmd as losses
from cmd_jax.losses import esvit as region_losses
from cmd_jax.methods import base, dino, distillation, esvit
from cmd_jax.models import heads


def _weights(view: distillation.ViewOutput, pooling: str) -> jax.Array | None:
  """[B, V, N] weights of the bag; None pools by the maximum."""
  if pooling == 'max':
    return None
  if view.attention is not None:
    return view.attention
  shape = view.features.shape[:-1]
  return jnp.full(shape, 1 / shape[-1])


def _values(pooling: str, kl_direction: str, attend_regions: bool) -> Mapping:
  def region(outputs, state):
    if not attend_regions:
      return esvit.region_value(outputs, state)
    return region_losses.region_loss(
      outputs.teacher_region_probs,
      outputs.teacher.features,
      outputs.student_region_log_probs,
      tuple(view.features for view in outputs.student),
      tuple(view.attention for view in outputs.student),
    )

  def student_bag(outputs, _):
    bags = jnp.concatenate(
      [
        losses.bag_distribution(jnp.exp(log_probs), _weights(view, pooling))
        for view, log_probs in zip(
          outputs.student, outputs.student_region_log_probs, strict=True
        )
      ],
      axis=1,
    )
    image = jnp.exp(outputs.student_image_log_probs)
    return losses.cross_level_kl(image, bags, direction=kl_direction)

  def teacher_bag(outputs, _):
    bags = losses.bag_distribution(
      outputs.teacher_region_probs, _weights(outputs.teacher, pooling)
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


def make_cmd(
  encoder: nn.Module,
  *,
  head: Mapping,
  mil: Mapping,
  weights: Mapping[str, float],
  variant: str,
  pooling: str,
  kl_direction: str,
  attend_regions: bool,
  shared_prototypes: bool,
  **kwargs,
) -> base.Method:
  """Builds CMD.

  Args:
    encoder: images -> `EncoderOutput`.
    head: arguments of `PrototypeHead`, both for images and for regions.
    mil: arguments of `MilAttention` but `gated`, which `pooling` decides.
    weights: weights of the terms `image`, `region`, `student_bag` (L_S) and
      `teacher_bag` (L_T).
    variant: 'paper', the equations of the modules in cmd_jax/losses.
    pooling: how a bag is pooled, one of `losses.cmd.POOLINGS`.
    kl_direction: one of `losses.cmd.KL_DIRECTIONS`.
    attend_regions: weights L_R by the attention; otherwise it is EsViT's.
    shared_prototypes: both heads end in the same prototypes.
    **kwargs: arguments of `make_distillation`.

  Raises:
    UserError: an unknown choice, or one that contradicts another.
  """
  for field, value, choices in (
    ('variant', variant, ('paper',)),
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
  image_head, region_head = distillation.make_heads(2, encoder, head)
  attention = heads.MilAttention(
    gated=pooling == 'gated_attention', dtype=encoder.dtype, **mil
  )
  return distillation.make_distillation(
    distillation.Networks(
      encoder,
      image_head,
      region_head,
      mil=attention if attends else None,
      shared_prototypes=shared_prototypes,
    ),
    base.weighted_terms(
      _values(pooling, kl_direction, attend_regions), weights
    ),
    **kwargs,
  )
