"""How the teacher's logits are normalised: centring or Sinkhorn-Knopp."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from cmd_jax.errors import UserError
from cmd_jax.losses import blockwise
from cmd_jax.losses import dino as losses
from cmd_jax.methods.base import MethodState, Setting
from cmd_jax.methods.features import TeacherFeatures
from cmd_jax.methods.networks import Prototypes
from cmd_jax.models import partial
from cmd_jax.models.heads import prototype_logits
from cmd_jax.models.layers import wide

TEACHER_NORMALISATIONS = ('centring', 'sinkhorn')


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

  def centres(
    self,
    method_state: MethodState,
    teacher: TeacherFeatures,
    prototypes: Prototypes,
    temperature: jax.Array,
  ) -> dict[str, jax.Array]:
    """[K] of each head: what is subtracted from the teacher's logits.

    Args:
      method_state: with the moving averages.
      teacher: the teacher's features.
      prototypes: the teacher's.
      temperature: tau_t.
    """
    centres = {}
    for name, features in _bottlenecks(teacher).items():
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

  def update(
    self,
    method_state: MethodState,
    teacher: TeacherFeatures,
    prototypes: Prototypes,
  ) -> dict[str, jax.Array]:
    """The moving averages after a step, by their names in the state.

    Args:
      method_state: with the moving averages.
      teacher: the teacher's features.
      prototypes: the teacher's.
    """
    centres = {}
    for name, features in _bottlenecks(teacher).items():
      # Logits are linear: their mean is that of the features times the
      # prototypes.
      axes = tuple(range(features.ndim - 1))
      mean = features.astype(wide(features.dtype)).mean(axes)
      logits = blockwise.over_prototypes(
        lambda weights, mean=mean: prototype_logits(mean, weights.kernel()),
        getattr(prototypes, name),
      )
      centres[f'{name}_centre'] = losses.update_centre(
        method_state[f'{name}_centre'],
        logits,
        momentum=self.momentum,
        axis_name=self.axis_name,
      )
    return centres


def _bottlenecks(teacher: TeacherFeatures) -> dict[str, jax.Array]:
  """Features of the teacher's heads there are, by 'image' and 'region'."""
  found = {
    'image': teacher.image_bottleneck,
    'region': teacher.region_bottleneck,
  }
  return {name: x for name, x in found.items() if x is not None}


def make_centring(setting: Setting) -> Centring:
  """The centring of a method.

  Raises:
    UserError: unknown normalisation.
  """
  if setting.teacher_normalisation not in TEACHER_NORMALISATIONS:
    raise UserError(
      f'config.teacher.normalisation is {setting.teacher_normalisation!r}: '
      f'choose one of {", ".join(TEACHER_NORMALISATIONS)}'
    )
  return Centring(
    setting.teacher_normalisation,
    setting.centre_momentum,
    setting.axis_name,
    setting.mesh,
  )


def update_state(
  setting: Setting,
  method_state: MethodState,
  teacher: TeacherFeatures,
  prototypes: Prototypes,
  stats: Mapping[str, Any],
) -> MethodState:
  """A method's state after a step: centres, and running batch statistics.

  Args:
    setting: of the method.
    method_state: before the step.
    teacher: the teacher's features.
    prototypes: the teacher's.
    stats: running batch statistics after the pass, by name in the state.
  """
  centres = make_centring(setting).update(method_state, teacher, prototypes)
  return {
    name: centres[name]
    if name in centres
    else partial.keep_frozen(stats[name], value, setting.is_frozen)
    for name, value in method_state.items()
  }
