"""The optimiser and the schedules of a run, out of its config."""

from __future__ import annotations

import optax
from ml_collections import ConfigDict

from cmd_jax import optim, schedules
from cmd_jax.errors import UserError
from cmd_jax.schedules import Schedule

OPTIMIZERS = ('adamw', 'sgd')
MOMENTA = ('cosine', 'ramped')


def make_schedules(
  config: ConfigDict, steps_per_epoch: int, total_steps: int
) -> dict[str, Schedule]:
  """The schedules of a run by name.

  Raises:
    UserError: an unknown kind of teacher momentum.
  """
  optimizer, teacher = config.optim, config.teacher
  if teacher.momentum_schedule not in MOMENTA:
    raise UserError(
      f'config.teacher.momentum_schedule is {teacher.momentum_schedule!r}: '
      f'choose one of {", ".join(MOMENTA)}'
    )
  momentum = schedules.ramped_ema_decay(teacher.final_momentum)
  if teacher.momentum_schedule == 'cosine':
    momentum = schedules.cosine_schedule(
      teacher.base_momentum, teacher.final_momentum, total_steps
    )
  return {
    'learning_rate': schedules.cosine_schedule(
      optimizer.base_learning_rate * config.batch_size / 256,
      optimizer.final_learning_rate,
      total_steps,
      warmup_steps=round(optimizer.warmup_epochs * steps_per_epoch),
    ),
    'weight_decay': schedules.cosine_schedule(
      optimizer.base_weight_decay, optimizer.final_weight_decay, total_steps
    ),
    'teacher_momentum': momentum,
    'teacher_temperature': schedules.stepwise_schedule(
      teacher.warmup_temperature,
      teacher.temperature,
      teacher.warmup_temperature_epochs,
      steps_per_epoch,
    ),
  }


def make_optimizer(
  config: ConfigDict,
  named: dict[str, Schedule],
  steps_per_epoch: int,
  is_frozen: optim.IsIn,
) -> optax.GradientTransformationExtraArgs:
  """The optimiser of config.optim.

  Args:
    config: config.optim.
    named: from `make_schedules`.
    steps_per_epoch: steps of an epoch.
    is_frozen: path of a parameter -> whether it stays as it is.

  Raises:
    UserError: an unknown optimiser.
  """
  if config.name not in OPTIMIZERS:
    raise UserError(
      f'config.optim.name is {config.name!r}: choose one of '
      f'{", ".join(OPTIMIZERS)}'
    )
  make = {'adamw': optim.make_adamw, 'sgd': optim.make_sgd}[config.name]
  return make(
    learning_rate=named['learning_rate'],
    weight_decay=named['weight_decay'],
    is_frozen=is_frozen,
    clip_norm=config.clip_norm,
    freeze_last_layer_steps=round(
      config.freeze_last_layer_epochs * steps_per_epoch
    ),
    # PARTICLE's program clips the student and not its predictor.
    is_clipped=lambda path: path[0] != 'predictor',
    decay_vectors=config.decay_vectors,
  )
