"""What a method is: data and pure functions, like an optax transformation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from cmd_jax.errors import UserError

Params = Any
MethodState = Mapping[str, Any]


class Term(NamedTuple):
  """One term of a loss.

  Attributes:
    weight: step -> scalar.
    value: (outputs, method_state) -> [B], reduced by nobody but the train step.
  """

  weight: Callable[[jax.Array], jax.Array | float]
  value: Callable[[Any, MethodState], jax.Array]


class Method(NamedTuple):
  """A self-supervised objective over a student and an EMA teacher.

  Attributes:
    init: rng -> (params, method_state); the teacher starts as a copy of params.
    forward: (params, teacher_params, method_state, views, keys, step) ->
      outputs; one pass of the student and one of the teacher. `views` holds the
      images of each size, [B, V, H, W, 3]; the teacher sees the first. A method
      of parts takes `part_networks.PartViews` in their place. `keys`
      [B] are per-example random keys.
    terms: the terms of the loss by name.
    monitors: outputs -> named scalars worth watching, global over the batch.
    update: (method_state, outputs) -> method_state.
    encoder_variables: (params, stats) -> what the encoder is applied to,
      adapters merged in.
    embed: (params, stats, images [B, H, W, 3]) -> image embeddings [B, D];
      `stats` are the network's running batch statistics, 'student_stats' or
      'teacher_stats' of the method state, {} where there are none.
    attend: (params, stats, images) -> what each patch counts, [B, N]: the
      multi-instance attention, which adds up to 1; without, the encoder's own;
      without that, the length of the patch's features.
  """

  init: Callable[..., tuple[Params, MethodState]]
  forward: Callable[..., Any]
  terms: Mapping[str, Term]
  monitors: Callable[[Any], Mapping[str, jax.Array]]
  update: Callable[[MethodState, Any], MethodState]
  encoder_variables: Callable[[Params, Any], Mapping[str, Any]]
  embed: Callable[[Params, Any, jax.Array], jax.Array]
  attend: Callable[[Params, Any, jax.Array], jax.Array]


def weighted_terms(values: Mapping, weights: Mapping) -> dict[str, Term]:
  """The terms with a weight other than 0.

  Args:
    values: name -> term's value function.
    weights: name -> constant weight.

  Raises:
    UserError: a weight for a term that does not exist, or none left.
  """
  unknown = sorted(set(weights) - set(values))
  if unknown:
    raise UserError(
      f'config.method.weights names {", ".join(unknown)}: choose from '
      f'{", ".join(values)}'
    )
  terms = {
    name: Term(lambda step, w=float(weights[name]): w, value)
    for name, value in values.items()
    if weights.get(name)
  }
  if not terms:
    raise UserError(
      'config.method.weights are all 0: set at least one of '
      f'{", ".join(values)}'
    )
  return terms
