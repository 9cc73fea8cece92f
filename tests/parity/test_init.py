"""The initialisation against the statistics of the released one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.convert import entries, heads, swin, vit
from cmd_jax.models.heads import PrototypeHead
from cmd_jax.models.swin import make_swin
from cmd_jax.models.vit import make_vit
from tests.parity import golden

_STATS = golden.read_json('init_stats.json')


def _deit_with_heads():
  encoder = make_vit(variant='Ti')
  head = PrototypeHead(num_prototypes=4096, norm_last_layer=True)
  image, features = jnp.zeros((1, 224, 224, 3)), jnp.zeros((1, 192))
  tensors = entries.to_torch(
    vit.entries(encoder), jax.jit(encoder.init)(jax.random.key(0), image)
  )
  for seed, name in enumerate(('head.', 'head_dense.')):
    variables = jax.jit(head.init)(jax.random.key(seed), features)
    tensors |= entries.to_torch(heads.entries(head, name), variables)
  return tensors


def _swin():
  encoder = make_swin(variant='T', window=7)
  variables = jax.jit(encoder.init)(
    jax.random.key(0), jnp.zeros((1, 224, 224, 3))
  )
  return entries.to_torch(swin.entries(encoder), variables)


@pytest.mark.parametrize(
  'name, make',
  [
    ('deit_tiny_patch16_out4096', _deit_with_heads),
    # Its layers are made by the same initialisers.
    pytest.param('swin_tiny_w7_backbone', _swin, marks=pytest.mark.slow),
  ],
)
def test_the_initialisation_has_the_released_statistics(name, make):
  ours, theirs = make(), swin.from_official(_STATS[name])
  # The scale of the prototypes is 1 and not trained: no parameter of ours.
  trained = {key for key, value in theirs.items() if value['requires_grad']}
  assert set(ours) == trained
  for key, tensor in ours.items():
    expected = theirs[key]
    assert list(tensor.shape) == expected['shape'], key
    size, std = tensor.size, expected['std']
    if std == 0:
      np.testing.assert_array_equal(tensor, expected['mean'], key)
      continue
    # Six standard errors of the difference of two samples, of the standard
    # deviation and of the mean.
    error = 6 * std / np.sqrt(size)
    assert abs(tensor.std() - std) < error, key
    assert abs(tensor.mean() - expected['mean']) < 1.5 * error, key
    if size > 10_000:
      # Tells a normal distribution from a uniform one and from one that is cut
      # at two deviations.
      reach = expected['max'] / std
      assert abs(tensor.max() / tensor.std() - reach) < 0.4 * reach, key
