"""One pure train step, for every method, device count and way to compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cmd_jax import parallel
from cmd_jax.losses import blockwise
from cmd_jax.methods.base import Method
from cmd_jax.methods.part_networks import PartViews
from cmd_jax.schedules import Schedule
from cmd_jax.train_state import TrainState

# Salts that keep the step's random streams apart.
_VIEWS, _STEP, _DROP_PATH = range(3)


class Batch(NamedTuple):
  """A batch before augmentation.

  Attributes:
    images: [B, R, R, 3] uint8 canvases.
    sizes: [B, 2] int32 height and width of the originals in pixels.
    index: [B] int32 number of the example in its data set; it alone keys the
      example's randomness within a step.
    part_ids: [B, R, R] uint8 part of every pixel; None for a method without
      parts.
  """

  images: jax.Array
  sizes: jax.Array
  index: jax.Array
  part_ids: jax.Array | None = None


def make_train_step(
  *,
  method: Method,
  augment: Callable,
  optimizer: optax.GradientTransformationExtraArgs,
  teacher_momentum: Schedule,
  schedules: dict[str, Schedule],
  axis_name: str | None = None,
  mesh: Mesh | None = None,
) -> Callable:
  """Builds step(state, batch, rng) -> (state, metrics).

  In the published order: both networks see the views, the loss uses the old
  centres, the student takes a step, the teacher follows the new student.

  Args:
    method: the objective, built for the same `axis_name`.
    augment: (images, sizes, keys, step_key, part_ids) -> `Views`.
    optimizer: takes `step=` as an extra argument.
    teacher_momentum: m of teacher <- m teacher + (1 - m) student.
    schedules: schedules to log, by name.
    axis_name: axis over which the batch is spread, None if it is global.
    mesh: the devices over which a global batch is spread; None for arrays of
      one device.

  Returns:
    The step. `rng` is the run's root key and never changes; metrics are float32
    scalars: `loss`, `loss/<term>` unweighted, the method's monitors and the
    schedules' values.
  """

  def compare(prototypes, examples, constants):
    of_method, weights = constants
    outputs = method.compare(prototypes, examples, of_method)
    values = {name: term.value(outputs) for name, term in method.terms.items()}
    total = sum(weights[name] * value for name, value in values.items())
    reported = {f'loss/{name}': value for name, value in values.items()}
    return total, {**reported, **method.example_monitors(outputs)}

  def loss_fn(params, state, views, keys):
    seen = method.forward(
      params,
      state.teacher_params,
      state.method_state,
      views,
      keys,
      state.step,
    )
    weights = {
      name: jnp.float32(term.weight(state.step))
      for name, term in method.terms.items()
    }
    loss, reported = blockwise.mean_over_examples(
      compare,
      seen.prototypes,
      seen.examples,
      (seen.constants, weights),
      bytes_an_example=method.logit_bytes(seen),
      mesh=mesh,
    )
    return loss, (jax.tree.map(jnp.mean, reported), seen)

  def step(state: TrainState, batch: Batch, rng: jax.Array):
    def example_keys(stream):
      stream_key = jax.random.fold_in(rng, stream)
      key = jax.random.fold_in(stream_key, state.step)
      return jax.vmap(jax.random.fold_in, (None, 0))(key, batch.index)

    step_key = jax.random.fold_in(jax.random.fold_in(rng, _STEP), state.step)
    views = augment(
      batch.images, batch.sizes, example_keys(_VIEWS), step_key, batch.part_ids
    )
    seen = tuple(
      x for x in (views.global_views, views.local_views) if x.shape[1]
    )
    if views.global_part_ids is not None:
      seen = PartViews(seen, views.global_part_ids)

    (loss, (values, features)), grads = jax.value_and_grad(
      loss_fn, has_aux=True
    )(state.params, state, seen, example_keys(_DROP_PATH))
    loss, values, grads = parallel.pmean((loss, values, grads), axis_name)
    updates, opt_state = optimizer.update(
      grads, state.opt_state, state.params, step=state.step
    )
    params = optax.apply_updates(state.params, updates)
    rate = 1 - teacher_momentum(state.step)
    # In this form a parameter that does not move stays equal to the bit.
    teacher_params = jax.tree.map(
      lambda old, new: old + rate * (new - old), state.teacher_params, params
    )
    metrics = {
      'loss': loss,
      **values,
      **method.monitors(features),
      'grad_norm': optax.tree.norm(grads),
      **{name: schedule(state.step) for name, schedule in schedules.items()},
    }
    new_state = TrainState(
      step=state.step + 1,
      params=params,
      teacher_params=teacher_params,
      opt_state=opt_state,
      method_state=method.update(state.method_state, features),
    )
    return new_state, jax.tree.map(lambda x: x.astype(jnp.float32), metrics)

  return step
