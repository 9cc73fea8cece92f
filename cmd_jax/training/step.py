"""One pure train step, for every method, device count and way to compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cmd_jax.data.batch import Batch, MultiStepBatch
from cmd_jax.devices import products, sharding
from cmd_jax.methods.base import Method
from cmd_jax.optim.schedules import Schedule
from cmd_jax.training.state import TrainState

# Metrics that must be finite, or the step is none. The parameters too: an
# update may overflow where loss and gradient do not.
WATCHED = ('loss', 'grad_norm', 'param_norm')

# Salts that keep the step's random streams apart.
_VIEWS, _STEP, _DROP_PATH = range(3)


def _example_keys(
  rng: jax.Array, stream: int, step: jax.Array, index: jax.Array
) -> jax.Array:
  """[B] keys, one for each example of a step."""
  key = jax.random.fold_in(jax.random.fold_in(rng, stream), step)
  return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def _make_differentiate(
  method: Method,
  augment: Callable,
  mesh: Mesh | None,
  param_shardings: Any,
  bfloat16_products: bool,
) -> Callable:
  """Makes what sees all or part of a batch.

  Returns:
    (state, batch, rng, constants) -> (`Loss`, gradients).
  """

  def loss_of(params, state, views, keys, constants):
    # What of it belongs to encoders and heads has a scope of its own inside.
    with jax.named_scope('loss'):
      loss = method.loss(
        params,
        state.teacher_params,
        {**state.method_state, **(constants or {})},
        views,
        keys,
        state.step,
      )
    return loss.mean, loss

  gradient_of = jax.grad(loss_of, has_aux=True)
  if bfloat16_products:
    gradient_of = products.with_bfloat16_products(gradient_of)

  def differentiate(state: TrainState, batch: Batch, rng, constants):
    step_key = jax.random.fold_in(jax.random.fold_in(rng, _STEP), state.step)
    views_keys, drop_path_keys = (
      _example_keys(rng, stream, state.step, batch.index)
      for stream in (_VIEWS, _DROP_PATH)
    )
    with jax.named_scope('augment'):
      partners = None
      if batch.partners is not None:
        partners = batch.partners, batch.partner_sizes
      views = augment(
        batch.images,
        batch.sizes,
        views_keys,
        step_key,
        batch.part_ids,
        partners,
      )
    views = views._replace(labels=batch.labels)
    grads, loss = gradient_of(
      state.params, state, views, drop_path_keys, constants
    )
    if param_shardings is not None:
      # Summed first: told to spread them alone, XLA would gather activations.
      grads = sharding.constrain(grads, sharding.replicated(mesh))
      grads = sharding.constrain(grads, param_shardings)
    return loss, grads

  return differentiate


def _accumulate(
  differentiate: Callable, num_microbatches: int, mesh: Mesh | None
) -> Callable:
  """Like `differentiate`, with the examples seen part by part.

  All that it returns are means over the examples, hence over equal parts of a
  batch too; memory for activations is needed for one part alone.
  """

  def accumulate(state: TrainState, batch: Batch, rng, constants):
    parts = sharding.split_microbatches(batch, num_microbatches, mesh)
    shapes = jax.eval_shape(
      differentiate,
      state,
      jax.tree.map(lambda x: x[0], parts),
      rng,
      constants,
    )

    def add(total, part):
      new = differentiate(state, part, rng, constants)
      return jax.tree.map(jnp.add, total, new), None

    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add, start, parts)
    return jax.tree.map(lambda x: x / num_microbatches, total)

  return accumulate


def _if_finite(
  metrics: dict[str, jax.Array], old: TrainState, new: TrainState
) -> TrainState:
  """The new state if what is watched is finite, otherwise the old one."""
  # Not optax.apply_if_finite: it looks at the gradient alone, and teacher,
  # centres and batch statistics would move all the same.
  finite = jnp.all(jnp.array([jnp.isfinite(metrics[name]) for name in WATCHED]))
  kept = jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)
  # The number counts all the same, or the same batch would come again.
  return kept._replace(step=new.step)


def make_train_step(
  *,
  method: Method,
  augment: Callable,
  optimizer: optax.GradientTransformationExtraArgs,
  teacher_momentum: Schedule,
  schedules: dict[str, Schedule],
  axis_name: str | None = None,
  mesh: Mesh | None = None,
  param_shardings: Any = None,
  grad_accum_steps: int = 1,
  skip_non_finite: bool = False,
  bfloat16_products: bool = False,
) -> Callable:
  """Builds step(state, batch, rng, constants) -> (state, metrics).

  In the published order: both networks see the views, the loss uses the old
  centres, the student takes a step, the teacher follows the new student.

  Args:
    method: the objective, built for the same `axis_name`.
    augment: `multi_crop.make_augment`'s.
    optimizer: takes `step=` as an extra argument.
    teacher_momentum: m of teacher <- m teacher + (1 - m) student.
    schedules: schedules to log, by name.
    axis_name: axis over which the batch is spread, None if it is global.
    mesh: the devices over which a global batch is spread; None for arrays of
      one device.
    param_shardings: how parameters, and hence gradients, are spread between the
      steps (FSDP); None where every device keeps them whole.
    grad_accum_steps: equal parts of the batch that are seen one after the other
      before the step is taken. The step is that of the whole batch if
      `Method.is_mean_over_examples`.
    skip_non_finite: whether a step after which one of `WATCHED` is not finite
      leaves all but the step's number as it was.
    bfloat16_products: whether factors of large float32 products of both
      networks and the loss are rounded, see `with_bfloat16_products`.

  Returns:
    The step. `rng` is the run's root key and never changes; `constants` are
    `Method.constants` and are left out where there are none; metrics are
    float32 scalars: `loss`, `loss/<term>` unweighted, what the method has
    watched, the norms of the gradient and of the new parameters, and the
    schedules' values.
  """
  differentiate = _make_differentiate(
    method, augment, mesh, param_shardings, bfloat16_products
  )
  if grad_accum_steps > 1:
    differentiate = _accumulate(differentiate, grad_accum_steps, mesh)

  def step(state: TrainState, batch: Batch, rng: jax.Array, constants=None):
    whole = state
    if param_shardings is not None:
      # Left to itself XLA spreads the products over the width of the layers,
      # and sends activations instead of parameters.
      params, teacher_params = sharding.constrain(
        (state.params, state.teacher_params), sharding.replicated(mesh)
      )
      whole = state._replace(params=params, teacher_params=teacher_params)
    loss, grads = differentiate(whole, batch, rng, constants)
    # The state is equal on all devices already.
    mean, terms, stats, grads = sharding.pmean(
      (loss.mean, loss.terms, loss.stats, grads), axis_name
    )
    with jax.named_scope('optimiser'):
      updates, opt_state = optimizer.update(
        grads, state.opt_state, state.params, step=state.step
      )
      params = optax.apply_updates(state.params, updates)
    # Depends on all that reads the old teacher, or XLA would keep a copy of it;
    # a barrier is gone by the time it looks.
    last = sum(x.ravel()[0] for x in jax.tree.leaves(loss.state))
    rate = 1 - teacher_momentum(state.step) + 0 * last
    # In this form a parameter that does not move stays equal to the bit.
    with jax.named_scope('teacher'):
      teacher_params = jax.tree.map(
        lambda old, new: old + rate * (new - old), state.teacher_params, params
      )
    metrics = {
      'loss': mean,
      **{f'loss/{name}': value for name, value in terms.items()},
      **method.finish(stats),
      'grad_norm': optax.tree.norm(grads),
      'param_norm': optax.tree.norm(params),
      **{name: schedule(state.step) for name, schedule in schedules.items()},
    }
    new_state = TrainState(
      step=state.step + 1,
      params=params,
      teacher_params=teacher_params,
      opt_state=opt_state,
      method_state=loss.state,
    )
    if skip_non_finite:
      new_state = _if_finite(metrics, state, new_state)
    return new_state, jax.tree.map(lambda x: x.astype(jnp.float32), metrics)

  return step


def multi_step(step: Callable) -> Callable:
  """Lets steps follow each other without the host.

  Args:
    step: (state, batch, rng, constants) -> (state, metrics).

  Returns:
    (state, `MultiStepBatch`, rng, constants) -> (state, metrics), each metric
    [n]; those of steps that were not taken are 0.
  """

  def steps(state: TrainState, batches: MultiStepBatch, rng, *constants):
    def batch_of(number):
      return jax.tree.map(lambda x: x[number], batches.batch)

    def take(number, carry):
      state, metrics = carry
      state, new = step(state, batch_of(number), rng, *constants)
      return state, jax.tree.map(
        lambda all_steps, x: all_steps.at[number].set(x), metrics, new
      )

    most = len(batches.batch.index)
    _, like = jax.eval_shape(step, state, batch_of(0), rng, *constants)
    metrics = jax.tree.map(lambda x: jnp.zeros((most, *x.shape), x.dtype), like)
    return jax.lax.fori_loop(0, batches.count, take, (state, metrics))

  return steps
