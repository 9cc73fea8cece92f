import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax import errors
from cmd_jax.models.mlp_heads import make_mlp_head
from tests import tiny


def _make(initialisation, **changes):
  fields = dict(hidden_dim=300, output_dim=5, initialisation=initialisation)
  head = make_mlp_head(**fields | changes)
  variables = jax.jit(head.init)(jax.random.key(0), jnp.zeros(200))
  return head, jax.device_get(variables['params'])


def _numpy_head(params, x):
  hidden = x @ params['fc1']['kernel'] + params['fc1']['bias']
  centred = hidden - hidden.mean(-1, keepdims=True)
  normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
  normed = normed * params['norm']['scale'] + params['norm']['bias']
  return np.maximum(normed, 0) @ params['fc2']['kernel'] + params['fc2']['bias']


def test_linear_norm_relu_linear():
  head, params = _make('torch')
  params = jax.tree.map(
    lambda x: x + 0.1 * tiny.normal(*x.shape, seed=x.size),
    params,
  )
  # So short that the epsilon of the normalisation matters.
  x = 0.01 * np.random.default_rng(0).normal(size=(2, 3, 200))
  x = x.astype(np.float32)
  np.testing.assert_allclose(
    jax.jit(head.apply)({'params': params}, x),
    _numpy_head(params, x),
    rtol=1e-3,
    atol=1e-4,
  )


@pytest.mark.parametrize(
  'initialisation, std, reach, bias',
  [
    ('torch', (3 * 200) ** -0.5, 3**0.5, None),
    ('normal', 0.02, 4, 0),
    ('kaiming', (2 / 200) ** 0.5, 3**0.5, 0.01),
  ],
)
def test_initialisations(initialisation, std, reach, bias):
  _, params = _make(initialisation)
  kernel = params['fc1']['kernel']
  np.testing.assert_allclose(kernel.std(), std, rtol=0.02)
  np.testing.assert_allclose(np.abs(kernel).max() / std, reach, rtol=0.2)
  if bias is None:
    np.testing.assert_allclose(params['fc1']['bias'].std(), std, rtol=0.2)
  else:
    np.testing.assert_allclose(params['fc2']['bias'], np.full(5, bias))


def test_results_are_float32_whatever_the_dtype():
  head, params = _make('normal', dtype=jnp.bfloat16)
  y = jax.jit(head.apply)({'params': params}, np.ones((2, 200), np.float32))
  assert y.dtype == jnp.float32


def test_unknown_initialisation_lists_those_there_are():
  with pytest.raises(errors.UserError, match='torch, normal, kaiming'):
    _make('zeros')


@pytest.mark.parametrize('initialisation', ['torch', 'normal', 'kaiming'])
def test_nothing_at_all_has_finite_gradients(initialisation):
  head, params = _make(initialisation)

  @jax.jit
  @jax.grad
  def gradient(params, x):
    return jnp.sum(head.apply({'params': params}, x) ** 2)

  # An empty part is all zeros, and so is then a projection without biases.
  for leaf in jax.tree.leaves(gradient(params, jnp.zeros((2, 200)))):
    assert np.all(np.isfinite(leaf))
