"""SimCLR (Chen et al. 2020): contrast of whole images, without a teacher.

The moving average of the student that every run keeps is scored as its
teacher, but nothing is learned from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from cmd_jax.data.batch import Views
from cmd_jax.errors import UserError
from cmd_jax.losses.simclr import nt_xent
from cmd_jax.methods import metrics
from cmd_jax.methods.base import (
  Loss,
  Method,
  MethodState,
  Params,
  Setting,
)
from cmd_jax.methods.networks import (
  Networks,
  Stats,
  apply_networks,
  draw_uniforms,
  encoder_variables,
  init_networks,
  make_networks,
)
from cmd_jax.models import partial
from cmd_jax.models.heads import l2_normalise
from cmd_jax.models.layers import images_like
from cmd_jax.models.mlp_heads import MlpHead, make_mlp_head


@dataclasses.dataclass(frozen=True)
class SimClr:
  """The contrast of two views of an image with those of all others.

  Attributes:
    setting: what it is built for.
    networks: the encoder.
    projector: image embedding -> what is contrasted.
    temperature: tau.
  """

  setting: Setting
  networks: Networks
  projector: MlpHead
  temperature: float

  def as_method(self) -> Method:
    """The method, for the train step."""
    return Method(
      init=self.init,
      loss=self.loss,
      encoder_variables=self.encoder_variables,
      finish=metrics.finish,
      is_mean_over_examples=False,
    )

  def init(self, rng: jax.Array) -> tuple[Params, MethodState]:
    """See `Method`."""
    rngs = jax.random.split(rng)
    image_px = self.setting.image_px
    params, stats = init_networks(self.networks, rngs[0], image_px)
    image = jnp.zeros(images_like(self.networks.encoder, image_px).shape)
    output, _ = jax.eval_shape(
      self.networks.encoder.init_with_output, rngs[0], image
    )
    params['projector'] = self.projector.init(
      rngs[1], jnp.zeros(output.image.shape)
    )['params']
    if not stats:
      return params, {}
    return params, {
      'student_stats': stats,
      'teacher_stats': jax.tree.map(jnp.copy, stats),
    }

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
    del teacher_params, step
    params = partial.freeze(params, self.setting.is_frozen)
    depth = self.networks.encoder.depth
    (view,), stats = apply_networks(
      self.networks,
      params,
      state.get('student_stats', {}),
      (views.global_views,),
      [draw_uniforms(keys, 0, views.global_views.shape[1], depth)],
    )
    projected = self.projector.apply(
      {'params': params['projector']}, view.embedding
    )
    values = nt_xent(
      l2_normalise(projected),
      temperature=self.temperature,
      axis_name=self.setting.axis_name,
    )
    mean = values.mean()
    direction = metrics.mean_direction(view.embedding)
    return Loss(
      mean,
      {'contrast': mean},
      {'mean_direction': jax.lax.stop_gradient(direction)},
      # Those of the moving average are the student's.
      {
        name: partial.keep_frozen(stats, value, self.setting.is_frozen)
        for name, value in state.items()
      },
    )

  def encoder_variables(self, params: Params, stats: Stats) -> Mapping:
    """See `Method`."""
    return encoder_variables(self.networks, params, stats)


def make_simclr(
  setting: Setting, *, temperature: float, projector: Mapping[str, Any]
) -> Method:
  """Builds SimCLR.

  Args:
    setting: what it is built for.
    temperature: tau.
    projector: arguments of `make_mlp_head`.

  Raises:
    UserError: a number or a choice that cannot be.
  """
  if temperature <= 0:
    raise UserError(
      f'config.method.temperature is {temperature}: it must be above 0'
    )
  return SimClr(
    setting,
    make_networks(setting, regions=False, has_image_head=False),
    make_mlp_head(dtype=setting.encoder.dtype, **projector),
    temperature,
  ).as_method()
