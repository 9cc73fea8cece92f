"""Everything that a run carries from one step to the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cmd_jax.devices import sharding
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


def _with_encoder(
  params: Params, method_state: MethodState, variables: Mapping[str, Any]
) -> tuple[Params, MethodState]:
  """Puts an encoder's variables in place of the initial ones."""
  params = {**params, 'encoder': variables['params']}
  if 'batch_stats' in variables:
    method_state = {
      **method_state,
      **{
        name: {
          **method_state[name],
          'encoder': jax.tree.map(jnp.copy, variables['batch_stats']),
        }
        for name in ('student_stats', 'teacher_stats')
      },
    }
  return params, method_state


def init_train_state(
  method: Method,
  optimizer: optax.GradientTransformation,
  rng: jax.Array,
  encoder_variables: Mapping[str, Any] | None = None,
) -> TrainState:
  """The state before the first step; the teacher is a copy of the student.

  Args:
    method: the objective.
    optimizer: the optimiser.
    rng: random key of what is drawn.
    encoder_variables: the encoder to start from, 'params' and 'batch_stats' if
      it has any; None draws one.
  """
  params, method_state = method.init(rng)
  if encoder_variables is not None:
    params, method_state = _with_encoder(
      params, method_state, encoder_variables
    )
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    # A copy, because the step donates its buffers and may not donate one twice.
    teacher_params=jax.tree.map(jnp.copy, params),
    opt_state=optimizer.init(params),
    method_state=method_state,
  )


def state_shardings(
  state: TrainState,
  mesh: Mesh,
  *,
  fsdp: bool,
  min_size: int = sharding.MIN_SHARDED_SIZE,
) -> TrainState:
  """The `NamedSharding` of every array of a state.

  Args:
    state: the state, or its shapes.
    mesh: the devices.
    fsdp: whether parameters, teacher and optimiser state are spread over the
      devices, see `parallel.fsdp_spec`; all is whole on each device otherwise.
    min_size: elements below which an array stays whole.
  """
  whole = jax.tree.map(lambda _: sharding.replicated(mesh), state)
  if not fsdp:
    return whole
  return whole._replace(
    **{
      name: sharding.fsdp_shardings(getattr(state, name), mesh, min_size)
      for name in ('params', 'teacher_params', 'opt_state')
    }
  )
