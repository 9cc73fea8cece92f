"""Clipping and parameter groups against the released utils.py."""

import jax
import numpy as np
import pytest

from cmd_jax.convert import swin
from cmd_jax.optim import optimizers
from tests.parity import golden, small

_GROUPS = golden.read_json('param_groups.json')


@golden.fixtures('clip_gradients')
def test_every_parameter_is_clipped_by_itself(fixture):
  gradients = fixture.under('in/grad_')
  clip = optimizers.clip_each_parameter(float(fixture['in/clip']))
  clipped, _ = jax.jit(clip.update)(gradients, clip.init(gradients))
  for index, name in enumerate(sorted(gradients)):
    norm = np.linalg.norm(gradients[name])
    np.testing.assert_allclose(norm, fixture['out/norms'][index], rtol=1e-5)
    np.testing.assert_allclose(
      clipped[name], fixture[f'out/grad_{name}'], rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize('case', sorted(_GROUPS))
def test_the_same_parameters_are_trained_and_decayed(case):
  groups = _GROUPS[case]
  network = small.make_small(
    case.split('_')[0], norm_last_layer=case.endswith('true')
  )
  params = jax.tree.map(
    np.ones_like,
    network.to_params(
      {name: np.zeros(shape) for name, shape in groups['shapes'].items()}
    ),
  )
  adamw = optimizers.make_adamw(
    learning_rate=lambda step: 1.0, weight_decay=lambda step: 1.0
  )
  # With zero gradients decay is all there is.
  updates, _ = jax.jit(adamw.update)(
    jax.tree.map(np.zeros_like, params),
    jax.jit(adamw.init)(params),
    params,
    step=np.int32(0),
  )
  decayed = {
    name: bool((tensor == -1).all())
    for name, tensor in network.to_tensors(jax.device_get(updates)).items()
  }
  names = {
    name: group
    for group in ('regularized', 'not_regularized')
    for name in groups[group]
  }
  expected = {
    name: group == 'regularized'
    for name, group in swin.from_official(names).items()
  }
  assert decayed == expected
