"""What DINO, EsViT and CMD share: a student that learns a teacher's logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cmd_jax.data.batch import Views
from cmd_jax.losses import blockwise
from cmd_jax.methods import features, metrics
from cmd_jax.methods.base import (
  Loss,
  Method,
  MethodState,
  Params,
  Setting,
  Term,
)
from cmd_jax.methods.centring import make_centring, update_state
from cmd_jax.methods.features import (
  StudentFeatures,
  TeacherContext,
  TeacherFeatures,
)
from cmd_jax.methods.networks import (
  Networks,
  Prototypes,
  Stats,
  apply_networks,
  draw_uniforms,
  encoder_variables,
  init_networks,
  prototypes_of,
)
from cmd_jax.models import partial


class ForwardOutput(NamedTuple):
  """One pass of the student and one of the teacher, prototypes aside.

  Attributes:
    student: features of each example, with gradient.
    teacher: features of each example, without.
    prototypes: the student's.
    context: what the comparison needs of the teacher besides.
    stats: running batch statistics after this pass, by name in the state.
  """

  student: StudentFeatures
  teacher: TeacherFeatures
  prototypes: Prototypes
  context: TeacherContext
  stats: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Distillation:
  """A method whose student learns the teacher's distributions.

  Attributes:
    setting: what it is built for.
    networks: the modules.
    terms: the loss, of `features.Comparison`.
    bags: how images are compared with their regions; None where no term does.
  """

  setting: Setting
  networks: Networks
  terms: Mapping[str, Term]
  bags: features.BagTerms | None = None

  def as_method(self) -> Method:
    """The method, for the train step.

    Raises:
      UserError: unknown normalisation of the teacher.
    """
    head, setting = self.networks.image_head, self.setting
    make_centring(setting)
    return Method(
      init=self.init,
      loss=self.loss,
      encoder_variables=self.encoder_variables,
      finish=metrics.finish,
      # Sinkhorn balances a whole batch, and batch statistics are of one.
      is_mean_over_examples=setting.teacher_normalisation == 'centring'
      and not head.use_bn
      and not self.networks.encoder_normalises_by_batch,
    )

  def init(self, rng: jax.Array) -> tuple[Params, MethodState]:
    """See `Method`."""
    num_prototypes = self.networks.image_head.num_prototypes
    state = {'image_centre': jnp.zeros(num_prototypes)}
    if self.networks.region_head is not None:
      state['region_centre'] = jnp.zeros(num_prototypes)
    params, stats = init_networks(self.networks, rng, self.setting.image_px)
    if stats:
      state['student_stats'] = stats
      # A copy, as of the teacher's parameters.
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
    networks, setting = self.networks, self.setting
    params = partial.freeze(params, setting.is_frozen)
    stats = state.get('student_stats', {})
    teacher_params, stats_of_teacher = (
      partial.share_frozen(teacher, student, setting.is_frozen)
      for teacher, student in (
        (teacher_params, params),
        (state.get('teacher_stats', {}), stats),
      )
    )
    student, student_stats = apply_networks(
      networks,
      params,
      stats,
      views.sizes,
      [
        draw_uniforms(keys, index, images.shape[1], networks.encoder.depth)
        for index, images in enumerate(views.sizes)
      ],
    )
    (teacher,), teacher_stats = jax.lax.stop_gradient(
      apply_networks(
        networks,
        teacher_params,
        stats_of_teacher,
        views.sizes[:1],
      )
    )
    prototypes = jax.lax.stop_gradient(prototypes_of(networks, teacher_params))
    temperature = setting.teacher_temperature(step)
    of_student, of_teacher = features.gather_features(student, teacher)
    centres = make_centring(setting).centres(
      state, of_teacher, prototypes, temperature
    )
    if networks.mil is not None:
      attention = networks.mil.apply(
        {'params': params.get('mil', {})}, teacher.features
      )
      of_student = of_student._replace(teacher_attention=attention)
    return ForwardOutput(
      of_student,
      of_teacher,
      prototypes_of(networks, params),
      TeacherContext(prototypes, centres, temperature),
      {'student_stats': student_stats, 'teacher_stats': teacher_stats},
    )

  def losses(
    self,
    plan: blockwise.Plan,
    prototypes: Prototypes,
    so_far: Prototypes | None,
    constants: tuple[TeacherContext, Mapping[str, jax.Array]],
    student: StudentFeatures,
    teacher: TeacherFeatures,
  ) -> tuple[jax.Array, tuple[dict, dict]]:
    """The weighted sum of the terms, [B], for `blockwise.mean_over_examples`.

    Args:
      plan: how the batch is taken apart.
      prototypes: the student's.
      so_far: the sum of their gradients, see `prototype_attention.attend`.
      constants: of the teacher, and the terms' weights by name.
      student: the student's features.
      teacher: the teacher's features.

    Returns:
      [B], and what is reported: the terms, unweighted, and what is watched.
    """
    context, weights = constants
    compared = features.compare(
      prototypes,
      context,
      student,
      teacher,
      student_temperature=self.setting.student_temperature,
      bags=self.bags,
      plan=plan,
      so_far=so_far,
    )
    values = {name: term.value(compared) for name, term in self.terms.items()}
    total = sum(weights[name] * value for name, value in values.items())
    return total, (values, metrics.distribution_metrics(compared))

  def mean_loss(
    self,
    output: ForwardOutput,
    step: jax.Array,
    budget: blockwise.Budget | None = None,
  ) -> tuple[jax.Array, tuple[dict, dict]]:
    """Mean of `losses`, and what they report, [B] each.

    Args:
      output: of both networks.
      step: number of the step.
      budget: what logits may take; by the devices' platform without.
    """

    def make_plan(batch_size):
      return blockwise.make_plan(
        budget or self.setting.budget(),
        batch_size=batch_size,
        num_rows=features.count_rows(output.student, output.teacher),
        num_prototypes=blockwise.number_of(output.prototypes),
      )

    return blockwise.mean_over_examples(
      self.losses,
      make_plan,
      output.prototypes,
      (output.context, self.weights(step)),
      output.student,
      output.teacher,
      mesh=self.setting.mesh,
    )

  def weights(self, step: jax.Array) -> dict[str, jax.Array]:
    """The weights of the terms by name."""
    return {
      name: jnp.float32(term.weight(step)) for name, term in self.terms.items()
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
    """See `Method`."""
    output = self.forward(params, teacher_params, state, views, keys, step)
    mean, reported = self.mean_loss(output, step)
    terms, watched = jax.tree.map(jnp.mean, reported)
    return Loss(
      mean, terms, {**watched, **self.stats(output)}, self.update(state, output)
    )

  def stats(self, output: ForwardOutput) -> dict[str, jax.Array]:
    """What is watched besides the distributions, see `metrics.finish`."""
    values = {
      'mean_direction': metrics.mean_direction(output.teacher.embedding),
      'mean_bottleneck': metrics.mean_bottleneck(
        output.teacher.image_bottleneck
      ),
    }
    if output.student.teacher_attention is not None:
      entropy = metrics.relative_entropy(output.student.teacher_attention)
      if entropy is not None:
        values['attention_entropy'] = entropy
    return values

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
    return encoder_variables(self.networks, params, stats)
