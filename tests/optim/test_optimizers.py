import functools

import jax
import numpy as np
import optax
import pytest

from cmd_jax.optim import optimizers, schedules


def _lr(step):
  return 0.01 / (1 + step)


def _wd(step):
  return 0.1 + 0.05 * step


def _numpy_adamw(params, all_grads, clip, frozen_steps):
  """The published order: clip, drop frozen gradients, decay, Adam."""
  params = {name: value.copy() for name, value in params.items()}
  moments = {name: (0.0, 0.0, 0) for name in params}
  for step, grads in enumerate(all_grads):
    for name, grad in grads.items():
      norm = np.linalg.norm(grad)
      grad = grad * min(1.0, clip / (norm + 1e-6))
      if name == 'last_layer' and step < frozen_steps:
        continue
      m, v, count = moments[name]
      count += 1
      m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
      moments[name] = m, v, count
      if params[name].ndim > 1:
        params[name] -= _lr(step) * _wd(step) * params[name]
      unbiased = np.sqrt(v / (1 - 0.999**count)) + 1e-8
      params[name] -= _lr(step) * m / (1 - 0.9**count) / unbiased
  return params


@functools.cache
def _take(optimizer):
  """(gradients, state, parameters, step) -> parameters and state after it."""

  @jax.jit
  def take(gradients, state, params, step):
    updates, state = optimizer.update(gradients, state, params, step=step)
    return optax.apply_updates(params, updates), state

  return take


@pytest.mark.parametrize('frozen_steps', [0, 3])
def test_optimizer_is_the_published_one(frozen_steps):
  rng = np.random.default_rng(0)
  shapes = {'kernel': (4, 5), 'bias': (5,), 'last_layer': (3, 6)}
  params = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
  grads = [
    {
      k: rng.normal(size=s, scale=2).astype(np.float32)
      for k, s in shapes.items()
    }
    for _ in range(6)
  ]
  optimizer = optimizers.make_adamw(
    learning_rate=_lr,
    weight_decay=_wd,
    clip_norm=3.0,
    waits=optimizers.Waits(last_layer_steps=frozen_steps),
  )

  def tree(flat):
    return {
      'head': {'last_layer': {'weight_v': flat['last_layer']}},
      'dense': {'kernel': flat['kernel'], 'bias': flat['bias']},
    }

  ours = tree(params)
  state = jax.jit(optimizer.init)(ours)
  for step, grad in enumerate(grads):
    ours, state = _take(optimizer)(tree(grad), state, ours, step)
    if step < frozen_steps:
      np.testing.assert_array_equal(
        ours['head']['last_layer']['weight_v'], params['last_layer']
      )
  expected = tree(_numpy_adamw(params, grads, 3.0, frozen_steps))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6),
    ours,
    expected,
  )


def test_clipping_is_per_parameter():
  clip = optimizers.clip_each_parameter(3.0)
  grads = {
    'long': np.full(100, 2.0, np.float32),
    'short': np.float32([1.0, -2.0]),
  }
  clipped, _ = jax.jit(clip.update)(grads, clip.init(grads))
  assert np.linalg.norm(clipped['long']) == pytest.approx(3.0, 1e-5)
  np.testing.assert_array_equal(clipped['short'], grads['short'])


def test_clipping_a_zero_gradient_is_finite():
  clip = optimizers.clip_each_parameter(3.0)
  zero = {'w': np.zeros(4, np.float32)}
  clipped, _ = jax.jit(clip.update)(zero, optax.EmptyState())
  np.testing.assert_array_equal(clipped['w'], np.zeros(4))


def test_only_some_parameters_are_clipped():
  clip = optimizers.clip_each_parameter(
    3.0, lambda path: path[0] != 'predictor'
  )
  grads = {
    name: {'w': np.full(100, 2.0, np.float32)}
    for name in ('predictor', 'encoder')
  }
  clipped, _ = jax.jit(clip.update)(grads, clip.init(grads))
  np.testing.assert_array_equal(clipped['predictor']['w'], np.full(100, 2.0))
  assert np.linalg.norm(clipped['encoder']['w']) < 3.001


def test_vectors_can_be_decayed():
  params = {
    'bias': np.ones(3, np.float32),
    'kernel': np.ones((2, 3), np.float32),
  }
  for decay_vectors in (False, True):
    optimizer = optimizers.make_adamw(
      learning_rate=_lr, weight_decay=_wd, decay_vectors=decay_vectors
    )
    # With zero gradients decay is all there is.
    updates, _ = jax.jit(optimizer.update)(
      jax.tree.map(np.zeros_like, params),
      jax.jit(optimizer.init)(params),
      params,
      step=0,
    )
    np.testing.assert_allclose(updates['kernel'], -0.001, rtol=1e-6)
    expected = -0.001 if decay_vectors else 0
    np.testing.assert_allclose(updates['bias'], expected, rtol=1e-6)


def test_sgd_is_that_of_torch():
  rng = np.random.default_rng(0)
  params = {'kernel': rng.normal(size=(2, 3)), 'bias': rng.normal(size=3)}
  params['encoder'] = rng.normal(size=2)
  optimizer = optimizers.make_sgd(
    learning_rate=_lr,
    weight_decay=_wd,
    momentum=0.8,
    is_frozen=lambda path: path[0] == 'encoder',
  )
  ours = jax.tree.map(np.float32, params)
  state = jax.jit(optimizer.init)(ours)
  momenta = {name: 0.0 for name in params}
  for step in range(4):
    grads = {name: rng.normal(size=w.shape) for name, w in params.items()}
    ours, state = _take(optimizer)(
      jax.tree.map(np.float32, grads), state, ours, step
    )
    for name in ('kernel', 'bias'):
      decayed = grads[name] + _wd(step) * params[name]
      momenta[name] = 0.8 * momenta[name] + decayed
      params[name] = params[name] - _lr(step) * momenta[name]
  for name, expected in params.items():
    np.testing.assert_allclose(ours[name], expected, rtol=1e-5, atol=1e-6)


def test_sgd_clips_waits_and_spares_vectors_where_asked():
  optimizer = optimizers.make_sgd(
    learning_rate=_lr,
    weight_decay=_wd,
    clip_norm=1.0,
    waits=optimizers.Waits(last_layer_steps=1),
    decay_vectors=False,
  )
  params = {
    'last_layer': np.ones((2, 2), np.float32),
    'kernel': np.ones((2, 2), np.float32),
    'bias': np.ones(2, np.float32),
  }
  state, update = jax.jit(optimizer.init)(params), jax.jit(optimizer.update)
  for step, frozen in ((0, True), (1, False)):
    updates, state = update(
      jax.tree.map(lambda w: np.float32(3) * w, params),
      state,
      params,
      step=step,
    )
    assert np.all(np.asarray(updates['last_layer']) == 0) == frozen
  # [2, 2] of norm 6 and [2] of norm 4.2, clipped to 1; twice with momentum.
  clipped, wd = 0.5, _wd(1)
  kernel = 0.9 * (clipped + _wd(0)) + clipped + wd
  np.testing.assert_allclose(updates['kernel'], -_lr(1) * kernel, rtol=1e-5)
  np.testing.assert_allclose(
    updates['bias'], -_lr(1) * 1.9 * 0.5**0.5, rtol=1e-5
  )
  np.testing.assert_allclose(
    updates['last_layer'], -_lr(1) * (clipped + wd), rtol=1e-5
  )


def test_ramped_decay_of_the_moving_average():
  decay = jax.jit(jax.vmap(schedules.ramped_ema_decay(0.996)))(np.arange(4000))
  decay = np.asarray(decay)
  np.testing.assert_allclose(decay[:3], [2 / 11, 3 / 12, 4 / 13], rtol=1e-6)
  assert np.all(np.diff(decay) >= 0)
  np.testing.assert_allclose(decay[-1], 0.996, rtol=1e-6)
