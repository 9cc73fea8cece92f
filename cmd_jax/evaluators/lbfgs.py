"""L-BFGS for convex objectives, preconditioned, under `jit` and `vmap`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Pairs of steps and gradient changes that are remembered.
_HISTORY = 10


class _Search(NamedTuple):
  """State of L-BFGS with a line search, one evaluation per iteration."""

  params: jax.Array
  loss: jax.Array
  grad: jax.Array
  direction: jax.Array
  slope: jax.Array  # of the loss along the direction
  step: jax.Array  # to be tried next
  steps: jax.Array  # [_HISTORY, D, K], the newest last
  changes: jax.Array  # [_HISTORY, D, K], of the gradient
  evals: jax.Array


def minimise(
  objective: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
  params: jax.Array,
  diagonal: jax.Array,
  *,
  tolerance: float,
  max_evals: int,
) -> jax.Array:
  """Minimises a convex objective that is not negative.

  Every iteration evaluates the objective once, whether the line search accepts
  the point or not, so problems under `vmap` don't wait for each other's line
  searches. Ends when the expected decrease, half of the squared Newton
  decrement, is below `tolerance` times both the objective and the decrease
  expected at 0. (The objective alone won't do: of a strongly penalised logistic
  regression nearly all is the constant C N log K, and the search would end
  where it began.)

  Args:
    objective: [D, K] parameters -> its value and gradient [D, K].
    params: [D, K] start.
    diagonal: [D, 1] about the diagonal of the Hessian.
    tolerance: relative accuracy.
    max_evals: most evaluations.

  Returns:
    [D, K] parameters.
  """
  constant, grad = objective(jnp.zeros_like(params))
  decrease = 0.5 * _dot(grad, grad / diagonal)
  noise = 1e-10 * constant  # what float32 gradients leave of a decrease

  def unfinished(s: _Search) -> jax.Array:
    enough = tolerance * jnp.minimum(s.loss, decrease)
    promising = -0.5 * s.slope > jnp.maximum(enough, noise)
    return promising & (s.evals < max_evals) & (s.step > 1e-6)

  def iterate(s: _Search) -> _Search:
    params = s.params + s.step * s.direction
    loss, grad = objective(params)
    slope = _dot(grad, s.direction)
    # The objective is convex: where it still falls, it is below the start, even
    # if the difference drowns in float32.
    accept = (loss <= s.loss + 1e-4 * s.step * s.slope) | (slope <= 0)
    steps = _push(s.steps, params - s.params)
    changes = _push(s.changes, grad - s.grad)
    direction = -_inverse_hessian_times(grad, steps, changes, diagonal)
    # Rejected: on to the zero of the slope's secant.
    shorter = s.step * jnp.clip(s.slope / (s.slope - slope), 0.1, 0.5)
    evals = s.evals + 1
    accepted = _Search(
      params, loss, grad, direction, _dot(grad, direction),
      jnp.ones(()), steps, changes, evals,
    )  # fmt: skip
    rejected = s._replace(step=shorter, evals=evals)
    return jax.tree.map(
      functools.partial(jnp.where, accept), accepted, rejected
    )

  loss, grad = objective(params)
  direction = -grad / diagonal
  history = jnp.zeros((_HISTORY, *params.shape))
  start = _Search(
    params, loss, grad, direction, _dot(grad, direction),
    jnp.ones(()), history, history, jnp.ones((), jnp.int32),
  )  # fmt: skip
  return jax.lax.while_loop(unfinished, iterate, start).params


def _inverse_hessian_times(
  grad: jax.Array, steps: jax.Array, changes: jax.Array, diagonal: jax.Array
) -> jax.Array:
  """The two-loop recursion (Nocedal & Wright 2006, algorithm 7.4)."""
  curvatures = jnp.sum(steps * changes, axis=(1, 2))
  # Slots not yet filled, or without curvature in float32, have no effect.
  filled = curvatures > 0
  rho = jnp.where(filled, 1 / jnp.where(filled, curvatures, 1), 0)

  def newest_first(grad, slot):
    step, change, rho = slot
    alpha = rho * _dot(step, grad)
    return grad - alpha * change, alpha

  def oldest_first(product, slot):
    step, change, rho, alpha = slot
    return product + step * (alpha - rho * _dot(change, product)), None

  slots = (steps, changes, rho)
  grad, alphas = jax.lax.scan(newest_first, grad, slots, reverse=True)
  newest = changes[-1]
  norm = _dot(newest, newest / diagonal)
  usual = filled[-1] & (norm > 0)
  gamma = jnp.where(usual, curvatures[-1] / jnp.where(usual, norm, 1), 1)
  product = gamma * grad / diagonal
  return jax.lax.scan(oldest_first, product, (*slots, alphas))[0]


def _push(history: jax.Array, newest: jax.Array) -> jax.Array:
  return jnp.concatenate([history[1:], newest[None]])


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.sum(a * b)
