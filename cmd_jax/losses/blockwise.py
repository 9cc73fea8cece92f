"""Losses over prototypes that look at a few prototypes at a time.

Logits over K prototypes of every patch of a batch do not fit into memory, and
take longer to pass through it than to compute. The terms of distillation are
sums over the prototypes of what a prototype's logits and the normalisers
logsumexp_k say. So blocks of prototypes are passed over three times:

  1. the logits z_k, and the normalisers n of their rows;
  2. dL/dn of the loss L = sum_k l(z_k, n);
  3. L, dL/dz_k = dl/dz_k + dL/dn softmax(z)_k, and from it, while it is in the
     cache, the gradients of features and prototypes.

Only logits that fit into a budget are kept from the first pass for the others;
no other array is rows times K long. The loss is a mean over the
examples, so that its cotangent is known when the gradient is taken: examples,
too, are seen a few at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from cmd_jax.devices import chunking, sharding

# Prototypes of 256 numbers of which so many stay in a core's cache.
_CACHED_PROTOTYPES = 1024


class Scores(NamedTuple):
  """Logits divided by their temperatures; pytrees of [b, ..., k] arrays.

  Attributes:
    student: with gradient.
    teacher: without.
  """

  student: Any
  teacher: Any


class Objective(NamedTuple):
  """A loss over prototypes.

  Attributes:
    scores: (prototypes, constants, examples, targets) -> `Scores`, for k of the
      prototypes.
    compare: (scores, normalisers, constants, examples, targets) -> (loss [b],
      what to report, [b] each), for scores of k of the prototypes and the
      normalisers of all.
    sums_over_prototypes: whether what `compare` returns for all prototypes is
      the sum of what it returns for blocks of them.
  """

  scores: Callable[..., Scores]
  compare: Callable[..., tuple[jax.Array, Any]]
  sums_over_prototypes: bool = True


class Budget(NamedTuple):
  """What logits may take.

  Attributes:
    block_bytes: the logits of a block of prototypes: on a CPU they should stay
      in its cache; elsewhere they should keep matrix units busy.
    kept_bytes: the logits kept from the first pass.
  """

  block_bytes: int
  kept_bytes: int


def usual_budget() -> Budget:
  """For the kind of device that JAX computes on by default."""
  if jax.default_backend() == 'cpu':
    return Budget(8 * 2**20, 320 * 2**20)
  return Budget(256 * 2**20, 2**30)


class _Inputs(NamedTuple):
  """What the logits of some examples are made of.

  Attributes:
    prototypes: [..., K] arrays, with gradient.
    constants: [..., K] arrays and scalars, without gradient.
    examples: [b, ...] arrays, with gradient.
    targets: [b, ...] arrays, without gradient.
  """

  prototypes: Any
  constants: Any
  examples: Any
  targets: Any


def _cut(tree: Any, number: jax.Array, size: int) -> Any:
  """A block of the prototypes; scalars have no prototypes."""

  def cut(x):
    if not jnp.ndim(x):
      return x
    return lax.dynamic_slice_in_dim(x, number * size, size, axis=-1)

  return jax.tree.map(cut, tree)


def _add_to_block(total: Any, block: Any, number: jax.Array) -> Any:
  """Adds to a block of the prototypes."""

  def add(total, block):
    size = block.shape[-1]
    block += lax.dynamic_slice_in_dim(total, number * size, size, axis=-1)
    return lax.dynamic_update_slice_in_dim(total, block, number * size, axis=-1)

  return jax.tree.map(add, total, block)


def _tree_add(one: Any, other: Any) -> Any:
  return jax.tree.map(jnp.add, one, other)


def normalisers_of(scores: Any) -> Any:
  """logsumexp over the prototypes, of every array."""
  return jax.tree.map(functools.partial(jax.nn.logsumexp, axis=-1), scores)


def over_prototypes(fn: Callable[[Any], jax.Array], prototypes: Any):
  """What a function returns for all prototypes, computed block by block.

  Args:
    fn: [..., k] arrays -> [..., k].
    prototypes: [..., K] arrays.

  Returns:
    [..., K].
  """
  num_prototypes = jax.tree.leaves(prototypes)[0].shape[-1]
  size = chunking.largest_divisor(num_prototypes, _CACHED_PROTOTYPES)
  if size * 16 < min(num_prototypes, _CACHED_PROTOTYPES):
    return fn(prototypes)
  values = lax.map(
    lambda number: fn(_cut(prototypes, number, size)),
    jnp.arange(num_prototypes // size),
  )
  values = jnp.moveaxis(values, 0, -2)
  return values.reshape(*values.shape[:-2], num_prototypes)


class _Passes:
  """The three passes over the prototypes, for some examples."""

  def __init__(self, objective: Objective, size: int, inputs: _Inputs):
    self._objective, self._size, self._inputs = objective, size, inputs
    num_prototypes = jax.tree.leaves(inputs.prototypes)[0].shape[-1]
    self._numbers = jnp.arange(num_prototypes // size)

  def _cut(self, tree, number):
    return _cut(tree, number, self._size)

  def _scores(self, prototypes, examples, number) -> Scores:
    constants = self._cut(self._inputs.constants, number)
    return self._objective.scores(
      prototypes, constants, examples, self._inputs.targets
    )

  def _compute(self, number) -> Scores:
    prototypes = self._cut(self._inputs.prototypes, number)
    return self._scores(prototypes, self._inputs.examples, number)

  def _loss(self, student, student_normalisers, examples, teacher, number):
    normalisers = Scores(student_normalisers, self._teacher_normalisers)
    loss, values = self._objective.compare(
      Scores(student, teacher),
      normalisers,
      self._cut(self._inputs.constants, number),
      examples,
      self._inputs.targets,
    )
    return loss.sum(), values

  def empty_scores(self) -> Scores:
    """Room for the scores of all blocks."""
    return jax.tree.map(
      lambda x: jnp.zeros((len(self._numbers), *x.shape), x.dtype),
      jax.eval_shape(self._compute, 0),
    )

  def normalise(self, kept: Scores | None) -> Scores | None:
    """Finds the normalisers of all rows.

    Args:
      kept: where the scores go; None keeps none.

    Returns:
      The scores, None if they aren't kept.
    """

    def add(carry, number):
      normalisers, kept = carry
      scores = self._compute(number)
      normalisers = jax.tree.map(
        jnp.logaddexp, normalisers, normalisers_of(scores)
      )
      if kept is not None:
        kept = jax.tree.map(
          lambda all_scores, new: lax.dynamic_update_index_in_dim(
            all_scores, new, number, 0
          ),
          kept,
          scores,
        )
      return (normalisers, kept), None

    empty = jax.tree.map(
      lambda x: jnp.full(x.shape[:-1], -jnp.inf, x.dtype),
      jax.eval_shape(self._compute, 0),
    )
    (normalisers, kept), _ = lax.scan(add, (empty, kept), self._numbers)
    self._normalisers, self._teacher_normalisers = normalisers
    return kept

  def differentiate_normalisers(self, kept: Scores | None) -> Any:
    """dL/dn of the student's."""

    def add(total, block):
      number, scores = block
      scores = self._compute(number) if scores is None else scores
      of_normalisers, _ = jax.grad(self._loss, argnums=1, has_aux=True)(
        scores.student,
        self._normalisers,
        self._inputs.examples,
        scores.teacher,
        number,
      )
      return _tree_add(total, of_normalisers), None

    start = jax.tree.map(jnp.zeros_like, self._normalisers)
    total, _ = lax.scan(add, start, (self._numbers, kept))
    return total

  def _differentiate_block(self, of_normalisers, number, scores):
    """Loss, what to report, and gradients of prototypes and examples."""
    (loss, values), (of_scores, of_examples) = jax.value_and_grad(
      self._loss, argnums=(0, 2), has_aux=True
    )(
      scores.student,
      self._normalisers,
      self._inputs.examples,
      scores.teacher,
      number,
    )
    of_scores = jax.tree.map(
      lambda g, z, n, of_n: g + of_n[..., None] * jnp.exp(z - n[..., None]),
      of_scores,
      scores.student,
      self._normalisers,
      of_normalisers,
    )
    _, pull_back = jax.vjp(
      lambda prototypes, examples: (
        self._scores(prototypes, examples, number).student
      ),
      self._cut(self._inputs.prototypes, number),
      self._inputs.examples,
    )
    of_prototypes, by_scores = pull_back(of_scores)
    # A bfloat16 sum over many blocks would lose what is small.
    of_examples = jax.tree.map(
      lambda x, y: (x + y).astype(jnp.promote_types(x.dtype, jnp.float32)),
      of_examples,
      by_scores,
    )
    return of_prototypes, (loss, values, of_examples)

  def differentiate(
    self, of_normalisers: Any, kept: Scores | None, of_prototypes: Any
  ) -> tuple[Any, tuple]:
    """Adds to the gradients of the prototypes.

    Args:
      of_normalisers: dL/dn.
      kept: the scores.
      of_prototypes: gradients of examples seen before.

    Returns:
      The gradients of the prototypes; and the loss, what to report and the
      gradients of the examples.
    """

    def of_block(number, scores):
      scores = self._compute(number) if scores is None else scores
      return self._differentiate_block(of_normalisers, number, scores)

    def add(carry, block):
      of_prototypes, total = carry
      of_block_prototypes, more = of_block(*block)
      return (
        _add_to_block(of_prototypes, of_block_prototypes, block[0]),
        _tree_add(total, more),
      ), None

    blocks_of_all = (self._numbers, kept)
    _, shapes = jax.eval_shape(
      of_block, *jax.tree.map(lambda x: x[0], blocks_of_all)
    )
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    carry, _ = lax.scan(add, (of_prototypes, start), blocks_of_all)
    return carry


class _Plan(NamedTuple):
  """How a batch is taken apart.

  Attributes:
    examples: of a block.
    prototypes: of a block.
    keeps: whether logits are kept.
  """

  examples: int
  prototypes: int
  keeps: bool


def _make_plan(objective: Objective, inputs: _Inputs, budget: Budget) -> _Plan:
  """The largest blocks within a budget."""
  one = inputs._replace(
    examples=jax.tree.map(lambda x: x[:1], inputs.examples),
    targets=jax.tree.map(lambda x: x[:1], inputs.targets),
  )
  an_example = sum(
    math.prod(x.shape) * x.dtype.itemsize
    for x in jax.tree.leaves(
      jax.eval_shape(
        lambda x: objective.scores(
          x.prototypes, x.constants, x.examples, x.targets
        ),
        one,
      )
    )
  )
  batch_size = len(jax.tree.leaves(inputs.examples)[0])
  num_prototypes = jax.tree.leaves(inputs.prototypes)[0].shape[-1]
  a_prototype = max(1, an_example // num_prototypes)
  # Blocks that are much longer than wide would read the features more often
  # than the prototypes.
  width = min(num_prototypes, _CACHED_PROTOTYPES)
  most_examples = budget.block_bytes // (width * a_prototype)
  keeps = an_example <= budget.kept_bytes
  if keeps:
    most_examples = min(most_examples, budget.kept_bytes // max(1, an_example))
  examples = chunking.largest_divisor(batch_size, most_examples)
  most = budget.block_bytes // (examples * a_prototype)
  prototypes = chunking.largest_divisor(num_prototypes, most)
  # A number without a fitting divisor is not worth thousands of tiny blocks.
  if not objective.sums_over_prototypes or 16 * prototypes < min(
    most, num_prototypes
  ):
    prototypes = num_prototypes
  return _Plan(examples, prototypes, keeps or prototypes == num_prototypes)


def _sum_with_gradients(objective: Objective, budget: Budget, inputs: _Inputs):
  """Sum of the losses, what to report, and the gradients of the sum."""
  plan = _make_plan(objective, inputs, budget)

  split = chunking.split((inputs.examples, inputs.targets), plan.examples)

  def passes_of(examples, targets):
    few = inputs._replace(examples=examples, targets=targets)
    return _Passes(objective, plan.prototypes, few)

  def step(carry, block):
    loss, of_prototypes, kept = carry
    passes = passes_of(*block)
    kept = passes.normalise(kept)
    of_normalisers = passes.differentiate_normalisers(kept)
    of_prototypes, (more, values, of_examples) = passes.differentiate(
      of_normalisers, kept, of_prototypes
    )
    of_examples = jax.tree.map(
      lambda x, like: x.astype(like.dtype), of_examples, block[0]
    )
    return (loss + more, of_prototypes, kept), (values, of_examples)

  kept = None
  if plan.keeps:
    kept = passes_of(*jax.tree.map(lambda x: x[0], split)).empty_scores()
  zeros = jax.tree.map(jnp.zeros_like, inputs.prototypes)
  (loss, of_prototypes, _), (values, of_examples) = lax.scan(
    step, (jnp.zeros(()), zeros, kept), split
  )
  return (
    loss,
    chunking.join(values),
    (of_prototypes, chunking.join(of_examples)),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum(objective, budget, prototypes, constants, examples, targets):
  inputs = _Inputs(prototypes, constants, examples, targets)
  loss, values, _ = _sum_with_gradients(objective, budget, inputs)
  return loss, values


def _sum_fwd(objective, budget, prototypes, constants, examples, targets):
  inputs = _Inputs(prototypes, constants, examples, targets)
  loss, values, gradients = _sum_with_gradients(objective, budget, inputs)
  return (loss, values), gradients


def _sum_bwd(objective, budget, gradients, cotangents):
  of_prototypes, of_examples = jax.tree.map(
    lambda x: (cotangents[0] * x).astype(x.dtype), gradients
  )
  return of_prototypes, None, of_examples, None


_sum.defvjp(_sum_fwd, _sum_bwd)


def compare_at_once(
  objective: Objective,
  prototypes: Any,
  constants: Any,
  examples: Any,
  targets: Any,
) -> tuple[jax.Array, Any]:
  """The plain formula: losses [B] and what to report, from all logits."""
  scores = objective.scores(prototypes, constants, examples, targets)
  scores = scores._replace(teacher=lax.stop_gradient(scores.teacher))
  return objective.compare(
    scores, normalisers_of(scores), constants, examples, targets
  )


def mean_over_examples(
  objective: Objective,
  prototypes: Any,
  constants: Any,
  examples: Any,
  targets: Any,
  *,
  budget: Budget | None = None,
  mesh: Mesh | None = None,
) -> tuple[jax.Array, Any]:
  """Mean of a loss over the examples of a batch.

  Args:
    objective: the loss.
    prototypes: float arrays [..., K], with gradient.
    constants: float arrays [..., K] and scalars, without gradient.
    examples: float arrays [B, ...], with gradient.
    targets: arrays [B, ...], without gradient.
    budget: what logits may take; `usual_budget` without.
    mesh: the devices over which the examples are spread; None where the arrays
      are one device's share already.

  Returns:
    The mean loss (of this device's share without a mesh), and [B] of each
    thing to report, without gradient.
  """
  batch_size = len(jax.tree.leaves(examples)[0])
  budget = budget or usual_budget()

  def of_device(shared, share, _):
    loss, values = _sum(objective, budget, *shared, *share)
    return (), (loss[None], values)

  _, (losses, values) = sharding.on_each_device(of_device, mesh)(
    (prototypes, constants), (examples, targets)
  )
  return losses.sum() / batch_size, lax.stop_gradient(values)
