"""The forward pass and the state that DINO, EsViT and CMD share."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cmd_jax.methods import monitors as watched
from cmd_jax.methods.base import Method, MethodState, Params, Seen, Term
from cmd_jax.methods.centring import Centring
from cmd_jax.methods.comparison import (
  Constants,
  compute_scores,
  gather_examples,
  make_outputs,
)
from cmd_jax.methods.networks import (
  Networks,
  Stats,
  apply_networks,
  draw_uniforms,
  encoder_variables,
  init_networks,
  prototypes_of,
)
from cmd_jax.models import partial
from cmd_jax.models.layers import EncoderOutput
from cmd_jax.optim.schedules import Schedule


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
    teacher_normalisation: one of `centring.TEACHER_NORMALISATIONS`.
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
    values = watched.feature_spread(seen.targets.embedding, axis_name)
    if networks.image_head is not None:
      values |= watched.centre_norm(seen.targets.image_bottleneck, axis_name)
    if networks.mil is not None:
      values |= watched.attention_entropy(
        seen.examples.teacher_attention, axis_name
      )
    return values

  return Method(
    init=init,
    forward=forward,
    scores=functools.partial(
      compute_scores, student_temperature=student_temperature
    ),
    outputs=functools.partial(make_outputs, num_prototypes=num_prototypes),
    terms=terms,
    example_monitors=watched.example_monitors,
    monitors=monitors,
    update=update,
    encoder_variables=variables,
    embed=embed,
    attend=attend,
  )
