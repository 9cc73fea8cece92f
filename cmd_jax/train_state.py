"""Everything that a run carries from one step to the next."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cmd_jax.methods.base import Method, MethodState, Params


class TrainState(NamedTuple):
  """The state of training; random keys are derived from the step instead.

  Attributes:
    step: scalar int32, number of steps taken.
    params: the student's parameters.
    teacher_params: their moving average, the teacher's.
    opt_state: state of the optimiser.
    method_state: state of the method, such as centres.
  """

  step: jax.Array
  params: Params
  teacher_params: Params
  opt_state: optax.OptState
  method_state: MethodState


def init_train_state(
  method: Method, optimizer: optax.GradientTransformation, rng: jax.Array
) -> TrainState:
  """The state before the first step; the teacher is a copy of the student."""
  params, method_state = method.init(rng)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    # A copy, because the step donates its buffers and may not donate one twice.
    teacher_params=jax.tree.map(jnp.copy, params),
    opt_state=optimizer.init(params),
    method_state=method_state,
  )
