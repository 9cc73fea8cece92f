"""What a method is: data and pure functions, like an optax transformation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from cmd_jax.errors import UserError

Params = Any
MethodState = Mapping[str, jax.Array]


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
      images of each size, [B, V, H, W, 3]; the teacher sees the first. `keys`
      [B] are per-example random keys.
    terms: the terms of the loss by name.
    monitors: outputs -> named scalars worth watching, global over the batch.
    update: (method_state, outputs) -> method_state.
    embed: (params, images [B, H, W, 3]) -> image embeddings [B, D].
    attend: (params, images) -> what each patch counts, [B, N]; adds up to 1
      for multi-instance attention.
  """

  init: Callable[..., tuple[Params, MethodState]]
  forward: Callable[..., Any]
  terms: Mapping[str, Term]
  monitors: Callable[[Any], Mapping[str, jax.Array]]
  update: Callable[[MethodState, Any], MethodState]
  embed: Callable[[Params, jax.Array], jax.Array]
  attend: Callable[[Params, jax.Array], jax.Array]


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
