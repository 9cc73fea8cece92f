"""Prototype heads against the released DINOHead."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.convert import entries, heads
from cmd_jax.models.heads import PrototypeHead
from tests.parity import golden

_VARIANTS = {
  'norm_last_true': dict(norm_last_layer=True),
  'norm_last_false': dict(),
  'use_bn': dict(use_bn=True),
  'nlayers1': dict(num_layers=1),
  'nlayers2': dict(num_layers=2),
}


@golden.fixtures('dino_head')
@pytest.mark.parametrize('variant', _VARIANTS)
def test_logits_and_gradients(fixture, variant):
  head = PrototypeHead(
    num_prototypes=64,
    hidden_dim=96,
    bottleneck_dim=24,
    **dict(norm_last_layer=False) | _VARIANTS[variant],
  )
  table = heads.entries(head)
  expected = fixture.under(f'{variant}/')
  variables = entries.from_torch(table, fixture.under(f'{variant}/w/'))
  params = variables.pop('params')

  def loss_fn(params, x):
    logits, updated = head.apply(
      {'params': params, **variables}, x, train=True, mutable=['batch_stats']
    )
    return jnp.sum(logits * fixture['in/cotangent']), (logits, updated)

  x = fixture['in/x']
  run = jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True))
  (_, (logits, updated)), gradients = run(params, x)
  np.testing.assert_allclose(logits, expected['out'], rtol=1e-4, atol=1e-5)
  theirs = {'x': expected['grad_x']} | {
    name.removeprefix('grad/'): value
    for name, value in expected.items()
    if name.startswith('grad/')
  }
  trained = [entry for entry in table if entry.path[0] == 'params']
  ours = {'x': gradients[1]}
  ours |= entries.to_torch(trained, {'params': gradients[0]})
  # Scales were randomised in some variants without being trained.
  assert set(ours) - set(theirs) <= {'last_layer.weight_g'}
  assert set(theirs) <= set(ours)
  # In front of a batch normalisation a bias has no gradient but noise.
  largest = max(np.abs(value).max() for value in theirs.values())
  for name, gradient in theirs.items():
    np.testing.assert_allclose(
      ours[name], gradient, rtol=1e-4, atol=1e-5 * largest, err_msg=name
    )
  if head.use_bn:
    _check_statistics(head, params, updated, x, expected)


def _check_statistics(head, params, updated, x, expected):
  buffers = {
    entry.name: entries.get_path(updated, entry.path)
    for entry in heads.entries(head)
    if entry.path[0] == 'batch_stats'
  }
  assert len(buffers) == 4
  for name, buffer in buffers.items():
    np.testing.assert_allclose(
      buffer,
      expected[f'buffers_after_train_forward/{name}'],
      rtol=1e-5,
      atol=1e-6,
    )
  np.testing.assert_allclose(
    jax.jit(head.apply)({'params': params, **updated}, x),
    expected['out_eval_after'],
    rtol=1e-4,
    atol=1e-5,
  )
