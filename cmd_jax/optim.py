"""AdamW as the published programs use it, as optax transformations.

Every transformation takes the step as the extra argument `step`, so that the
schedules follow the run and not the number of updates a parameter has had.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cmd_jax.schedules import Schedule


def clip_each_parameter(max_norm: float) -> optax.GradientTransformation:
  """Clips every parameter's gradient to `max_norm` by itself.

  factor = max_norm / (norm + 1e-6) where that is below 1 (DINO, utils.py
  `clip_gradients`); no global norm is taken.
  """

  def clip(gradient):
    norm = jnp.linalg.norm(gradient.astype(jnp.float32).ravel())
    return gradient * jnp.minimum(1.0, max_norm / (norm + 1e-6))

  def update(updates, state, params=None):
    del params
    return jax.tree.map(clip, updates), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def decay_and_scale(
  learning_rate: Schedule, weight_decay: Schedule
) -> optax.GradientTransformationExtraArgs:
  """Adds decoupled weight decay and scales by minus the learning rate.

  Biases and other vectors are not decayed (DINO, utils.py
  `get_params_groups`): u <- -lr(step) * (u + wd(step) * p).
  """

  def update(updates, state, params=None, *, step, **_):
    lr, wd = learning_rate(step), weight_decay(step)

    def scale(u, p):
      return -lr * (u + wd * p) if p.ndim > 1 else -lr * u

    return jax.tree.map(scale, updates, params), state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )


class FrozenState(NamedTuple):
  """State of `freeze_until`: that of the inner transformation."""

  inner: optax.OptState


def freeze_until(
  inner: optax.GradientTransformationExtraArgs, num_steps: int
) -> optax.GradientTransformationExtraArgs:
  """Leaves parameters and the inner state untouched before `num_steps`.

  As if the gradient were None in torch: no decay, no moments, and the bias
  correction starts at the parameter's own first update.
  """

  def update(updates, state, params=None, *, step, **extra):
    new_updates, new_inner = inner.update(
      updates, state.inner, params, step=step, **extra
    )
    active = step >= num_steps
    return (
      jax.tree.map(lambda u: jnp.where(active, u, 0), new_updates),
      FrozenState(
        jax.tree.map(
          lambda new, old: jnp.where(active, new, old), new_inner, state.inner
        )
      ),
    )

  return optax.GradientTransformationExtraArgs(
    lambda params: FrozenState(inner.init(params)), update
  )


def _path_of_keys(path) -> tuple[str, ...]:
  return tuple(getattr(key, 'key', None) for key in path)


def _group_of_each_parameter(params, is_frozen):
  def group(path, _):
    names = _path_of_keys(path)
    if is_frozen(names):
      return 'frozen'
    return 'last_layer' if 'last_layer' in names else 'other'

  return jax.tree_util.tree_map_with_path(group, params)


def make_adamw(
  *,
  learning_rate: Schedule,
  weight_decay: Schedule,
  clip_norm: float = 3.0,
  freeze_last_layer_steps: int = 0,
  is_frozen: Callable[[tuple[str, ...]], bool] = lambda path: False,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
  """The published optimiser: clip, freeze the last layer at first, AdamW.

  Args:
    learning_rate: schedule of the learning rate.
    weight_decay: schedule of the decoupled weight decay.
    clip_norm: norm to which each parameter's gradient is clipped; 0 turns
      clipping off.
    freeze_last_layer_steps: number of steps in which parameters below a module
      called `last_layer` stay as they are.
    is_frozen: path of a parameter -> whether it always stays as it is; it then
      has no moments.
    b1: decay of Adam's first moment.
    b2: decay of Adam's second moment.
    eps: term added outside Adam's root.

  Returns:
    An optax transformation whose update needs `params` and `step=`.
  """

  def adamw():
    return optax.chain(
      optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
      decay_and_scale(learning_rate, weight_decay),
    )

  clip = clip_each_parameter(clip_norm) if clip_norm else optax.identity()
  return optax.chain(
    clip,
    optax.partition(
      {
        'last_layer': freeze_until(adamw(), freeze_last_layer_steps),
        'other': adamw(),
        'frozen': optax.set_to_zero(),
      },
      lambda params: _group_of_each_parameter(params, is_frozen),
    ),
  )
