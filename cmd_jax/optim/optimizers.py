"""AdamW and SGD as the published programs use them, as optax transformations.

Every transformation takes the step as the extra argument `step`, so that the
schedules follow the run and not the number of updates a parameter has had.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from cmd_jax.optim.schedules import Schedule

# Tells a set of parameters by their paths, such as ('encoder', 'norm', 'bias').
IsIn = Callable[[tuple[str, ...]], bool]

# What such a parameter's learning rate is multiplied by.
ScaleOf = Callable[[tuple[str, ...]], float]


def _path_of_keys(path) -> tuple[str, ...]:
  return tuple(getattr(key, 'key', None) for key in path)


def clip_each_parameter(
  max_norm: float, is_clipped: IsIn = lambda path: True
) -> optax.GradientTransformation:
  """Clips every parameter's gradient to `max_norm` by itself.

  factor = max_norm / (norm + 1e-6) where that is below 1 (DINO, utils.py
  `clip_gradients`); no global norm is taken. Parameters that are not
  `is_clipped` keep their gradients.
  """

  def clip(path, gradient):
    if not is_clipped(_path_of_keys(path)):
      return gradient
    # Not flattened: a gradient that is spread would be gathered for it.
    norm = jnp.sqrt(jnp.sum(jnp.square(gradient.astype(jnp.float32))))
    return gradient * jnp.minimum(1.0, max_norm / (norm + 1e-6))

  def update(updates, state, params=None):
    del params
    return jax.tree_util.tree_map_with_path(clip, updates), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def decay_and_scale(
  learning_rate: Schedule,
  weight_decay: Schedule,
  decay_vectors: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """Adds decoupled weight decay and scales by minus the learning rate.

  u <- -lr(step) * (u + wd(step) * p). Biases and other vectors are decayed only
  with `decay_vectors` (DINO, utils.py `get_params_groups`, does not).
  """

  def update(updates, state, params=None, *, step, **_):
    lr, wd = learning_rate(step), weight_decay(step)

    def scale(u, p):
      return -lr * (u + wd * p) if decay_vectors or p.ndim > 1 else -lr * u

    return jax.tree.map(scale, updates, params), state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )


def scale_by_adam(
  b1: float, b2: float, eps: float
) -> optax.GradientTransformationExtraArgs:
  """Adam (Kingma & Ba 2015), with moments that can be overwritten.

  As `optax.scale_by_adam`, whose state it has. There XLA computes updates and
  new moments alike from the old moments, and keeps a copy of those; here the
  updates are computed from the new ones. The extra argument `active` says
  whether there is an update at all.
  """

  def update(updates, state, params=None, *, active=True, **_):
    del params
    # With a decay of 1 a moment stays as it is, to the bit.
    first, second = (jnp.where(active, decay, 1.0) for decay in (b1, b2))
    mu = jax.tree.map(
      lambda m, u: (first * m + (1 - first) * u).astype(m.dtype),
      state.mu,
      updates,
    )
    nu = jax.tree.map(
      lambda v, u: (second * v + (1 - second) * u * u).astype(v.dtype),
      state.nu,
      updates,
    )
    count = state.count + jnp.asarray(active, state.count.dtype)
    new = jax.lax.optimization_barrier(state._replace(mu=mu, nu=nu))
    # An inactive update before the first one is nobody's: only not NaN.
    corrections = [1 - b ** jnp.maximum(count, 1) for b in (b1, b2)]
    scaled = jax.tree.map(
      lambda m, v: m / corrections[0] / (jnp.sqrt(v / corrections[1]) + eps),
      new.mu,
      new.nu,
    )
    return scaled, new._replace(count=count)

  return optax.GradientTransformationExtraArgs(
    optax.scale_by_adam(b1=b1, b2=b2, eps=eps).init, update
  )


def momentum_of_decayed(
  weight_decay: Schedule, momentum: float, decay_vectors: bool = True
) -> optax.GradientTransformationExtraArgs:
  """Momentum over gradients that contain the weight decay, as torch's SGD.

  m <- momentum * m + u + wd(step) * p. Biases and other vectors are decayed
  only with `decay_vectors`. The extra argument `active` says whether there is
  an update at all.
  """
  trace = optax.trace(momentum)

  def update(updates, state, params=None, *, step, active=True, **_):
    wd = weight_decay(step)

    def decay(u, p):
      return u + wd * p if decay_vectors or p.ndim > 1 else u

    updates, new = trace.update(jax.tree.map(decay, updates, params), state)
    return updates, jax.tree.map(
      lambda new, old: jnp.where(active, new, old), new, state
    )

  return optax.GradientTransformationExtraArgs(trace.init, update)


class FrozenState(NamedTuple):
  """State of `freeze_until`: that of the inner transformation."""

  inner: optax.OptState


def freeze_until(
  inner: optax.GradientTransformationExtraArgs, num_steps: int
) -> optax.GradientTransformationExtraArgs:
  """Leaves parameters and the inner state untouched before `num_steps`.

  The inner transformation is told by the extra argument `active`.

  As if the gradient were None in torch: no decay, no moments, and the bias
  correction starts at the parameter's own first update.
  """

  def update(updates, state, params=None, *, step, **extra):
    active = step >= num_steps
    new_updates, new_inner = inner.update(
      updates, state.inner, params, step=step, active=active, **extra
    )
    return (
      jax.tree.map(lambda u: jnp.where(active, u, 0), new_updates),
      FrozenState(new_inner),
    )

  return optax.GradientTransformationExtraArgs(
    lambda params: FrozenState(inner.init(params)), update
  )


def scale_by_layer(scale_of: ScaleOf) -> optax.GradientTransformation:
  """Multiplies each parameter's update by what its layer has.

  Layer-wise decay of the learning rate (Clark et al. 2020; Bao et al. 2022).

  Args:
    scale_of: path of a parameter -> factor.
  """

  def update(updates, state, params=None):
    del params
    return jax.tree_util.tree_map_with_path(
      lambda path, u: scale_of(_path_of_keys(path)) * u, updates
    ), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class Waits(NamedTuple):
  """Steps at the start of a run in which parameters stay as they are.

  Attributes:
    last_layer_steps: those below a module called `last_layer`.
    encoder_steps: those of the encoder, while the heads learn to read it.
  """

  last_layer_steps: int = 0
  encoder_steps: int = 0


NO_WAITS = Waits()


def _group_of_each_parameter(params, is_frozen, groups):
  def group(path, _):
    names = _path_of_keys(path)
    if is_frozen(names):
      return 'frozen'
    if 'last_layer' in names:
      return 'last_layer'
    return names[0] if names[0] in groups else 'other'

  return jax.tree_util.tree_map_with_path(group, params)


def _assemble(
  inner: optax.GradientTransformationExtraArgs,
  clip_norm: float,
  waits: Waits,
  is_frozen: IsIn,
  is_clipped: IsIn,
  scale_of: ScaleOf | None,
) -> optax.GradientTransformationExtraArgs:
  """Clips, then updates what is not frozen."""
  clip = optax.identity()
  if clip_norm:
    clip = clip_each_parameter(clip_norm, is_clipped)
  if scale_of is not None:
    inner = optax.chain(inner, scale_by_layer(scale_of))
  groups = {
    'last_layer': freeze_until(inner, waits.last_layer_steps),
    'other': inner,
    'frozen': optax.set_to_zero(),
  }
  if waits.encoder_steps:
    groups['encoder'] = freeze_until(inner, waits.encoder_steps)
  return optax.chain(
    clip,
    optax.partition(
      groups, lambda params: _group_of_each_parameter(params, is_frozen, groups)
    ),
  )


def make_adamw(
  *,
  learning_rate: Schedule,
  weight_decay: Schedule,
  clip_norm: float = 3.0,
  waits: Waits = NO_WAITS,
  is_frozen: IsIn = lambda path: False,
  is_clipped: IsIn = lambda path: True,
  scale_of: ScaleOf | None = None,
  decay_vectors: bool = False,
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
    waits: which parameters stay as they are at first.
    is_frozen: path of a parameter -> whether it always stays as it is; it then
      has no moments.
    is_clipped: path of a parameter -> whether its gradient is clipped; PARTICLE
      leaves its predictor's as it is.
    scale_of: path of a parameter -> factor of its learning rate; None for one
      rate.
    decay_vectors: whether biases and norms are decayed as well (PARTICLE).
    b1: decay of Adam's first moment.
    b2: decay of Adam's second moment.
    eps: term added outside Adam's root.

  Returns:
    An optax transformation whose update needs `params` and `step=`.
  """
  adamw = optax.chain(
    scale_by_adam(b1, b2, eps),
    decay_and_scale(learning_rate, weight_decay, decay_vectors),
  )
  return _assemble(adamw, clip_norm, waits, is_frozen, is_clipped, scale_of)


def make_sgd(
  *,
  learning_rate: Schedule,
  weight_decay: Schedule,
  momentum: float = 0.9,
  clip_norm: float = 0.0,
  waits: Waits = NO_WAITS,
  is_frozen: IsIn = lambda path: False,
  is_clipped: IsIn = lambda path: True,
  scale_of: ScaleOf | None = None,
  decay_vectors: bool = True,
) -> optax.GradientTransformationExtraArgs:
  """The optimiser of PARTICLE's ResNet variant: torch's SGD.

  m <- momentum * m + g + wd p;  p <- p - lr m. By default everything is
  decayed, biases and norms too, and nothing is clipped or waits
  (train_particle_resnet.py).

  Args:
    learning_rate: schedule of the learning rate.
    weight_decay: schedule of the weight decay, which enters the momentum.
    momentum: share of the old momentum that is kept.
    clip_norm: see `make_adamw`.
    waits: see `make_adamw`.
    is_frozen: see `make_adamw`.
    is_clipped: see `make_adamw`.
    scale_of: see `make_adamw`.
    decay_vectors: whether biases and norms are decayed as well.

  Returns:
    An optax transformation whose update needs `params` and `step=`.
  """
  sgd = optax.chain(
    momentum_of_decayed(weight_decay, momentum, decay_vectors),
    decay_and_scale(learning_rate, lambda step: 0.0),
  )
  return _assemble(sgd, clip_norm, waits, is_frozen, is_clipped, scale_of)
