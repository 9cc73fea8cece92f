import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.models import heads


def _head(**kwargs):
  return heads.PrototypeHead(
    num_prototypes=7, hidden_dim=12, bottleneck_dim=5, **kwargs
  )


def test_logits_are_cosines_with_the_prototypes():
  head, x = _head(), jax.random.normal(jax.random.key(0), (4, 3, 6))
  params = head.init(jax.random.key(1), x)['params']
  y = x
  for index in range(3):
    layer = params[f'mlp_{index}']
    y = y @ layer['kernel'] + layer['bias']
    if index < 2:
      y = jax.nn.gelu(y, approximate=False)
  y = np.asarray(y)
  v = np.asarray(params['last_layer']['weight_v'])
  expected = (y / np.linalg.norm(y, axis=-1, keepdims=True)) @ (
    v / np.linalg.norm(v, axis=0)
  )
  logits = head.apply({'params': params}, x)
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-6)
  assert 'weight_g' not in params['last_layer']


def test_trainable_scale_multiplies_its_prototype():
  head, x = _head(norm_last_layer=False), jnp.ones((1, 6))
  params = head.init(jax.random.key(1), x)['params']
  before = head.apply({'params': params}, x)
  params['last_layer']['weight_g'] = params['last_layer']['weight_g'] * 3
  after = head.apply({'params': params}, x)
  np.testing.assert_allclose(after, 3 * before, rtol=1e-5)


def test_logits_are_float32_in_bfloat16():
  head, x = _head(dtype=jnp.bfloat16), jnp.ones((2, 6))
  logits, _ = head.init_with_output(jax.random.key(0), x)
  assert logits.dtype == jnp.float32


def test_normalising_zero_is_defined_with_its_gradient():
  gradient = jax.grad(lambda x: heads.l2_normalise(x).sum())(jnp.zeros(4))
  assert np.all(np.isfinite(gradient))
  np.testing.assert_array_equal(heads.l2_normalise(jnp.zeros(4)), np.zeros(4))


@pytest.mark.parametrize('gated', [True, False])
def test_attention_is_the_published_formula(gated):
  mil = heads.MilAttention(hidden_dim=4, gated=gated)
  tokens = jax.random.normal(jax.random.key(0), (2, 3, 5, 6)) * 20
  params = mil.init(jax.random.key(1), tokens)['params']
  h = np.asarray(tokens)

  def dense(name, x):
    layer = params[name]
    return x @ np.asarray(layer['kernel']) + np.asarray(layer['bias'])

  hidden = np.tanh(dense('hidden', h))
  if gated:
    hidden = hidden / (1 + np.exp(-dense('gate', h)))
  scores = np.exp(dense('score', hidden)[..., 0])
  expected = scores / scores.sum(-1, keepdims=True)
  ours = mil.apply({'params': params}, tokens)
  np.testing.assert_allclose(ours, expected, rtol=1e-4)
  assert ('gate' in params) == gated


def test_attention_follows_the_order_of_the_tokens():
  mil = heads.MilAttention(hidden_dim=4)
  tokens = jax.random.normal(jax.random.key(0), (5, 6)) * 20
  variables = mil.init(jax.random.key(1), tokens)
  order = np.array([3, 0, 4, 1, 2])
  np.testing.assert_allclose(
    mil.apply(variables, tokens[order]),
    mil.apply(variables, tokens)[order],
    rtol=1e-5,
  )
