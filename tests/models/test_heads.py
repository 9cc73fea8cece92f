import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from cmd_jax.models import heads
from tests import tiny


def _head(**kwargs):
  return heads.PrototypeHead(
    num_prototypes=7, hidden_dim=12, bottleneck_dim=5, **kwargs
  )


def _normal(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _draw(module, x, scale=0.5):
  shapes = jax.eval_shape(module.init, jax.random.key(1), x)
  return tiny.draw_like(shapes['params'], scale)


def _apply(module, params, x):
  return jax.jit(module.apply)({'params': params}, x)


def test_logits_are_cosines_with_the_prototypes():
  head, x = _head(), _normal(4, 3, 6)
  params = _draw(head, x)
  y = x
  for index in range(3):
    layer = params[f'mlp_{index}']
    y = y @ layer['kernel'] + layer['bias']
    if index < 2:
      y = y * special.ndtr(y)
  v = params['last_layer']['weight_v']
  expected = (y / np.linalg.norm(y, axis=-1, keepdims=True)) @ (
    v / np.linalg.norm(v, axis=0)
  )
  logits = _apply(head, params, x)
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-6)
  assert 'weight_g' not in params['last_layer']


def test_trainable_scale_multiplies_its_prototype():
  head, x = _head(norm_last_layer=False), _normal(1, 6)
  params = _draw(head, x)
  before = _apply(head, params, x)
  params['last_layer']['weight_g'] *= 3
  after = _apply(head, params, x)
  np.testing.assert_allclose(after, 3 * before, rtol=1e-5)


def test_logits_are_float32_in_bfloat16():
  head, x = _head(dtype=jnp.bfloat16), _normal(2, 6)
  logits = _apply(head, _draw(head, x), x)
  assert logits.dtype == jnp.float32


def test_normalising_zero_is_defined_with_its_gradient():
  def total(x):
    normalised = heads.l2_normalise(x)
    return normalised.sum(), normalised

  gradient, normalised = jax.jit(jax.grad(total, has_aux=True))(jnp.zeros(4))
  assert np.all(np.isfinite(gradient))
  np.testing.assert_array_equal(normalised, np.zeros(4))


@pytest.mark.parametrize('gated', [True, False])
def test_attention_is_the_published_formula(gated):
  mil = heads.MilAttention(hidden_dim=4, gated=gated)
  tokens = _normal(2, 3, 5, 6)
  params = _draw(mil, tokens)

  def dense(name, x):
    return x @ params[name]['kernel'] + params[name]['bias']

  hidden = np.tanh(dense('hidden', tokens))
  if gated:
    hidden = hidden / (1 + np.exp(-dense('gate', tokens)))
  scores = np.exp(dense('score', hidden)[..., 0])
  expected = scores / scores.sum(-1, keepdims=True)
  ours = _apply(mil, params, tokens)
  np.testing.assert_allclose(ours, expected, rtol=1e-4)
  assert ('gate' in params) == gated


def test_attention_by_strength_learns_nothing():
  mil = heads.StrengthAttention()
  tokens = _normal(2, 3, 6)
  assert not mil.init(jax.random.key(0), tokens)
  squares = (tokens**2).sum(-1)
  attention = mil.apply({}, tokens)
  assert attention.dtype == jnp.float32
  np.testing.assert_allclose(
    attention, squares / squares.sum(-1, keepdims=True), rtol=1e-5
  )
  gradient = jax.grad(lambda x: (mil.apply({}, x) ** 2).sum())(tokens)
  np.testing.assert_array_equal(gradient, 0)
  half = mil.apply({}, tokens.astype(jnp.bfloat16))
  assert half.dtype == jnp.float32
  np.testing.assert_allclose(half, attention, atol=1e-2)


def test_attention_by_strength_is_defined_where_features_are_zero():
  mil = heads.StrengthAttention()
  tokens = _normal(3, 6)
  tokens[0] = 0
  first, *others = mil.apply({}, tokens)
  assert 0 < first < 1e-9 and np.isclose(sum(others), 1)
  np.testing.assert_allclose(mil.apply({}, 0 * tokens), [1 / 3] * 3, rtol=1e-6)


@pytest.mark.parametrize(
  'pooling, kind, gated',
  [
    ('gated_attention', heads.MilAttention, True),
    ('attention', heads.MilAttention, False),
    ('strength', heads.StrengthAttention, None),
    ('mean', type(None), None),
    ('max', type(None), None),
  ],
)
def test_attention_is_that_of_the_pooling(pooling, kind, gated):
  made = heads.make_attention(pooling, hidden_dim=5, dtype=jnp.bfloat16)
  assert type(made) is kind
  assert getattr(made, 'gated', None) is gated
  assert getattr(made, 'dtype', jnp.bfloat16) == jnp.bfloat16


def test_attention_follows_the_order_of_the_tokens():
  mil = heads.MilAttention(hidden_dim=4)
  tokens = _normal(5, 6)
  params = _draw(mil, tokens)
  order = np.array([3, 0, 4, 1, 2])
  plain, shuffled = (_apply(mil, params, x) for x in (tokens, tokens[order]))
  np.testing.assert_allclose(shuffled, plain[order], rtol=1e-5)
  assert np.ptp(plain) > 0.01
