"""The forward pass and the state that DINO, EsViT and CMD share."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cmd_jax import parallel
from cmd_jax.errors import UserError
from cmd_jax.losses import dino as losses
from cmd_jax.losses import streaming
from cmd_jax.losses.esvit import match_tokens
from cmd_jax.losses.streaming import Scores
from cmd_jax.methods.base import Method, MethodState, Params, Seen, Term
from cmd_jax.methods.networks import (
  Networks,
  Prototypes,
  Stats,
  ViewFeatures,
  apply_networks,
  draw_uniforms,
  encoder_variables,
  init_networks,
  prototypes_of,
)
from cmd_jax.models import partial
from cmd_jax.models.heads import l2_normalise, prototype_logits
from cmd_jax.models.layers import EncoderOutput, wide
from cmd_jax.schedules import Schedule

TEACHER_NORMALISATIONS = ('centring', 'sinkhorn')


class Examples(NamedTuple):
  """What the student says of each example, prototypes aside; with gradient.

  Tuples have an element for each view size, the teacher's first; they are empty
  where there is no such head.

  Attributes:
    image_bottlenecks: [B, V, d] of the image head, of length 1.
    region_bottlenecks: [B, V, N, d] of the region head.
    attention: [B, V, N] of the MIL head.
    teacher_attention: [B, T, N] of the MIL head on the teacher's tokens; None
      without one.
  """

  image_bottlenecks: tuple[jax.Array, ...]
  region_bottlenecks: tuple[jax.Array, ...]
  attention: tuple[jax.Array, ...]
  teacher_attention: jax.Array | None


class Targets(NamedTuple):
  """What the teacher says of each example, without gradient.

  Attributes:
    embedding: [B, T, D] of the image.
    image_bottleneck: [B, T, d]; None without an image head.
    region_bottleneck: [B, T, N, d]; None without a region head.
    matches: [B, T, V, N] for each view size: the teacher's token that is most
      like each of the student's; empty without a region head.
  """

  embedding: jax.Array
  image_bottleneck: jax.Array | None
  region_bottleneck: jax.Array | None
  matches: tuple[jax.Array, ...]


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


class Logits(NamedTuple):
  """A network's logits over its temperature, for all or some prototypes.

  Attributes:
    image: [B, V, K] over all views; None without an image head.
    regions: [B, V, N, K] for each view size; empty without a region head.
  """

  image: jax.Array | None
  regions: tuple[jax.Array, ...]


class Outputs(NamedTuple):
  """Everything the terms of the loss are made of, for all or some prototypes.

  Attributes:
    share: of the prototypes that is here.
    student: the student's logits over tau_s.
    normalisers: their logsumexp over all prototypes, [B, V] and [B, V, N].
    student_image_log_probs: [B, V, K] over all views.
    student_region_log_probs: [B, V, N, K] for each view size.
    teacher_image_probs: [B, T, K].
    teacher_region_probs: [B, T, N, K]; None without a region head.
    attention: [B, V, N] for each view size.
    teacher_attention: [B, T, N]; None without MIL head.
    matches: see `Targets`.
  """

  share: float
  student: Logits
  normalisers: Logits
  student_image_log_probs: jax.Array
  student_region_log_probs: tuple[jax.Array, ...]
  teacher_image_probs: jax.Array
  teacher_region_probs: jax.Array | None
  attention: tuple[jax.Array, ...]
  teacher_attention: jax.Array | None
  matches: tuple[jax.Array, ...]


def compute_scores(
  prototypes: Prototypes,
  constants: Constants,
  examples: Examples,
  targets: Targets,
  *,
  student_temperature: float,
) -> Scores:
  """Looks at prototypes: the `Logits` of both networks.

  Args:
    prototypes: the student's.
    constants: of the teacher.
    examples: what the student says.
    targets: what the teacher says.
    student_temperature: tau_s.
  """

  def of_network(prototypes, images, regions, scale):
    image, regions = None, tuple(regions)
    if images and prototypes.image is not None:
      image = scale(
        'image',
        prototype_logits(
          jnp.concatenate(images, axis=1), prototypes.image.kernel()
        ),
      )
    if regions:
      kernel = prototypes.region.kernel()
      regions = tuple(
        scale('region', prototype_logits(x, kernel)) for x in regions
      )
    return Logits(image, regions)

  def of_student(_, logits):
    return logits / student_temperature

  def of_teacher(name, logits):
    return (logits - constants.centres[name]) / constants.temperature

  def given(x):
    return () if x is None else (x,)

  return Scores(
    of_network(
      prototypes,
      examples.image_bottlenecks,
      examples.region_bottlenecks,
      of_student,
    ),
    of_network(
      constants.prototypes,
      given(targets.image_bottleneck),
      given(targets.region_bottleneck),
      of_teacher,
    ),
  )


def make_outputs(
  scores: Scores,
  normalisers: Scores,
  examples: Examples,
  targets: Targets,
  *,
  num_prototypes: int,
) -> Outputs:
  """Adds the distributions, softmax(logits / tau).

  Args:
    scores: `Logits` of both networks for all or some prototypes.
    normalisers: their logsumexp over all prototypes.
    examples: what the student says.
    targets: what the teacher says.
    num_prototypes: K.
  """

  def log_probs(logits, normaliser):
    return logits - normaliser[..., None]

  student = jax.tree.map(log_probs, scores.student, normalisers.student)
  teacher = jax.tree.map(
    lambda *x: jnp.exp(log_probs(*x)), scores.teacher, normalisers.teacher
  )
  return Outputs(
    share=scores.student.image.shape[-1] / num_prototypes,
    student=scores.student,
    normalisers=normalisers.student,
    student_image_log_probs=student.image,
    student_region_log_probs=student.regions,
    teacher_image_probs=teacher.image,
    teacher_region_probs=teacher.regions[0] if teacher.regions else None,
    attention=examples.attention,
    teacher_attention=examples.teacher_attention,
    matches=targets.matches,
  )


def example_monitors(outputs: Outputs) -> dict[str, jax.Array]:
  """[B] of each: what shows a collapse before the loss does."""
  entropy = losses.entropy(outputs.teacher_image_probs).mean(1)
  cross_entropy = losses.image_loss(
    outputs.teacher_image_probs, outputs.student_image_log_probs
  )
  return {
    'teacher_entropy': entropy,
    'student_teacher_kl': cross_entropy - entropy,
  }


def attention_entropy(
  attention: jax.Array, axis_name: str | None
) -> dict[str, jax.Array]:
  """1 for uniform attention, 0 for attention on a single patch.

  Args:
    attention: [B, T, N] that adds up to 1 over N.
    axis_name: axis over which the batch is spread, None if it is global.
  """
  if attention.shape[-1] == 1:
    return {}  # Of a single patch it says nothing.
  relative = losses.entropy(attention).mean() / jnp.log(attention.shape[-1])
  return {'attention_entropy': parallel.pmean(relative, axis_name)}


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


def centre_norm(
  bottleneck: jax.Array, axis_name: str | None
) -> dict[str, jax.Array]:
  """Length of the centre before the prototypes: 1 if all logits are the same.

  The centre of a batch's logits is the product of this mean and the prototypes.

  Args:
    bottleneck: [B, T, d] of the teacher, of length 1.
    axis_name: axis over which the batch is spread, None if it is global.
  """
  mean = parallel.pmean(
    bottleneck.astype(wide(bottleneck.dtype)).mean((0, 1)), axis_name
  )
  return {'centre_norm': jnp.linalg.norm(mean)}


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
    targets: Targets,
    prototypes: Prototypes,
    temperature: jax.Array,
  ) -> dict[str, jax.Array]:
    """[K] of each head: what is subtracted from the teacher's logits.

    Args:
      method_state: with the moving averages.
      targets: what the teacher says.
      prototypes: the teacher's.
      temperature: tau_t.
    """
    centres = {}
    for name, features in _bottlenecks(targets).items():
      if self.normalisation == 'centring':
        centres[name] = method_state[f'{name}_centre']
        continue
      centres[name] = losses.sinkhorn_centre(
        features,
        getattr(prototypes, name).kernel(),
        temperature,
        axis_name=self.axis_name,
        mesh=self.mesh,
      )
    return centres

  def update(self, method_state: MethodState, seen: Seen) -> dict:
    """The moving averages after a step, by their names in the state."""
    centres = {}
    for name, features in _bottlenecks(seen.targets).items():
      # Logits are linear: their mean is that of the features times the
      # prototypes.
      axes = tuple(range(features.ndim - 1))
      mean = features.astype(wide(features.dtype)).mean(axes)
      logits = streaming.over_prototypes(
        lambda weights, mean=mean: prototype_logits(mean, weights.kernel()),
        getattr(seen.constants.prototypes, name),
      )
      centres[f'{name}_centre'] = losses.update_centre(
        method_state[f'{name}_centre'],
        logits,
        momentum=self.momentum,
        axis_name=self.axis_name,
      )
    return centres


def _bottlenecks(targets: Targets) -> dict[str, jax.Array]:
  """What the teacher's heads there are say, by 'image' and 'region'."""
  found = {
    'image': targets.image_bottleneck,
    'region': targets.region_bottleneck,
  }
  return {name: x for name, x in found.items() if x is not None}


def gather_examples(
  student: Sequence[ViewFeatures], teacher: ViewFeatures
) -> tuple[Examples, Targets]:
  """What both networks say, by whether it has a gradient.

  Args:
    student: for each view size.
    teacher: for the teacher's views.
  """
  matches = ()
  if teacher.region_bottleneck is not None:
    matches = tuple(
      match_tokens(view.features, teacher.features) for view in student
    )

  def given(name):
    values = (getattr(view, name) for view in student)
    return tuple(x for x in values if x is not None)

  return (
    Examples(
      given('image_bottleneck'),
      given('region_bottleneck'),
      given('attention'),
      None,
    ),
    Targets(
      teacher.embedding,
      teacher.image_bottleneck,
      teacher.region_bottleneck,
      matches,
    ),
  )


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
  num_prototypes = 0
  if networks.image_head is not None:
    num_prototypes = networks.image_head.num_prototypes
  centring = Centring(teacher_normalisation, centre_momentum, axis_name, mesh)
  centring.check()

  def init(rng: jax.Array) -> tuple[Params, MethodState]:
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
    examples, targets = gather_examples(student, teacher)
    centres = centring.centres(method_state, targets, prototypes, temperature)
    if networks.mil is not None:
      attention = networks.mil.apply(
        {'params': params['mil']}, teacher.features
      )
      examples = examples._replace(teacher_attention=attention)
    return Seen(
      examples,
      targets,
      prototypes_of(networks, params),
      Constants(prototypes, centres, temperature),
      {'student_stats': student_stats, 'teacher_stats': teacher_stats},
    )

  def update(method_state: MethodState, seen: Seen) -> MethodState:
    centres = centring.update(method_state, seen)
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

  def monitors(seen: Seen) -> dict[str, jax.Array]:
    values = feature_spread(seen.targets.embedding, axis_name)
    if networks.image_head is not None:
      values |= centre_norm(seen.targets.image_bottleneck, axis_name)
    if networks.mil is not None:
      values |= attention_entropy(seen.examples.teacher_attention, axis_name)
    return values

  return Method(
    init=init,
    forward=forward,
    scores=functools.partial(
      compute_scores, student_temperature=student_temperature
    ),
    outputs=functools.partial(make_outputs, num_prototypes=num_prototypes),
    terms=terms,
    example_monitors=example_monitors,
    monitors=monitors,
    update=update,
    encoder_variables=variables,
    embed=embed,
    attend=attend,
  )
