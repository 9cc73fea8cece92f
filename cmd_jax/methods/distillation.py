"""The forward pass and the state that DINO, EsViT and CMD share."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cmd_jax import parallel
from cmd_jax.errors import UserError
from cmd_jax.losses import dino as losses
from cmd_jax.methods.base import Method, MethodState, Params, Seen, Term
from cmd_jax.methods.networks import (
  Networks,
  Prototypes,
  Stats,
  ViewFeatures,
  ViewOutput,
  apply_networks,
  draw_uniforms,
  encoder_variables,
  init_networks,
  prototypes_of,
  with_logits,
)
from cmd_jax.models import partial
from cmd_jax.models.heads import l2_normalise, prototype_logits
from cmd_jax.models.layers import EncoderOutput
from cmd_jax.schedules import Schedule

TEACHER_NORMALISATIONS = ('centring', 'sinkhorn')


class Examples(NamedTuple):
  """What the networks say of each example, prototypes aside.

  Attributes:
    student: for each view size; the first size is the teacher's.
    teacher: for the teacher's views; the attention is that of the student's
      MIL head on the teacher's tokens and alone has a gradient.
  """

  student: tuple[ViewFeatures, ...]
  teacher: ViewFeatures


class Constants(NamedTuple):
  """What the comparison needs besides, without gradient.

  Attributes:
    prototypes: the teacher's.
    centres: [K] of each of the teacher's heads, by 'image' and 'region'.
    temperature: tau_t, scalar.
  """

  prototypes: Prototypes
  centres: Mapping[str, jax.Array]
  temperature: jax.Array


class Outputs(NamedTuple):
  """Everything the terms of the loss are made of.

  Attributes:
    student: outputs for each view size; the first size is the teacher's.
    teacher: outputs for the teacher's views.
    student_image_log_probs: [B, V, K] over all views.
    student_region_log_probs: [B, V, N, K] for each view size.
    teacher_image_probs: [B, T, K].
    teacher_region_probs: [B, T, N, K]; None without a region head.
  """

  student: tuple[ViewOutput, ...]
  teacher: ViewOutput
  student_image_log_probs: jax.Array
  student_region_log_probs: tuple[jax.Array, ...]
  teacher_image_probs: jax.Array
  teacher_region_probs: jax.Array | None


def make_outputs(
  student: tuple[ViewOutput, ...],
  teacher: ViewOutput,
  *,
  student_temperature: float,
  centres: Mapping[str, jax.Array],
  teacher_temperature: jax.Array,
) -> Outputs:
  """Adds the distributions, softmax(logits / tau).

  Args:
    student: outputs for each view size.
    teacher: outputs for the teacher's views.
    student_temperature: tau_s.
    centres: see `Constants`.
    teacher_temperature: tau_t.
  """

  def log_probs(logits):
    return jax.nn.log_softmax(logits / student_temperature)

  def teacher_probs(name, logits):
    if logits is None:
      return None
    return losses.centred_probs(logits, centres[name], teacher_temperature)

  return Outputs(
    student=student,
    teacher=teacher,
    student_image_log_probs=log_probs(
      jnp.concatenate([view.image_logits for view in student], axis=1)
    ),
    student_region_log_probs=tuple(
      log_probs(view.region_logits)
      for view in student
      if view.region_logits is not None
    ),
    teacher_image_probs=teacher_probs('image', teacher.image_logits),
    teacher_region_probs=teacher_probs('region', teacher.region_logits),
  )


def compare(
  prototypes: Prototypes,
  examples: Examples,
  constants: Constants,
  *,
  student_temperature: float,
) -> Outputs:
  """Looks at the prototypes.

  Args:
    prototypes: the student's.
    examples: what the networks say.
    constants: see `Constants`.
    student_temperature: tau_s.
  """
  return make_outputs(
    tuple(with_logits(view, prototypes) for view in examples.student),
    with_logits(examples.teacher, constants.prototypes),
    student_temperature=student_temperature,
    centres=constants.centres,
    teacher_temperature=constants.temperature,
  )


def logit_bytes(seen: Seen) -> int:
  """Bytes of the float32 logits of an example, of both networks."""
  total = 0
  for view in (*seen.examples.student, seen.examples.teacher):
    for features, prototypes in (
      (view.image_bottleneck, seen.prototypes.image),
      (view.region_bottleneck, seen.prototypes.region),
    ):
      if features is not None:
        rows = math.prod(features.shape[1:-1])
        total += 4 * rows * prototypes.shape[1]
  return total


def example_monitors(outputs: Outputs) -> dict[str, jax.Array]:
  """[B] of each: what shows a collapse before the loss does."""
  entropy = losses.entropy(outputs.teacher_image_probs).mean(1)
  cross_entropy = losses.image_loss(
    outputs.teacher_image_probs, outputs.student_image_log_probs
  )
  monitors = {
    'teacher_entropy': entropy,
    'student_teacher_kl': cross_entropy - entropy,
  }
  if outputs.teacher.attention is not None:
    attention = outputs.teacher.attention
    relative = losses.entropy(attention) / jnp.log(attention.shape[-1])
    monitors['attention_entropy'] = relative.mean(1)
  return monitors


def feature_spread(
  embedding: jax.Array, axis_name: str | None
) -> dict[str, jax.Array]:
  """1 for directions spread evenly over the sphere, 0 for a single one.

  Args:
    embedding: [B, T, D] of the teacher.
    axis_name: axis over which the batch is spread, None if it is global.
  """
  unit = l2_normalise(embedding)
  mean = parallel.pmean(unit.mean((0, 1)), axis_name)
  return {'feature_spread': jnp.sqrt(jnp.maximum(1 - jnp.sum(mean**2), 0))}


class Centring(NamedTuple):
  """How the teacher's logits are normalised.

  Attributes:
    normalisation: one of `TEACHER_NORMALISATIONS`.
    momentum: of the moving average of the logits, for 'centring'.
    axis_name: axis over which the batch is spread, None if it is global.
    mesh: the devices over which global arrays are spread; None for arrays of
      one device.
  """

  normalisation: str
  momentum: float
  axis_name: str | None
  mesh: Mesh | None

  def check(self) -> None:
    """Raises UserError for an unknown normalisation."""
    if self.normalisation not in TEACHER_NORMALISATIONS:
      raise UserError(
        f'config.teacher.normalisation is {self.normalisation!r}: '
        f'choose one of {", ".join(TEACHER_NORMALISATIONS)}'
      )

  def centres(
    self,
    method_state: MethodState,
    teacher: ViewFeatures,
    prototypes: Prototypes,
    temperature: jax.Array,
  ) -> dict[str, jax.Array]:
    """[K] of each head: what is subtracted from the teacher's logits.

    Args:
      method_state: with the moving averages.
      teacher: what the teacher says.
      prototypes: the teacher's.
      temperature: tau_t.
    """
    centres = {}
    for name, features in bottlenecks(teacher).items():
      if self.normalisation == 'centring':
        centres[name] = method_state[f'{name}_centre']
        continue
      centres[name] = losses.sinkhorn_centre(
        features,
        getattr(prototypes, name),
        temperature,
        axis_name=self.axis_name,
        mesh=self.mesh,
      )
    return centres

  def update(
    self, method_state: MethodState, seen: Seen, teacher: ViewFeatures
  ) -> dict[str, jax.Array]:
    """The moving averages after a step, by their names in the state."""
    return {
      f'{name}_centre': losses.update_centre(
        method_state[f'{name}_centre'],
        # Logits are linear: their mean is that of the features times the
        # prototypes.
        prototype_logits(
          features.astype(jnp.float32).mean(tuple(range(features.ndim - 1))),
          getattr(seen.constants.prototypes, name),
        ),
        momentum=self.momentum,
        axis_name=self.axis_name,
      )
      for name, features in bottlenecks(teacher).items()
    }


def bottlenecks(view: ViewFeatures) -> dict[str, jax.Array]:
  """What the heads there are say, by 'image' and 'region'."""
  found = {'image': view.image_bottleneck, 'region': view.region_bottleneck}
  return {name: x for name, x in found.items() if x is not None}


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
  mesh: Mesh | None = None,
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
    mesh: the devices over which a global batch is spread; None for arrays of
      one device.
    is_frozen: from `partial.make_is_frozen`.

  Raises:
    UserError: unknown normalisation.
  """
  centring = Centring(teacher_normalisation, centre_momentum, axis_name, mesh)
  centring.check()

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
    params = partial.freeze(params, is_frozen)
    student, student_stats = apply_networks(
      networks,
      params,
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
    prototypes = jax.lax.stop_gradient(prototypes_of(networks, teacher_params))
    temperature = teacher_temperature(step)
    centres = centring.centres(method_state, teacher, prototypes, temperature)
    if networks.mil is not None:
      attention = networks.mil.apply(
        {'params': params['mil']}, teacher.features
      )
      teacher = teacher._replace(attention=attention)
    return Seen(
      Examples(student, teacher),
      prototypes_of(networks, params),
      Constants(prototypes, centres, temperature),
      {'student_stats': student_stats, 'teacher_stats': teacher_stats},
    )

  def update(method_state: MethodState, seen: Seen) -> MethodState:
    centres = centring.update(method_state, seen, seen.examples.teacher)
    return {
      name: centres[name]
      if name in centres
      else partial.keep_frozen(seen.stats[name], value, is_frozen)
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
    compare=functools.partial(compare, student_temperature=student_temperature),
    logit_bytes=logit_bytes,
    terms=terms,
    example_monitors=example_monitors,
    monitors=lambda seen: feature_spread(
      seen.examples.teacher.embedding, axis_name
    ),
    update=update,
    encoder_variables=variables,
    embed=embed,
    attend=attend,
  )
