"""Layers of the encoder with learning rates of their own, and heads first."""

import jax
import numpy as np
import pytest

from cmd_jax.models import make_encoder, partial
from cmd_jax.optim import optimizers

_PARAMS = {
  'encoder': {
    'conv_stem': {'kernel': np.ones((2, 2), np.float32)},
    'block_5': {'kernel': np.ones((2, 2), np.float32)},
    'block_6': {'kernel': np.ones((2, 2), np.float32)},
    'conv_head': {'kernel': np.ones((2, 2), np.float32)},
  },
  'image_head': {
    'layer': {'kernel': np.ones((2, 2), np.float32)},
    'last_layer': {'kernel': np.ones((2, 2), np.float32)},
  },
}


def _constant(value):
  return lambda step: value


def _moves(make, steps=1, **options):
  """How far each parameter is moved by the last of some steps."""
  optimizer = make(
    learning_rate=_constant(0.5), weight_decay=_constant(0.1), **options
  )
  params, state = _PARAMS, jax.jit(optimizer.init)(_PARAMS)
  gradients = jax.tree.map(np.ones_like, params)
  update = jax.jit(optimizer.update)
  for step in range(steps):
    updates, state = update(gradients, state, params, step=step)
  updates = jax.device_get(updates)
  return {
    (group, layer): float(-updates[group][layer]['kernel'][0, 0])
    for group in updates
    for layer in updates[group]
  }


@pytest.mark.parametrize('make', [optimizers.make_adamw, optimizers.make_sgd])
def test_learning_rates_fall_towards_the_images(make):
  encoder = make_encoder('efficientnet', variant='Mu')
  assert encoder.depth == 7
  scale_of = partial.make_layer_scale(
    encoder, encoder_scale=0.1, layer_decay=0.5
  )
  whole, scaled = _moves(make), _moves(make, scale_of=scale_of)
  factors = {key: scaled[key] / whole[key] for key in whole}
  np.testing.assert_allclose(factors['image_head', 'layer'], 1)
  np.testing.assert_allclose(factors['encoder', 'conv_head'], 0.1, rtol=1e-6)
  np.testing.assert_allclose(factors['encoder', 'block_6'], 0.05, rtol=1e-6)
  np.testing.assert_allclose(factors['encoder', 'block_5'], 0.025, rtol=1e-6)
  # Seven blocks are after it.
  stem = factors['encoder', 'conv_stem']
  np.testing.assert_allclose(stem, 0.1 * 0.5**8, rtol=1e-6)


@pytest.mark.parametrize('make', [optimizers.make_adamw, optimizers.make_sgd])
def test_the_heads_learn_first(make):
  waits = optimizers.Waits(last_layer_steps=1, encoder_steps=2)
  moved = [
    {group for (group, layer), x in _moves(make, n, waits=waits).items() if x}
    for n in (1, 2, 3)
  ]
  assert moved == [{'image_head'}, {'image_head'}, {'image_head', 'encoder'}]
  # As if its first step came only now: no moments of gradients before.
  late = _moves(make, 3, waits=waits)['encoder', 'block_6']
  np.testing.assert_allclose(
    late, _moves(make)['encoder', 'block_6'], rtol=1e-6
  )
