"""PARTICLE (Saha & Maji 2023), and DetCon: the contrast of parts.

Both are one method; they differ in where the parts come from, clusters of
features or an image's segments. With an image term it is the released ViT
variant, without the ResNet variant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cmd_jax.data.batch import Views
from cmd_jax.devices import sharding
from cmd_jax.errors import UserError
from cmd_jax.losses import blockwise, detcon
from cmd_jax.methods import dino, features, metrics
from cmd_jax.methods.base import (
  Loss,
  Method,
  MethodState,
  Params,
  Setting,
  Term,
  weighted_terms,
)
from cmd_jax.methods.centring import make_centring, update_state
from cmd_jax.methods.features import (
  Comparison,
  StudentFeatures,
  TeacherContext,
  TeacherFeatures,
)
from cmd_jax.methods.networks import (
  Prototypes,
  Stats,
  draw_uniforms,
  encoder_variables,
  prototypes_of,
)
from cmd_jax.methods.part_networks import (
  PartNetworks,
  Parts,
  Sampling,
  apply_view_by_view,
  check_sampling,
  init_part_networks,
  make_part_networks,
  project_parts,
)
from cmd_jax.models import partial


class ForwardOutput(NamedTuple):
  """One pass of the student and one of the teacher.

  Attributes:
    parts: of both networks.
    student: features of whole images, with gradient.
    teacher: likewise, without.
    prototypes: the student's; of None without the image term.
    context: what the comparison of images needs of the teacher besides.
    stats: running batch statistics after this pass.
  """

  parts: Parts
  student: StudentFeatures
  teacher: TeacherFeatures
  prototypes: Prototypes
  context: TeacherContext
  stats: Mapping[str, Any]


class Compared(NamedTuple):
  """Everything the terms of the loss are made of.

  Attributes:
    images: whole images; None without the image term.
    parts: of both networks.
  """

  images: Comparison | None
  parts: Parts


def _make_terms(
  setting: Setting,
  weights: Mapping[str, float],
  temperature: float,
  local_negatives: bool,
) -> dict[str, Term]:
  if not weights.get('parts'):
    raise UserError(
      "config.method.weights has no 'parts': set it above 0, or choose the "
      "method 'dino'"
    )

  def image_value(compared: Compared) -> jax.Array:
    return dino.image_value(compared.images)

  def parts_value(compared: Compared) -> jax.Array:
    return detcon.part_contrast(
      *compared.parts,
      temperature=temperature,
      local_negatives=local_negatives,
      axis_name=setting.axis_name,
    )

  values = {'image': image_value, 'parts': parts_value}
  return weighted_terms(values, weights, setting.term_warmup)


@dataclasses.dataclass(frozen=True)
class PartContrast:
  """A method that contrasts parts, and learns images as DINO does beside it.

  Student and teacher share their running batch statistics: both update them,
  the teacher first, as in the released ResNet program, which swaps the weights
  of one network (train_particle_resnet.py). The ViT program has two networks,
  but no such statistics; where the image head of a ViT normalises by the batch
  (`head.use_bn`) its statistics are shared likewise.

  Attributes:
    setting: what it is built for.
    modules: the modules.
    sampling: how parts are drawn.
    terms: the loss, of `Compared`.
  """

  setting: Setting
  modules: PartNetworks
  sampling: Sampling
  terms: Mapping[str, Term]

  def as_method(self) -> Method:
    """The method, for the train step."""
    return Method(
      init=self.init,
      loss=self.loss,
      encoder_variables=self.encoder_variables,
      finish=_finish,
      # The contrast is with the parts of all other examples.
      is_mean_over_examples=False,
    )

  def init(self, rng: jax.Array) -> tuple[Params, MethodState]:
    """See `Method`."""
    params, stats = init_part_networks(self.modules, rng, self.setting.image_px)
    state = {}
    if self.modules.has_image_head:
      head = self.modules.networks.image_head
      state['image_centre'] = jnp.zeros(head.num_prototypes)
    if stats:
      state['student_stats'] = stats
      state['teacher_stats'] = jax.tree.map(jnp.copy, stats)
    return params, state

  def forward(
    self,
    params: Params,
    teacher_params: Params,
    state: MethodState,
    views: Views,
    keys: jax.Array,
    step: jax.Array,
  ) -> ForwardOutput:
    """Both networks on the views; the teacher sees the global ones alone."""
    setting, networks = self.setting, self.modules.networks
    params = partial.freeze(params, setting.is_frozen)
    stats = state.get('student_stats', {})
    # Local views have no parts: without the image term nothing looks at them.
    images = views.sizes if self.modules.has_image_head else views.sizes[:1]
    (teacher,), stats = jax.lax.stop_gradient(
      apply_view_by_view(networks, teacher_params, stats, views.sizes[:1])
    )
    uniforms = [
      draw_uniforms(keys, index, x.shape[1], networks.encoder.depth)
      for index, x in enumerate(images)
    ]
    student, stats = apply_view_by_view(
      networks, params, stats, images, uniforms
    )
    parts = project_parts(
      self.modules,
      params,
      teacher_params,
      student[0],
      teacher,
      views,
      keys,
      self.sampling,
    )
    prototypes = jax.lax.stop_gradient(prototypes_of(networks, teacher_params))
    temperature = setting.teacher_temperature(step)
    of_student, of_teacher = features.gather_features(student, teacher)
    centres = make_centring(setting).centres(
      state, of_teacher, prototypes, temperature
    )
    return ForwardOutput(
      parts,
      of_student,
      of_teacher,
      prototypes_of(networks, params),
      TeacherContext(prototypes, centres, temperature),
      {'student_stats': stats, 'teacher_stats': stats},
    )

  def compare(self, output: ForwardOutput) -> Compared:
    """What the terms are made of."""
    if not self.modules.has_image_head:
      return Compared(None, output.parts)
    setting = self.setting

    def of_device(shared, share, _):
      student, teacher = share
      # The parts of a batch are not seen in blocks, nor are its images.
      num_rows = features.count_rows(student, teacher)
      plan = blockwise.make_plan(
        setting.budget(),
        batch_size=1,
        num_rows=num_rows * len(teacher.embedding),
        num_prototypes=blockwise.number_of(output.prototypes),
      )
      return (), features.compare(
        *shared,
        student,
        teacher,
        student_temperature=setting.student_temperature,
        bags=None,
        plan=plan,
      )

    _, images = sharding.on_each_device(of_device, setting.mesh)(
      (output.prototypes, output.context), (output.student, output.teacher)
    )
    return Compared(images, output.parts)

  def loss(
    self,
    params: Params,
    teacher_params: Params,
    state: MethodState,
    views: Views,
    keys: jax.Array,
    step: jax.Array,
  ) -> Loss:
    """See `Method`."""
    output = self.forward(params, teacher_params, state, views, keys, step)
    compared = self.compare(output)
    values = {name: term.value(compared) for name, term in self.terms.items()}
    total = sum(
      jnp.float32(self.terms[name].weight(step)) * value
      for name, value in values.items()
    )
    return Loss(
      total.mean(),
      jax.tree.map(jnp.mean, values),
      _stats(output, compared),
      self.update(state, output),
    )

  def update(self, state: MethodState, output: ForwardOutput) -> MethodState:
    """The state after the step: centres, and running batch statistics."""
    return update_state(
      self.setting,
      state,
      output.teacher,
      output.context.prototypes,
      output.stats,
    )

  def encoder_variables(self, params: Params, stats: Stats) -> Mapping:
    """See `Method`."""
    return encoder_variables(self.modules.networks, params, stats)


def _stats(output: ForwardOutput, compared: Compared) -> dict[str, jax.Array]:
  """What shows a collapse, or views that share no parts."""
  parts = output.parts
  values = {
    'mean_part_direction': metrics.mean_direction(parts.targets),
    'part_positives': detcon.fraction_with_positives(
      parts.prediction_ids, parts.target_ids
    ).mean(),
  }
  if compared.images is not None:
    watched = metrics.distribution_metrics(compared.images)
    values |= jax.tree.map(jnp.mean, watched)
    values['mean_direction'] = metrics.mean_direction(output.teacher.embedding)
    values['mean_bottleneck'] = metrics.mean_bottleneck(
      output.teacher.image_bottleneck
    )
  return values


def _finish(stats: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  return {
    **metrics.finish(stats),
    'part_spread': metrics.spread(stats['mean_part_direction']),
  }


def make_particle(
  setting: Setting,
  *,
  weights: Mapping[str, float],
  num_parts: int,
  num_samples: int,
  projector: Mapping[str, Any],
  predictor: Mapping[str, Any],
  temperature: float,
  local_negatives: bool,
  match_empty_parts: bool,
) -> Method:
  """Builds PARTICLE or DetCon, whose views have `global_part_ids`.

  The released programs draw parts without replacement, so where a view has
  fewer parts than samples they contrast empty ones, whose features are 0, and
  pull a part that is out of sight in the other view towards that constant.
  DetCon draws present parts alone. `match_empty_parts=False` keeps the draw but
  takes empty parts from the positives on both sides.

  Args:
    setting: what it is built for; its head is for the image term.
    weights: weights of the terms `parts` and `image`, DINO's.
    num_parts: P, one more than the largest part id.
    num_samples: S, parts drawn from each view, at most P.
    projector: arguments of `make_mlp_head`.
    predictor: likewise, without `output_dim`, which is the projector's.
    temperature: tau of the contrast.
    local_negatives: whether other parts of the same image are negatives.
    match_empty_parts: whether empty parts can be positives, as released.

  Raises:
    UserError: a number or a choice that cannot be.
  """
  sampling = Sampling(num_parts, num_samples, match_empty_parts)
  check_sampling(sampling)
  make_centring(setting)
  terms = _make_terms(setting, weights, temperature, local_negatives)
  modules = make_part_networks(
    setting,
    has_image_head='image' in terms,
    projector=projector,
    predictor=predictor,
  )
  return PartContrast(setting, modules, sampling, terms).as_method()
