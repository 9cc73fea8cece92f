"""The networks that contrast parts, and what they say of the parts of views."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cmd_jax.data.batch import Views
from cmd_jax.errors import UserError
from cmd_jax.methods.base import Params, Setting
from cmd_jax.methods.networks import (
  Networks,
  Stats,
  ViewFeatures,
  apply_networks,
  init_networks,
  make_networks,
)
from cmd_jax.models import part_pooling
from cmd_jax.models.mlp_heads import MlpHead, make_mlp_head

# Apart from the numbers of the sizes, which key stochastic depth.
_SAMPLING = 1_000

# What empty parts are relabelled to; neither is found on the other side.
_EMPTY_PREDICTION, _EMPTY_TARGET = -1, -2


class Parts(NamedTuple):
  """The sampled parts of both views.

  Attributes:
    predictions: [B, 2, S, D] of the student's predictor.
    targets: [B, 2, S, D] of the teacher's projector, without gradient.
    prediction_ids: [B, 2, S] int32.
    target_ids: [B, 2, S] int32.
  """

  predictions: jax.Array
  targets: jax.Array
  prediction_ids: jax.Array
  target_ids: jax.Array


class Sampling(NamedTuple):
  """How the parts to contrast are drawn.

  Attributes:
    num_parts: P, one more than the largest part id.
    num_samples: S, parts drawn from each view.
    match_empty_parts: whether parts without a token can be positives.
    draw: (keys [B], present [B, 4, P] bool, S) -> [B, 4, S] int32, the parts to
      contrast: the teacher's in its two views, then the student's.
  """

  num_parts: int
  num_samples: int
  match_empty_parts: bool
  draw: Callable = part_pooling.sample_parts


def check_sampling(sampling: Sampling) -> None:
  """Raises UserError unless that many parts can be drawn."""
  num_parts, num_samples = sampling.num_parts, sampling.num_samples
  if not 1 <= num_parts <= 256:
    raise UserError(
      f'there are {num_parts} part ids, which are bytes: choose settings in '
      'config.parts that give 1 to 256'
    )
  if not 1 <= num_samples <= num_parts:
    raise UserError(
      f'config.method.num_samples is {num_samples}: it must be at least 1 and '
      f'at most the number of part ids that config.parts gives, {num_parts}'
    )


class PartNetworks(NamedTuple):
  """The modules of the student; the teacher uses all but the predictor.

  Attributes:
    networks: encoder and image head.
    projector: pooled features -> projections, which are the teacher's targets.
    predictor: the student's projections -> predictions.
  """

  networks: Networks
  projector: MlpHead
  predictor: MlpHead

  @property
  def has_image_head(self) -> bool:
    """Whether there is an image term."""
    return self.networks.image_head is not None


def make_part_networks(
  setting: Setting,
  *,
  has_image_head: bool,
  projector: Mapping,
  predictor: Mapping,
) -> PartNetworks:
  """An encoder and its heads, which compute in the encoder's dtype.

  Args:
    setting: with the encoder, whose tokens are a grid.
    has_image_head: whether there is an image term.
    projector: arguments of `make_mlp_head`.
    predictor: likewise, without `output_dim`, which is the projector's.

  Raises:
    UserError: unknown initialisation.
  """
  dtype, output_dim = setting.encoder.dtype, projector['output_dim']
  return PartNetworks(
    make_networks(setting, regions=False, has_image_head=has_image_head),
    make_mlp_head(dtype=dtype, **projector),
    make_mlp_head(dtype=dtype, output_dim=output_dim, **predictor),
  )


def init_part_networks(
  modules: PartNetworks, rng: jax.Array, image_px: int
) -> tuple[Params, Stats]:
  """Initial parameters and batch statistics, an entry for each module."""
  rngs = jax.random.split(rng, 4)
  networks = modules.networks
  params, stats = init_networks(networks, rngs[0], image_px)
  output, _ = jax.eval_shape(
    networks.encoder.init_with_output,
    rngs[1],
    jnp.zeros((1, image_px, image_px, 3)),
  )
  for name, key, dim in (
    ('projector', rngs[2], output.tokens.shape[-1]),
    ('predictor', rngs[3], modules.projector.output_dim),
  ):
    module = getattr(modules, name)
    params[name] = module.init(key, jnp.zeros(dim))['params']
  return params, stats


def apply_view_by_view(
  networks: Networks,
  params: Params,
  stats: Stats,
  views: Sequence[jax.Array],
  uniforms: Sequence[jax.Array] | None = None,
) -> tuple[tuple[ViewFeatures, ...], Stats]:
  """`apply_networks`, with batch statistics of one view at a time.

  As the released ResNet program: in the encoder each view is normalised by its
  own batch, and the running statistics are updated once a view, in the order of
  the views. Heads see all views at once.
  """
  if not stats:
    return apply_networks(networks, params, stats, views, uniforms)

  def split(arrays):
    return [jnp.split(x, x.shape[1], axis=1) for x in arrays]

  draws = uniforms and sum(split(uniforms), [])
  outputs, stats = apply_networks(
    networks, params, stats, sum(split(views), []), draws
  )
  outputs = iter(outputs)
  joined = [
    jax.tree.map(
      lambda *x: jnp.concatenate(x, axis=1),
      *[next(outputs) for _ in range(images.shape[1])],
    )
    for images in views
  ]
  return tuple(joined), stats


def project_parts(
  modules: PartNetworks,
  params: Params,
  teacher_params: Params,
  student: ViewFeatures,
  teacher: ViewFeatures,
  views: Views,
  keys: jax.Array,
  sampling: Sampling,
) -> Parts:
  """Draws, pools and projects parts, for teacher and student separately.

  Args:
    modules: the modules.
    params: the student's parameters.
    teacher_params: the teacher's.
    student: outputs for the views of the first size.
    teacher: likewise.
    views: with the parts that are seen in them.
    keys: [B] random keys.
    sampling: how parts are drawn.

  Raises:
    UserError: tokens that do not tile the views.
  """
  grid = part_pooling.token_grid(
    views.global_part_ids.shape[2:], student.features.shape[2]
  )
  token_parts = part_pooling.part_of_each_token(
    views.global_part_ids, num_parts=sampling.num_parts, grid=grid
  )
  present = part_pooling.present_parts(token_parts, sampling.num_parts)
  present = jnp.concatenate([present, present], axis=1)  # [B, 4, P]
  keys = jax.vmap(jax.random.fold_in, (0, None))(keys, _SAMPLING)
  ids = sampling.draw(keys, present, sampling.num_samples)
  target_ids, prediction_ids = ids[:, :2], ids[:, 2:]

  def project(projector_params, features, ids):
    return modules.projector.apply(
      {'params': projector_params},
      part_pooling.pool_parts(features, token_parts, ids),
    )

  targets = project(teacher_params['projector'], teacher.features, target_ids)
  predictions = modules.predictor.apply(
    {'params': params['predictor']},
    project(params['projector'], student.features, prediction_ids),
  )
  if not sampling.match_empty_parts:
    is_there = jnp.take_along_axis(present, ids, axis=2)
    target_ids = jnp.where(is_there[:, :2], target_ids, _EMPTY_TARGET)
    prediction_ids = jnp.where(
      is_there[:, 2:], prediction_ids, _EMPTY_PREDICTION
    )
  return Parts(
    predictions, jax.lax.stop_gradient(targets), prediction_ids, target_ids
  )
