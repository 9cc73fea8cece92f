"""Distillation of a frozen teacher of any architecture into any encoder.

Both networks see the same augmented view (Beyer et al. 2022, "Knowledge
distillation: a good teacher is patient and consistent"). What the student says
of it is projected to the width of the teacher's features and compared with
them; the projectors are thrown away after training.

The moving average of the student that every run keeps is scored as its teacher,
but nothing is learned from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from cmd_jax.data.batch import Views
from cmd_jax.devices import sharding
from cmd_jax.errors import UserError
from cmd_jax.losses.distil import cosine_distance, similarity_kl
from cmd_jax.methods import metrics
from cmd_jax.methods.base import (
  Loss,
  Method,
  MethodState,
  Params,
  Setting,
  Term,
  weighted_terms,
)
from cmd_jax.methods.networks import (
  Networks,
  Stats,
  ViewFeatures,
  apply_networks,
  draw_uniforms,
  encoder_variables,
  init_networks,
  make_networks,
)
from cmd_jax.models import partial
from cmd_jax.models.heads import l2_normalise
from cmd_jax.models.layers import Dense, EncoderOutput, wide
from cmd_jax.models.mlp_heads import make_mlp_head

LOSSES = ('cosine', 'kl')
# Of `Method.constants`, and of the state.
_TEACHER, _QUEUE = 'frozen_teacher', 'queue'


class FrozenTeacher(NamedTuple):
  """The network that is distilled; no step changes it.

  Attributes:
    encoder: images -> `layers.EncoderOutput`.
    variables: what it is applied to.
    view_px: side to which the views are resized for it; 0 for their own.
  """

  encoder: nn.Module
  variables: Mapping[str, Any]
  view_px: int = 0


class Compared(NamedTuple):
  """What the terms compare, all of length 1.

  Attributes:
    student_image: [B, V, D], projected; None without an image term.
    teacher_image: [B, V, D].
    queue: [Q, D] embeddings of earlier images by the teacher; None for cosine.
    student_tokens: [B, V, N, E], projected; None without a term of tokens.
    teacher_tokens: [B, V, N, E] on the student's grid.
  """

  student_image: jax.Array | None
  teacher_image: jax.Array
  queue: jax.Array | None
  student_tokens: jax.Array | None
  teacher_tokens: jax.Array


def resize_grid(tokens: jax.Array, count: int) -> jax.Array:
  """Tokens of a square grid, bilinearly on another one.

  A coarser grid gets weighted means (`jax.image.resize` with its antialiasing).

  Args:
    tokens: [..., N, D], row by row.
    count: M, tokens of the other grid.

  Returns:
    [..., M, D].
  """
  *leading, there, dim = tokens.shape
  old, new = (round(n**0.5) for n in (there, count))
  if old == new:
    return tokens
  grid = tokens.reshape(-1, old, old, dim)
  grid = jax.image.resize(grid, (len(grid), new, new, dim), 'bilinear')
  return grid.reshape(*leading, count, dim)


@dataclasses.dataclass(frozen=True)
class Distil:
  """A student that learns the features of a frozen teacher.

  Attributes:
    setting: what it is built for.
    networks: the student's encoder.
    teacher: what it learns from.
    projectors: by the name of the term: the student's features -> features of
      the teacher's width.
    terms: the terms of the loss.
    queue_shape: of the queue of the teacher's embeddings; None without.
  """

  setting: Setting
  networks: Networks
  teacher: FrozenTeacher
  projectors: Mapping[str, nn.Module]
  terms: Mapping[str, Term]
  queue_shape: tuple[int, int] | None

  def as_method(self) -> Method:
    """The method, for the train step."""
    return Method(
      init=self.init,
      loss=self.loss,
      encoder_variables=self.encoder_variables,
      finish=metrics.finish,
      # A queue has to know all images of a step.
      is_mean_over_examples=self.queue_shape is None,
      constants={_TEACHER: self.teacher.variables},
    )

  def init(self, rng: jax.Array) -> tuple[Params, MethodState]:
    """See `Method`."""
    rngs = jax.random.split(rng, 1 + len(self.projectors))
    image_px = self.setting.image_px
    params, stats = init_networks(self.networks, rngs[0], image_px)
    output = _output_of(self.networks.encoder, image_px)
    features = {'image': output.image, 'tokens': output.tokens}
    for key, (name, module) in zip(
      rngs[1:], self.projectors.items(), strict=True
    ):
      like = jnp.zeros(features[name].shape)
      params[f'{name}_projector'] = module.init(key, like)['params']
    state = {}
    if stats:
      state['student_stats'] = stats
      state['teacher_stats'] = jax.tree.map(jnp.copy, stats)
    if self.queue_shape:
      # A vector of zeros is equally far from all, and soon gone.
      state[_QUEUE] = jnp.zeros(self.queue_shape)
    return params, state

  def _see(
    self, variables: Mapping[str, Any], views: jax.Array
  ) -> EncoderOutput:
    """The teacher's features of [B, V, H, W, 3], not of length 1 yet."""
    images = views.reshape(-1, *views.shape[2:])
    px = self.teacher.view_px
    if px and px != images.shape[1]:
      images = jax.image.resize(images, (len(images), px, px, 3), 'bilinear')
    output = self.teacher.encoder.apply(variables, images)
    image, tokens = (
      jax.lax.stop_gradient(x.reshape(*views.shape[:2], *x.shape[1:]))
      for x in (output.image, output.tokens)
    )
    return EncoderOutput(image, tokens, None)

  def _compare(
    self,
    params: Params,
    state: MethodState,
    student: ViewFeatures,
    teacher: EncoderOutput,
  ) -> Compared:
    def project(name, features):
      if name not in self.projectors:
        return None
      variables = {'params': params[f'{name}_projector']}
      x = self.projectors[name].apply(variables, features)
      return l2_normalise(x.astype(wide(x.dtype)))

    tokens = resize_grid(teacher.tokens, student.features.shape[2])
    return Compared(
      project('image', student.embedding),
      l2_normalise(teacher.image),
      state.get(_QUEUE),
      project('tokens', student.features),
      l2_normalise(tokens),
    )

  def loss(
    self,
    params: Params,
    teacher_params: Params,
    state: MethodState,
    views: Views,
    keys: jax.Array,
    step: jax.Array,
  ) -> Loss:
    """See `Method`; local views are not looked at."""
    del teacher_params
    params = partial.freeze(params, self.setting.is_frozen)
    depth = self.networks.encoder.depth
    images = views.global_views
    (student,), stats = apply_networks(
      self.networks,
      params,
      state.get('student_stats', {}),
      (images,),
      [draw_uniforms(keys, 0, images.shape[1], depth)],
    )
    teacher = self._see(state[_TEACHER], images)
    compared = self._compare(params, state, student, teacher)
    values = {
      name: term.value(compared).mean() for name, term in self.terms.items()
    }
    total = sum(
      jnp.float32(self.terms[name].weight(step)) * value
      for name, value in values.items()
    )
    direction = metrics.mean_direction(student.embedding)
    return Loss(
      total,
      values,
      {'mean_direction': jax.lax.stop_gradient(direction)},
      self._update(state, stats, compared),
    )

  def _update(
    self, state: MethodState, stats: Stats, compared: Compared
  ) -> MethodState:
    """The state after the step, without what is constant."""
    # The statistics of the moving average are the student's.
    new = {
      name: partial.keep_frozen(stats, state[name], self.setting.is_frozen)
      for name in ('student_stats', 'teacher_stats')
      if name in state
    }
    if self.queue_shape:
      images = sharding.all_gather(
        compared.teacher_image, self.setting.axis_name
      )
      images = images.reshape(-1, images.shape[-1])
      queue = jnp.concatenate([images.astype(jnp.float32), state[_QUEUE]])
      new[_QUEUE] = queue[: self.queue_shape[0]]
    return new

  def encoder_variables(self, params: Params, stats: Stats) -> Mapping:
    """See `Method`."""
    return encoder_variables(self.networks, params, stats)


def _output_of(
  encoder: nn.Module, image_px: int, variables: Any = None
) -> EncoderOutput:
  """Shapes of what an encoder says of one image."""
  image = jax.ShapeDtypeStruct((1, image_px, image_px, 3), jnp.float32)
  if variables is None:
    variables = jax.eval_shape(encoder.init, jax.random.key(0), image)
  return jax.eval_shape(encoder.apply, variables, image)


def _teacher_output(teacher: FrozenTeacher, image_px: int) -> EncoderOutput:
  """Shapes of the teacher's features of a view.

  Raises:
    UserError: the views are none that the teacher takes.
  """
  view_px = teacher.view_px or image_px
  patch_px = getattr(teacher.encoder, 'patch_px', 1)
  nearest = max(round(view_px / patch_px), 1) * patch_px
  if view_px != nearest:
    raise UserError(
      f'config.method.teacher sees views of {view_px} pixels, which patches of '
      f'{patch_px} do not tile: set config.method.teacher.view_px={nearest}'
    )
  return _output_of(teacher.encoder, view_px, teacher.variables)


def _make_projector(
  dim: int, *, hidden_dim: int, initialisation: str, dtype: jnp.dtype
) -> nn.Module:
  if not hidden_dim:
    return Dense(dim, dtype=dtype)
  return make_mlp_head(
    hidden_dim=hidden_dim,
    output_dim=dim,
    initialisation=initialisation,
    dtype=dtype,
  )


def _make_values(loss: str, temperature: float) -> dict[str, Callable]:
  """What each term compares, [B] of `Compared`."""
  if loss == 'cosine':
    return {
      'image': lambda x: cosine_distance(x.student_image, x.teacher_image).mean(
        1
      ),
      'tokens': lambda x: cosine_distance(
        x.student_tokens, x.teacher_tokens
      ).mean((1, 2)),
    }

  def image(x: Compared) -> jax.Array:
    def similarities(embedding):
      own = jnp.sum(embedding * x.teacher_image, -1, keepdims=True)
      return jnp.concatenate([embedding @ x.queue.T, own], -1)

    return similarity_kl(
      similarities(x.student_image),
      similarities(x.teacher_image),
      temperature=temperature,
    ).mean(1)

  def tokens(x: Compared) -> jax.Array:
    def similarities(tokens):
      return jnp.einsum('bvnd,bvmd->bvnm', tokens, x.teacher_tokens)

    return similarity_kl(
      similarities(x.student_tokens),
      similarities(x.teacher_tokens),
      temperature=temperature,
    ).mean((1, 2))

  return {'image': image, 'tokens': tokens}


def make_distil(
  setting: Setting,
  *,
  weights: Mapping[str, float],
  teacher: FrozenTeacher,
  loss: str,
  temperature: float,
  queue_size: int,
  projector: Mapping[str, Any],
) -> Method:
  """Builds the distillation of a frozen teacher.

  The term `image` compares the embeddings of a view, `tokens` its tokens, the
  teacher's interpolated bilinearly to the student's grid. 'cosine' is their
  cosine distance. 'kl' compares similarities: of images with the teacher's
  embeddings of earlier ones, which are in a queue, and of the same one (SEED,
  Fang et al. 2021); of tokens with the teacher's tokens of the same view.

  Args:
    setting: what it is built for; the teacher computes in its encoder's dtype.
    weights: weights of the terms `image` and `tokens`.
    teacher: what is distilled.
    loss: one of `LOSSES`.
    temperature: tau of 'kl'.
    queue_size: embeddings in the queue of 'kl'.
    projector: arguments of `make_mlp_head` but `output_dim`, which is the
      teacher's; a `hidden_dim` of 0 is a linear projector.

  Raises:
    UserError: a number or a choice that cannot be, or a teacher that does not
      take the views.
  """
  if loss not in LOSSES:
    raise UserError(
      f'config.method.loss is {loss!r}: choose one of {", ".join(LOSSES)}'
    )
  if temperature <= 0:
    raise UserError(
      f'config.method.temperature is {temperature}: it must be above 0'
    )
  terms = weighted_terms(
    _make_values(loss, temperature), weights, setting.term_warmup
  )
  dtype = setting.encoder.dtype
  teacher = teacher._replace(encoder=teacher.encoder.clone(dtype=dtype))
  output = _teacher_output(teacher, setting.image_px)
  widths = {'image': output.image.shape[-1], 'tokens': output.tokens.shape[-1]}
  has_queue = loss == 'kl' and 'image' in terms
  return Distil(
    setting,
    make_networks(setting, regions=False, has_image_head=False),
    teacher,
    {
      name: _make_projector(widths[name], dtype=dtype, **projector)
      for name in terms
    },
    terms,
    (queue_size, widths['image']) if has_queue else None,
  ).as_method()
