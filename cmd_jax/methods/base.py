"""What a method is: data and pure functions, like an optax transformation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from jax.sharding import Mesh

from cmd_jax.errors import UserError
from cmd_jax.losses import blockwise
from cmd_jax.models import partial
from cmd_jax.optim.schedules import Schedule

Params = Any
MethodState = Mapping[str, Any]


class Loss(NamedTuple):
  """What a step learns from a batch; all are means over its examples.

  Under pmap they are those of one device's examples, but for `state`, which is
  equal on all devices.

  Attributes:
    mean: scalar, what is minimised.
    terms: scalars by name: what it is the weighted sum of, unweighted.
    stats: what `Method.finish` makes metrics of.
    state: the method's state after the step.
  """

  mean: jax.Array
  terms: Mapping[str, jax.Array]
  stats: Any
  state: MethodState


class Method(NamedTuple):
  """A self-supervised objective over a student and an EMA teacher.

  Attributes:
    init: rng -> (params, state); the teacher starts as a copy of params. In
      `state` are running batch statistics, as 'student_stats' and
      'teacher_stats', where a network has any.
    loss: (params, teacher_params, state, views, keys, step) -> `Loss`, with
      gradient by `params` alone; `constants` are in `state` too. `views` are
      `data.batch.Views`; `keys` [B] are random keys of the examples, `step` is
      the number of the step.
    encoder_variables: (params, stats) -> what the encoder is applied to,
      adapters merged in; `stats` are a network's running batch statistics, {}
      where it has none. It is what evaluation sees of a network, beside the
      multi-instance attention that is in `params` as 'mil' where there is any.
    finish: the means of `Loss.stats` over all examples -> scalars to watch.
    is_mean_over_examples: whether an example's loss, gradient and share of the
      state depend on no other example, so that a batch can be seen in parts.
    constants: arrays by name that `loss` reads and no step changes, such as a
      network of others; every device keeps them whole, no checkpoint has them.
  """

  init: Callable[[jax.Array], tuple[Params, MethodState]]
  loss: Callable[..., Loss]
  encoder_variables: Callable[[Params, Any], Mapping[str, Any]]
  finish: Callable[[Any], Mapping[str, jax.Array]]
  is_mean_over_examples: bool
  constants: Mapping[str, Any] = {}


class Setting(NamedTuple):
  """What a method is built for and of, whichever it is.

  Attributes:
    encoder: images -> `layers.EncoderOutput`.
    image_px: side of the images with which the encoder is initialised.
    axis_name: axis over which the batch is spread, None if it is global.
    mesh: the devices over which a global batch is spread; None for arrays of
      one device.
    platform: of the devices that it is compiled for, as JAX names it.
    kernels: see `blockwise.budget_for`.
    head: arguments of `heads.PrototypeHead`, for methods with prototypes.
    lora: `rank` and `alpha` of the encoder's adapters; rank 0 for none.
    is_frozen: from `partial.make_is_frozen`.
    student_temperature: tau_s.
    teacher_temperature: tau_t, a schedule.
    teacher_normalisation: one of `centring.TEACHER_NORMALISATIONS`.
    centre_momentum: momentum of the centres of the teacher's logits.
    term_warmup: step -> factor of the weights of all terms but the image's;
      None weights them in full at once.
  """

  encoder: nn.Module
  image_px: int
  axis_name: str | None = None
  mesh: Mesh | None = None
  platform: str = 'cpu'
  kernels: str = 'auto'
  head: Mapping[str, Any] = {}
  lora: Mapping[str, Any] = {'rank': 0, 'alpha': 1.0}
  is_frozen: partial.IsFrozen = lambda path: False
  student_temperature: float = 0.1
  teacher_temperature: Schedule = lambda step: 0.04
  teacher_normalisation: str = 'centring'
  centre_momentum: float = 0.9
  term_warmup: Schedule | None = None

  def budget(self) -> blockwise.Budget:
    """What the logits over prototypes may take."""
    return blockwise.budget_for(self.platform, self.kernels)


class Term(NamedTuple):
  """One term of a loss.

  Attributes:
    weight: step -> scalar.
    value: what a method compares -> [B].
  """

  weight: Callable[[jax.Array], jax.Array | float]
  value: Callable[[Any], jax.Array]


def weighted_terms(
  values: Mapping[str, Callable],
  weights: Mapping[str, float],
  warmup: Schedule | None = None,
) -> dict[str, Term]:
  """The terms with a weight other than 0.

  Args:
    values: name -> term's value function.
    weights: name -> constant weight.
    warmup: step -> factor of the weights of all terms but the image's. Not
      published: from the first step on, terms of regions can keep the image
      term from learning anything (benchmarks/RESEARCH.md).

  Raises:
    UserError: a weight for a term that does not exist, or none left.
  """
  unknown = sorted(set(weights) - set(values))
  if unknown:
    raise UserError(
      f'config.method.weights names {", ".join(unknown)}: choose from '
      f'{", ".join(values)}'
    )

  def weight_of(name: str) -> Callable:
    weight = float(weights[name])
    if warmup is None or name == 'image':
      return lambda step: weight
    return lambda step: warmup(step) * weight

  terms = {
    name: Term(weight_of(name), value)
    for name, value in values.items()
    if weights.get(name)
  }
  if not terms:
    raise UserError(
      'config.method.weights are all 0: set at least one of '
      f'{", ".join(values)}'
    )
  return terms
