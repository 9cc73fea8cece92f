"""The networks and the forward pass that DINO, EsViT and CMD share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from cmd_jax import parallel
from cmd_jax.errors import UserError
from cmd_jax.losses import dino as losses
from cmd_jax.methods.base import Method, MethodState, Params, Term
from cmd_jax.models import heads
from cmd_jax.schedules import Schedule

TEACHER_NORMALISATIONS = ('centring', 'sinkhorn')


class Networks(NamedTuple):
  """The modules of one network; the teacher has the same.

  Attributes:
    encoder: images -> `EncoderOutput`.
    image_head: g_I, image embedding -> logits over prototypes.
    region_head: g_R, tokens -> logits over prototypes; None without regions.
    mil: tokens -> attention; None where bags are not pooled by attention.
    shared_prototypes: g_R ends in g_I's last layer instead of its own.
  """

  encoder: nn.Module
  image_head: nn.Module
  region_head: nn.Module | None = None
  mil: nn.Module | None = None
  shared_prototypes: bool = False


class ViewOutput(NamedTuple):
  """What one network says of the views of one size.

  Attributes:
    embedding: [B, V, D] of the image.
    image_logits: [B, V, K].
    features: [B, V, N, D] tokens of the encoder.
    region_logits: [B, V, N, K]; None without a region head.
    attention: [B, V, N] of the student's MIL head; None without one.
  """

  embedding: jax.Array
  image_logits: jax.Array
  features: jax.Array
  region_logits: jax.Array | None
  attention: jax.Array | None


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
  """

  student: tuple[ViewOutput, ...]
  teacher: ViewOutput
  student_image_log_probs: jax.Array
  student_region_log_probs: tuple[jax.Array, ...]
  teacher_image_probs: jax.Array
  teacher_region_probs: jax.Array | None


def init_params(networks: Networks, rng: jax.Array, image_px: int) -> Params:
  """Initial parameters: a dict with one entry per module."""
  names = ('encoder', 'image_head', 'region_head', 'mil')
  rngs = dict(zip(names, jax.random.split(rng, len(names)), strict=True))
  image = jnp.zeros((1, image_px, image_px, 3))
  encoder_params = networks.encoder.init(rngs['encoder'], image)['params']
  output = jax.eval_shape(
    networks.encoder.apply, {'params': encoder_params}, image
  )
  embedding, tokens = (
    jnp.zeros(x.shape) for x in (output.image, output.tokens)
  )
  params = {
    'encoder': encoder_params,
    'image_head': networks.image_head.init(rngs['image_head'], embedding)[
      'params'
    ],
  }
  for name in ('region_head', 'mil'):
    module = getattr(networks, name)
    if module is not None:
      params[name] = module.init(rngs[name], tokens)['params']
  if networks.shared_prototypes:
    del params['region_head']['last_layer']
  return params


def apply_networks(
  networks: Networks,
  params: Params,
  views: jax.Array,
  uniforms: jax.Array | None = None,
) -> ViewOutput:
  """Runs one network on the views of one size, all in one batch.

  Args:
    networks: the modules.
    params: their parameters.
    views: [B, V, H, W, 3].
    uniforms: [B, V, depth, 2] draws for stochastic depth; None turns it off.
  """
  batch, num_views = views.shape[:2]

  def merge(x):
    return x.reshape(batch * num_views, *x.shape[2:])

  def split(x):
    return x.reshape(batch, num_views, *x.shape[1:])

  encoded = networks.encoder.apply(
    {'params': params['encoder']},
    merge(views),
    None if uniforms is None else merge(uniforms),
  )
  image_logits = networks.image_head.apply(
    {'params': params['image_head']}, encoded.image
  )
  region_logits = attention = None
  if networks.region_head is not None:
    head = params['region_head']
    if networks.shared_prototypes:
      head = {**head, 'last_layer': params['image_head']['last_layer']}
    region_logits = split(
      networks.region_head.apply({'params': head}, encoded.tokens)
    )
  if networks.mil is not None:
    attention = split(
      networks.mil.apply({'params': params['mil']}, encoded.tokens)
    )
  return ViewOutput(
    split(encoded.image),
    split(image_logits),
    split(encoded.tokens),
    region_logits,
    attention,
  )


def draw_uniforms(
  keys: jax.Array, size_index: int, num_views: int, depth: int
) -> jax.Array:
  """[B, V, depth, 2] draws that depend on the example's key alone."""

  def draw(key):
    key = jax.random.fold_in(key, size_index)
    return jax.random.uniform(key, (num_views, depth, 2))

  return jax.vmap(draw)(keys)


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

  Raises:
    UserError: unknown normalisation.
  """
  if teacher_normalisation not in TEACHER_NORMALISATIONS:
    raise UserError(
      f'config.teacher.normalisation is {teacher_normalisation!r}: '
      f'choose one of {", ".join(TEACHER_NORMALISATIONS)}'
    )

  def init(rng: jax.Array) -> tuple[Params, MethodState]:
    num_prototypes = networks.image_head.num_prototypes
    centres = {'image_centre': jnp.zeros(num_prototypes)}
    if networks.region_head is not None:
      centres['region_centre'] = jnp.zeros(num_prototypes)
    return init_params(networks, rng, image_px), centres

  def teacher_probs(logits, centre, step):
    temperature = teacher_temperature(step)
    if teacher_normalisation == 'sinkhorn':
      return losses.sinkhorn_probs(logits, temperature, axis_name=axis_name)
    return losses.centred_probs(logits, centre, temperature)

  def forward(params, teacher_params, method_state, views, keys, step):
    student = tuple(
      apply_networks(
        networks,
        params,
        images,
        draw_uniforms(keys, index, images.shape[1], networks.encoder.depth),
      )
      for index, images in enumerate(views)
    )
    teacher = jax.lax.stop_gradient(
      apply_networks(networks, teacher_params, views[0])
    )
    if networks.mil is not None:
      attention = networks.mil.apply(
        {'params': params['mil']}, teacher.features
      )
      teacher = teacher._replace(attention=attention)

    def log_probs(logits):
      return jax.nn.log_softmax(logits / student_temperature)

    has_regions = networks.region_head is not None
    return Outputs(
      student=student,
      teacher=teacher,
      student_image_log_probs=log_probs(
        jnp.concatenate([view.image_logits for view in student], axis=1)
      ),
      student_region_log_probs=tuple(
        log_probs(view.region_logits) for view in student if has_regions
      ),
      teacher_image_probs=teacher_probs(
        teacher.image_logits, method_state['image_centre'], step
      ),
      teacher_region_probs=teacher_probs(
        teacher.region_logits, method_state['region_centre'], step
      )
      if has_regions
      else None,
    )

  def update(method_state: MethodState, outputs: Outputs) -> MethodState:
    logits = {
      'image_centre': outputs.teacher.image_logits,
      'region_centre': outputs.teacher.region_logits,
    }
    return {
      name: losses.update_centre(
        centre, logits[name], momentum=centre_momentum, axis_name=axis_name
      )
      for name, centre in method_state.items()
    }

  def encode(params: Params, images: jax.Array):
    return networks.encoder.apply({'params': params['encoder']}, images)

  def embed(params: Params, images: jax.Array) -> jax.Array:
    return encode(params, images).image

  def attend(params: Params, images: jax.Array) -> jax.Array:
    encoded = encode(params, images)
    if networks.mil is None:
      return encoded.attention.mean(1)
    return networks.mil.apply({'params': params['mil']}, encoded.tokens)

  return Method(
    init=init,
    forward=forward,
    terms=terms,
    monitors=lambda outputs: _monitors(outputs, axis_name),
    update=update,
    embed=embed,
    attend=attend,
  )


def make_heads(
  count: int, encoder: nn.Module, head: Mapping
) -> tuple[Callable, ...]:
  """`count` prototype heads that compute in the encoder's dtype."""
  return tuple(
    heads.PrototypeHead(dtype=encoder.dtype, **head) for _ in range(count)
  )
