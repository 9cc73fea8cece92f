"""One pure train step, for every method, device count and way to compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from cmd_jax.devices import sharding
from cmd_jax.losses import blockwise
from cmd_jax.methods.base import Method, MethodState, Params
from cmd_jax.methods.part_networks import PartViews
from cmd_jax.optim.schedules import Schedule
from cmd_jax.training.state import TrainState

# Metrics that must be finite, or the step is none. The parameters too: an
# update may overflow where loss and gradient do not.
WATCHED = ('loss', 'grad_norm', 'param_norm')

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


class Batches(NamedTuple):
  """The batches of several steps that are taken in one call.

  Attributes:
    batch: n batches, [n, B, ...].
    count: scalar int32, steps to take; the batches after those are not used.
  """

  batch: Batch
  count: jax.Array


class _Means(NamedTuple):
  """What is a mean over the examples, hence over equal parts of a batch too.

  Attributes:
    loss: scalar.
    values: what is reported, scalars.
    grads: of the loss by the student's parameters.
    method_state: after the step.
  """

  loss: jax.Array
  values: dict[str, jax.Array]
  grads: Params
  method_state: MethodState


def _example_keys(
  rng: jax.Array, stream: int, step: jax.Array, index: jax.Array
) -> jax.Array:
  """[B] keys, one for each example of a step."""
  key = jax.random.fold_in(jax.random.fold_in(rng, stream), step)
  return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def make_objective(method: Method) -> blockwise.Objective:
  """The weighted sum of a method's terms.

  Its constants are those of the method and the terms' weights by name; it
  reports the terms unweighted, as `loss/<term>`, and the method's monitors.
  """

  def scores(prototypes, constants, examples, targets):
    return method.scores(prototypes, constants[0], examples, targets)

  def compare(scores, normalisers, constants, examples, targets):
    _, weights = constants
    outputs = method.outputs(scores, normalisers, examples, targets)
    values = {name: term.value(outputs) for name, term in method.terms.items()}
    total = sum(weights[name] * value for name, value in values.items())
    reported = {f'loss/{name}': value for name, value in values.items()}
    return total, {**reported, **method.example_monitors(outputs)}

  return blockwise.Objective(
    scores, compare, method.sums_over_prototypes, method.sums_over_examples
  )


def _make_loss(method: Method, mesh: Mesh | None) -> Callable:
  """(params, state, views, keys) -> (loss, (values, `Seen`))."""
  objective = make_objective(method)

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
      objective,
      seen.prototypes,
      (seen.constants, weights),
      seen.examples,
      seen.targets,
      mesh=mesh,
    )
    return loss, (jax.tree.map(jnp.mean, reported), seen)

  return loss_fn


def _make_differentiate(
  method: Method, augment: Callable, mesh: Mesh | None, param_shardings: Any
) -> Callable:
  """(state, batch, rng) -> (`_Means`, `Seen`), for all or part of a batch."""
  value_and_grad = jax.value_and_grad(_make_loss(method, mesh), has_aux=True)

  def differentiate(state: TrainState, batch: Batch, rng: jax.Array):
    step_key = jax.random.fold_in(jax.random.fold_in(rng, _STEP), state.step)
    views_keys, drop_path_keys = (
      _example_keys(rng, stream, state.step, batch.index)
      for stream in (_VIEWS, _DROP_PATH)
    )
    views = augment(
      batch.images, batch.sizes, views_keys, step_key, batch.part_ids
    )
    images = tuple(
      x for x in (views.global_views, views.local_views) if x.shape[1]
    )
    if views.global_part_ids is not None:
      images = PartViews(images, views.global_part_ids)
    (loss, (values, seen)), grads = value_and_grad(
      state.params, state, images, drop_path_keys
    )
    if param_shardings is not None:
      # Summed first: told to spread them alone, XLA would gather activations.
      grads = sharding.constrain(grads, sharding.replicated(mesh))
      grads = sharding.constrain(grads, param_shardings)
    method_state = method.update(state.method_state, seen)
    return _Means(loss, values, grads, method_state), seen

  return differentiate


def _accumulate(
  differentiate: Callable, num_parts: int, mesh: Mesh | None
) -> Callable:
  """Like `differentiate`, with the examples seen part by part.

  Only what `Seen` holds of the examples is kept of each part, and of that what
  is used, so that memory for activations is needed for one part alone.
  """

  def accumulate(state: TrainState, batch: Batch, rng: jax.Array):
    parts = sharding.split_batch(batch, num_parts, mesh)
    shapes, seen = jax.eval_shape(
      differentiate, state, jax.tree.map(lambda x: x[0], parts), rng
    )

    def add(total, part):
      means, seen = differentiate(state, part, rng)
      return jax.tree.map(jnp.add, total, means), (seen.examples, seen.targets)

    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, of_examples = jax.lax.scan(add, start, parts)
    means = jax.tree.map(lambda x: x / num_parts, total)
    examples, targets = sharding.join_batch(of_examples, mesh)
    return means, seen._replace(examples=examples, targets=targets)

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
    param_shardings: how parameters, and hence gradients, are spread between the
      steps (FSDP); None where every device keeps them whole.
    grad_accum_steps: equal parts of the batch that are seen one after the other
      before the step is taken. The step is that of the whole batch if the loss
      is a mean over the examples and `method.update` is linear in such means.
    skip_non_finite: whether a step after which one of `WATCHED` is not finite
      leaves all but the step's number as it was.

  Returns:
    The step. `rng` is the run's root key and never changes; metrics are float32
    scalars: `loss`, `loss/<term>` unweighted, the method's monitors, the norms
    of the gradient and of the new parameters, and the schedules' values.
  """
  differentiate = _make_differentiate(method, augment, mesh, param_shardings)
  if grad_accum_steps > 1:
    differentiate = _accumulate(differentiate, grad_accum_steps, mesh)

  def step(state: TrainState, batch: Batch, rng: jax.Array):
    whole = state
    if param_shardings is not None:
      # Left to itself XLA spreads the products over the width of the layers,
      # and sends activations instead of parameters.
      params, teacher_params = sharding.constrain(
        (state.params, state.teacher_params), sharding.replicated(mesh)
      )
      whole = state._replace(params=params, teacher_params=teacher_params)
    means, seen = differentiate(whole, batch, rng)
    loss, values, grads = sharding.pmean(means[:3], axis_name)
    updates, opt_state = optimizer.update(
      grads, state.opt_state, state.params, step=state.step
    )
    params = optax.apply_updates(state.params, updates)
    # Depends on all that reads the old teacher, or XLA would keep a copy of it;
    # a barrier is gone by the time it looks.
    last = sum(x.ravel()[0] for x in jax.tree.leaves(means.method_state))
    rate = 1 - teacher_momentum(state.step) + 0 * last
    # In this form a parameter that does not move stays equal to the bit.
    teacher_params = jax.tree.map(
      lambda old, new: old + rate * (new - old), state.teacher_params, params
    )
    metrics = {
      'loss': loss,
      **values,
      **method.monitors(seen),
      'grad_norm': optax.tree.norm(grads),
      'param_norm': optax.tree.norm(params),
      **{name: schedule(state.step) for name, schedule in schedules.items()},
    }
    new_state = TrainState(
      step=state.step + 1,
      params=params,
      teacher_params=teacher_params,
      opt_state=opt_state,
      method_state=means.method_state,
    )
    if skip_non_finite:
      new_state = _if_finite(metrics, state, new_state)
    return new_state, jax.tree.map(lambda x: x.astype(jnp.float32), metrics)

  return step


def take_several(step: Callable) -> Callable:
  """Lets steps follow each other without the host.

  Args:
    step: (state, batch, rng) -> (state, metrics).

  Returns:
    (state, `Batches`, rng) -> (state, metrics), each metric [n]; those of steps
    that were not taken are 0.
  """

  def steps(state: TrainState, batches: Batches, rng: jax.Array):
    def batch_of(number):
      return jax.tree.map(lambda x: x[number], batches.batch)

    def take(number, carry):
      state, metrics = carry
      state, new = step(state, batch_of(number), rng)
      return state, jax.tree.map(
        lambda all_steps, x: all_steps.at[number].set(x), metrics, new
      )

    most = len(batches.batch.index)
    _, like = jax.eval_shape(step, state, batch_of(0), rng)
    metrics = jax.tree.map(lambda x: jnp.zeros((most, *x.shape), x.dtype), like)
    return jax.lax.fori_loop(0, batches.count, take, (state, metrics))

  return steps
