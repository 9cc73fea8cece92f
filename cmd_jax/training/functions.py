"""What of a run is compiled: its start and its train step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cmd_jax.data.augment import multi_crop
from cmd_jax.data.batch import MultiStepBatch
from cmd_jax.data.channels import IMAGENET, Statistics
from cmd_jax.devices import sharding
from cmd_jax.methods.base import Method
from cmd_jax.models import partial
from cmd_jax.parts.plan import Plan
from cmd_jax.training.frozen_teacher import load_teacher
from cmd_jax.training.recipe import (
  check_accumulates,
  has_bfloat16_products,
  make_method_maker,
  make_optimizer,
  make_schedules,
  resolve_encoder_scale,
)
from cmd_jax.training.state import TrainState, init_train_state, state_shardings
from cmd_jax.training.step import make_train_step, multi_step
from cmd_jax.training.timetable import Steps

# Salts of the run's root key.
_INIT_SALT, STEPS_SALT = range(2)


class Functions(NamedTuple):
  """What is compiled.

  Attributes:
    method: the objective for global batches.
    init: () -> `TrainState` on the mesh.
    state_like: shapes and shardings of that state.
    step: the train step, compiled when it is first called.
  """

  method: Method
  init: Callable[[], TrainState]
  state_like: TrainState
  step: Callable


def make_functions(
  config: ConfigDict,
  mesh: Mesh,
  encoder: nn.Module,
  plan: Plan | None,
  is_frozen: partial.IsFrozen,
  steps: Steps,
  variables: Mapping[str, Any] | None,
  class_counts: tuple[int, ...] | None,
  statistics: Statistics = IMAGENET,
) -> Functions:
  """Makes the method, the state and the step of a run.

  Args:
    config: as cmd_jax/config/published.py makes it.
    mesh: the devices, which need not be here.
    encoder: the encoder.
    plan: how parts are found; None for a method without.
    is_frozen: path of a parameter -> whether it stays as it is.
    steps: when what happens.
    variables: of the encoder to begin with; None draws them.
    class_counts: training images of each class; None for a method without
      labels.
    statistics: by which views are normalised.

  Raises:
    UserError: what the factories of methods and optimisers refuse.
  """
  named = make_schedules(config, steps.per_epoch, steps.total)
  optimizer = make_optimizer(
    config.optim,
    named,
    steps.per_epoch,
    is_frozen,
    encoder,
    encoder_scale=resolve_encoder_scale(config, steps.per_epoch, steps.total),
  )
  # How many parts there are is what their source says.
  made = {} if plan is None else {'num_parts': plan.num_ids}
  if class_counts is not None:
    made['class_counts'] = class_counts
  if 'teacher' in config.method:
    made['teacher'] = load_teacher(**config.method.teacher)
  platform = mesh.devices.flat[0].platform
  method_for = make_method_maker(
    config, named, is_frozen, platform=platform, **made
  )
  several = steps.per_call > 1

  def make_step(axis_name, mesh):
    step = make_train_step(
      method=method_for(axis_name, mesh),
      augment=multi_crop.make_augment(
        mesh=mesh, **statistics._asdict(), **config.augment
      ),
      optimizer=optimizer,
      teacher_momentum=named['teacher_momentum'],
      schedules=named,
      axis_name=axis_name,
      mesh=mesh,
      param_shardings=shardings.params if fsdp else None,
      grad_accum_steps=config.parallel.grad_accum_steps,
      skip_non_finite=config.optim.skip_non_finite_steps > 0,
      bfloat16_products=has_bfloat16_products(config, platform),
    )
    return multi_step(step) if several else step

  method = method_for(None, None)
  check_accumulates(config, method)

  def init(rng, variables):
    return init_train_state(method, optimizer, rng, variables)

  rng = jax.random.fold_in(jax.random.key(config.seed), _INIT_SALT)
  shapes = jax.eval_shape(init, rng, variables)
  fsdp = sharding.wants_fsdp(
    config.parallel.state,
    mode=config.parallel.mode,
    num_bytes=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes)),
    mesh=mesh,
  )
  shardings = state_shardings(shapes, mesh, fsdp=fsdp)
  init = jax.jit(init, out_shardings=shardings)
  return Functions(
    method,
    lambda: init(rng, variables),
    jax.tree.map(
      lambda x, sharding: x.update(sharding=sharding), shapes, shardings
    ),
    sharding.compile_step(
      make_step,
      mode=config.parallel.mode,
      mesh=mesh,
      state_shardings=shardings,
      batch_shardings=MultiStepBatch(
        sharding.each_sharded(mesh), sharding.replicated(mesh)
      )
      if several
      else None,
      has_constants=bool(method.constants),
    ),
  )


def compile_functions(functions: Functions, mesh: Mesh, *arguments) -> Callable:
  """The compiled step (state, batch, rng) -> (state, metrics).

  What is constant is put on the devices once.
  """
  if not functions.method.constants:
    return sharding.compile_ahead(
      functions.step, functions.state_like, *arguments
    )
  constants = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))(
    functions.method.constants
  )
  step = sharding.compile_ahead(
    functions.step, functions.state_like, *arguments, constants
  )
  return lambda state, batch, rng: step(state, batch, rng, constants)
