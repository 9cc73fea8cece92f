"""The forward pass and the state that DINO, EsViT and CMD share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cmd_jax import parallel
from cmd_jax.errors import UserError
from cmd_jax.losses import dino as losses
from cmd_jax.methods.base import Method, MethodState, Params, Term
from cmd_jax.methods.networks import (
  Networks,
  Stats,
  ViewOutput,
  apply_networks,
  draw_uniforms,
  encoder_variables,
  init_networks,
)
from cmd_jax.models import heads, partial
from cmd_jax.models.layers import EncoderOutput
from cmd_jax.schedules import Schedule

TEACHER_NORMALISATIONS = ('centring', 'sinkhorn')


class Outputs(NamedTuple):
  """Everything the terms of the loss are made of.

  Attributes:
    student: outputs for each view size; the first size is the teacher's.
    teacher: outputs for the teacher's views; the attention is that of the
      student's MIL head on the teacher's tokens and alone has a gradient.
    student_image_log_probs: [B, V, K] over all views.
    student_region_log_probs: [B, V, N, K] for each view size.
    teacher_image_probs: [B, T, K].
    teacher_region_probs: [B, T, N, K]; None without a region head.
    student_stats: running batch statistics of the student after this pass,
      by module; empty without batch normalisation.
    teacher_stats: the teacher's.
  """

  student: tuple[ViewOutput, ...]
  teacher: ViewOutput
  student_image_log_probs: jax.Array
  student_region_log_probs: tuple[jax.Array, ...]
  teacher_image_probs: jax.Array
  teacher_region_probs: jax.Array | None
  student_stats: Stats
  teacher_stats: Stats


def make_outputs(
  student: tuple[ViewOutput, ...],
  teacher: ViewOutput,
  *,
  student_temperature: float,
  **fields,
) -> Outputs:
  """Adds the student's distributions, softmax(logits / tau_s).

  Args:
    student: outputs for each view size.
    teacher: outputs for the teacher's views.
    student_temperature: tau_s.
    **fields: the other attributes of `Outputs`.
  """

  def log_probs(logits):
    return jax.nn.log_softmax(logits / student_temperature)

  image_logits = [view.image_logits for view in student]
  return Outputs(
    student=student,
    teacher=teacher,
    student_image_log_probs=log_probs(jnp.concatenate(image_logits, axis=1)),
    student_region_log_probs=tuple(
      log_probs(view.region_logits)
      for view in student
      if view.region_logits is not None
    ),
    **fields,
  )


def make_teacher_probs(
  normalisation: str, temperature: Schedule, axis_name: str | None
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
  """What makes (logits [..., K], centre [K], step) the teacher's distributions.

  Args:
    normalisation: one of `TEACHER_NORMALISATIONS`.
    temperature: tau_t, a schedule.
    axis_name: axis over which the batch is spread, None if it is global.

  Raises:
    UserError: unknown normalisation.
  """
  if normalisation not in TEACHER_NORMALISATIONS:
    raise UserError(
      f'config.teacher.normalisation is {normalisation!r}: '
      f'choose one of {", ".join(TEACHER_NORMALISATIONS)}'
    )

  def teacher_probs(logits, centre, step):
    if normalisation == 'sinkhorn':
      return losses.sinkhorn_probs(
        logits, temperature(step), axis_name=axis_name
      )
    return losses.centred_probs(logits, centre, temperature(step))

  return teacher_probs


def _monitors(outputs: Outputs, axis_name: str | None) -> dict[str, jax.Array]:
  """Scalars that show a collapse before the loss does."""
  entropy = losses.entropy(outputs.teacher_image_probs).mean(1)  # [B]
  cross_entropy = losses.image_loss(
    outputs.teacher_image_probs, outputs.student_image_log_probs
  )
  unit = heads.l2_normalise(outputs.teacher.embedding)  # [B, T, D]
  monitors = {
    'teacher_entropy': entropy.mean(),
    'student_teacher_kl': (cross_entropy - entropy).mean(),
    'mean_direction': unit.mean((0, 1)),
  }
  if outputs.teacher.attention is not None:
    attention = outputs.teacher.attention
    relative = losses.entropy(attention) / jnp.log(attention.shape[-1])
    monitors['attention_entropy'] = relative.mean()
  monitors = parallel.pmean(monitors, axis_name)
  # 1 for directions spread evenly over the sphere, 0 for a single one.
  mean_direction = monitors.pop('mean_direction')
  monitors['feature_spread'] = jnp.sqrt(
    jnp.maximum(1 - jnp.sum(mean_direction**2), 0)
  )
  return monitors


def make_distillation(
  networks: Networks,
  terms: Mapping[str, Term],
  *,
  image_px: int,
  student_temperature: float,
  teacher_temperature: Schedule,
  centre_momentum: float,
  teacher_normalisation: str,
  axis_name: str | None,
  is_frozen: partial.IsFrozen = lambda path: False,
) -> Method:
  """A method whose student learns the teacher's distributions.

  Args:
    networks: the modules.
    terms: the loss.
    image_px: side of the images with which the encoder is initialised.
    student_temperature: tau_s.
    teacher_temperature: tau_t, a schedule.
    centre_momentum: momentum of the centres of the teacher's logits.
    teacher_normalisation: one of `TEACHER_NORMALISATIONS`.
    axis_name: axis over which the batch is spread, None if it is global.
    is_frozen: from `partial.make_is_frozen`.

  Raises:
    UserError: unknown normalisation.
  """
  teacher_probs = make_teacher_probs(
    teacher_normalisation, teacher_temperature, axis_name
  )

  def init(rng: jax.Array) -> tuple[Params, MethodState]:
    num_prototypes = networks.image_head.num_prototypes
    method_state = {'image_centre': jnp.zeros(num_prototypes)}
    if networks.region_head is not None:
      method_state['region_centre'] = jnp.zeros(num_prototypes)
    params, stats = init_networks(networks, rng, image_px)
    if stats:
      method_state['student_stats'] = stats
      # A copy, as of the teacher's parameters.
      method_state['teacher_stats'] = jax.tree.map(jnp.copy, stats)
    return params, method_state

  def forward(params, teacher_params, method_state, views, keys, step):
    student, student_stats = apply_networks(
      networks,
      partial.freeze(params, is_frozen),
      method_state.get('student_stats', {}),
      views,
      [
        draw_uniforms(keys, index, images.shape[1], networks.encoder.depth)
        for index, images in enumerate(views)
      ],
    )
    (teacher,), teacher_stats = jax.lax.stop_gradient(
      apply_networks(
        networks,
        teacher_params,
        method_state.get('teacher_stats', {}),
        views[:1],
      )
    )
    if networks.mil is not None:
      attention = networks.mil.apply(
        {'params': params['mil']}, teacher.features
      )
      teacher = teacher._replace(attention=attention)

    image_probs = teacher_probs(
      teacher.image_logits, method_state['image_centre'], step
    )
    region_probs = None
    if networks.region_head is not None:
      region_probs = teacher_probs(
        teacher.region_logits, method_state['region_centre'], step
      )
    return make_outputs(
      student,
      teacher,
      student_temperature=student_temperature,
      teacher_image_probs=image_probs,
      teacher_region_probs=region_probs,
      student_stats=student_stats,
      teacher_stats=teacher_stats,
    )

  def update(method_state: MethodState, outputs: Outputs) -> MethodState:
    logits = {
      'image_centre': outputs.teacher.image_logits,
      'region_centre': outputs.teacher.region_logits,
    }
    stats = {
      'student_stats': outputs.student_stats,
      'teacher_stats': outputs.teacher_stats,
    }
    return {
      name: losses.update_centre(
        value, logits[name], momentum=centre_momentum, axis_name=axis_name
      )
      if name in logits
      else partial.keep_frozen(stats[name], value, is_frozen)
      for name, value in method_state.items()
    }

  def variables(params: Params, stats: Stats) -> Mapping:
    return encoder_variables(networks, params, stats)

  def encode(params: Params, stats: Stats, images: jax.Array) -> EncoderOutput:
    return networks.encoder.apply(variables(params, stats), images)

  def embed(params: Params, stats: Stats, images: jax.Array) -> jax.Array:
    return encode(params, stats, images).image

  def attend(params: Params, stats: Stats, images: jax.Array) -> jax.Array:
    encoded = encode(params, stats, images)
    if networks.mil is not None:
      return networks.mil.apply({'params': params['mil']}, encoded.tokens)
    if encoded.attention is not None:
      return encoded.attention.mean(1)
    return jnp.linalg.norm(encoded.tokens, axis=-1)

  return Method(
    init=init,
    forward=forward,
    terms=terms,
    monitors=lambda outputs: _monitors(outputs, axis_name),
    update=update,
    encoder_variables=variables,
    embed=embed,
    attend=attend,
  )
