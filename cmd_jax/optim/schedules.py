"""Schedules as pure functions of the step."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array], jax.Array]


def cosine_schedule(
  base: float,
  final: float,
  total_steps: int,
  *,
  warmup_steps: int = 0,
  warmup_start: float = 0.0,
) -> Schedule:
  """A linear warm-up to `base`, then half a cosine towards `final`.

  The published schedule (DINO, utils.py `cosine_scheduler`): the warm-up has
  `warmup_steps` equally spaced points from `warmup_start` to `base` inclusive,
  so `base` occurs twice, and the last point stays one step short of `final`.

  Args:
    base: value after the warm-up.
    final: value that the cosine approaches.
    total_steps: number of steps, warm-up included.
    warmup_steps: number of steps of the warm-up.
    warmup_start: value at step 0 if there is a warm-up.

  Returns:
    step -> value, both scalar; constant from `total_steps` on.
  """
  cosine_steps = max(total_steps - warmup_steps, 1)

  def schedule(step: jax.Array) -> jax.Array:
    step = jnp.minimum(step, total_steps - 1).astype(jnp.float32)
    progress = (step - warmup_steps) / cosine_steps
    cosine = final + 0.5 * (base - final) * (1 + jnp.cos(jnp.pi * progress))
    slope = (base - warmup_start) / max(warmup_steps - 1, 1)
    return jnp.where(step < warmup_steps, warmup_start + slope * step, cosine)

  return schedule


def stepwise_schedule(
  start: float, final: float, warmup_epochs: int, steps_per_epoch: int
) -> Schedule:
  """A value that rises once an epoch, then stays: the teacher temperature.

  Epoch e < `warmup_epochs` has the e-th of `warmup_epochs` equally spaced
  values from `start` to `final` inclusive (DINO, main_dino.py `DINOLoss`).

  Args:
    start: value in the first epoch.
    final: value from epoch `warmup_epochs` on.
    warmup_epochs: number of epochs until `final` is kept.
    steps_per_epoch: number of steps of an epoch.

  Returns:
    step -> value, both scalar.
  """

  def schedule(step: jax.Array) -> jax.Array:
    epoch = (step // steps_per_epoch).astype(jnp.float32)
    rising = start + (final - start) * epoch / max(warmup_epochs - 1, 1)
    return jnp.where(epoch < warmup_epochs, rising, final)

  return schedule


def linear_warmup(warmup_steps: int) -> Schedule:
  """A factor that rises from 0 at step 0 to 1 at step `warmup_steps`.

  Args:
    warmup_steps: at least 1.

  Returns:
    step -> factor, both scalar.
  """
  return lambda step: jnp.minimum(step / warmup_steps, 1.0)


def ramped_ema_decay(limit: float) -> Schedule:
  """Decay of a moving average that follows at once at first (torch_ema).

  min(limit, (1 + n) / (10 + n)) at the n-th update, counted from 1: the
  teacher's momentum in PARTICLE's ResNet variant.

  Args:
    limit: decay that is reached and kept.

  Returns:
    step, counted from 0 -> decay.
  """

  def schedule(step: jax.Array) -> jax.Array:
    number = step + 1.0
    return jnp.minimum(limit, (1 + number) / (10 + number))

  return schedule
