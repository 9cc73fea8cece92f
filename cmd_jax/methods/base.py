"""What a method is: data and pure functions, like an optax transformation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from cmd_jax.errors import UserError
from cmd_jax.optim.schedules import Schedule

Params = Any
MethodState = Mapping[str, Any]


class Term(NamedTuple):
  """One term of a loss.

  Attributes:
    weight: step -> scalar.
    value: outputs -> [B], reduced by nobody but the train step.
  """

  weight: Callable[[jax.Array], jax.Array | float]
  value: Callable[[Any], jax.Array]


class Seen(NamedTuple):
  """What both networks say of a batch, prototypes aside.

  Attributes:
    examples: arrays [B, ...] of each example by itself, with gradient.
    targets: arrays [B, ...] of each example by itself, without.
    prototypes: the student's; None where there are none.
    constants: what has no gradient and belongs to no example: [..., K] arrays
      and scalars.
    stats: running batch statistics after this pass, by name in the state.
  """

  examples: Any
  targets: Any
  prototypes: Any
  constants: Any
  stats: Mapping[str, Any]


class Method(NamedTuple):
  """A self-supervised objective over a student and an EMA teacher.

  Attributes:
    init: rng -> (params, method_state); the teacher starts as a copy of params.
    forward: (params, teacher_params, method_state, views, keys, step) ->
      `Seen`; one pass of the student and one of the teacher. `views` holds the
      images of each size, [B, V, H, W, 3]; the teacher sees the first. A method
      of parts takes `part_networks.PartViews` in their place. `keys`
      [B] are per-example random keys.
    scores: (prototypes, constants, examples, targets) of `Seen` ->
      `streaming.Scores`, for all or some prototypes.
    outputs: (scores, their normalisers over all prototypes, examples, targets)
      -> what the terms are made of.
    terms: the terms of the loss by name.
    example_monitors: outputs -> [B] of each thing worth watching.
    monitors: `Seen` -> named scalars worth watching, global over the batch.
    update: (method_state, `Seen`) -> method_state.
    encoder_variables: (params, stats) -> what the encoder is applied to,
      adapters merged in.
    embed: (params, stats, images [B, H, W, 3]) -> image embeddings [B, D];
      `stats` are the network's running batch statistics, 'student_stats' or
      'teacher_stats' of the method state, {} where there are none.
    attend: (params, stats, images) -> what each patch counts, [B, N]: the
      multi-instance attention, which adds up to 1; without, the encoder's own;
      without that, the length of the patch's features.
    sums_over_prototypes: whether the terms are sums over the prototypes.
    sums_over_examples: whether no term of an example depends on others.
  """

  init: Callable[..., tuple[Params, MethodState]]
  forward: Callable[..., Seen]
  scores: Callable[..., Any]
  outputs: Callable[..., Any]
  terms: Mapping[str, Term]
  example_monitors: Callable[[Any], Mapping[str, jax.Array]]
  monitors: Callable[[Seen], Mapping[str, jax.Array]]
  update: Callable[[MethodState, Seen], MethodState]
  encoder_variables: Callable[[Params, Any], Mapping[str, Any]]
  embed: Callable[[Params, Any, jax.Array], jax.Array]
  attend: Callable[[Params, Any, jax.Array], jax.Array]
  sums_over_prototypes: bool = True
  sums_over_examples: bool = True


def warm_up_terms(method: Method, warmup: Schedule) -> Method:
  """A method whose terms, but that of the image, gain weight as it learns.

  Not published: from the first step on, terms of regions can keep the image
  term from learning anything (benchmarks/RESEARCH.md).

  Args:
    method: with or without other terms.
    warmup: step -> factor of their weights.
  """

  def warmed(name: str, term: Term) -> Term:
    if name == 'image':
      return term
    return term._replace(weight=lambda step: warmup(step) * term.weight(step))

  return method._replace(
    terms={name: warmed(name, term) for name, term in method.terms.items()}
  )


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
