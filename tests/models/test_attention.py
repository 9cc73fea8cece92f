import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.models import attention
from cmd_jax.models.layers import Dense
from cmd_jax.models.positions import rotary_turn
from tests import tiny

_H100 = dict(
  platform='gpu',
  client=types.SimpleNamespace(platform_version='cuda 12090'),
  compute_capability='9.0',
)


def _device(**kwargs):
  return types.SimpleNamespace(**_H100 | kwargs)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('capability', ['8.0', '9.0', '12.0'])
def test_cudnn_serves_16_bits_on_gpus_that_have_it(dtype, capability):
  device = _device(compute_capability=capability)
  assert attention.cudnn_serves(dtype, 64, device)


@pytest.mark.parametrize(
  'dtype, head_dim, device',
  [
    (jnp.float32, 64, {}),
    (jnp.bfloat16, 68, {}),
    (jnp.bfloat16, 136, {}),
    (jnp.bfloat16, 64, dict(compute_capability='7.5')),
    (jnp.bfloat16, 64, dict(platform='tpu')),
    (jnp.bfloat16, 64, dict(platform='cpu')),
    (
      jnp.bfloat16,
      64,
      dict(
        client=types.SimpleNamespace(platform_version='rocm 60300'),
        compute_capability='gfx942',
      ),
    ),
  ],
)
def test_cudnn_does_not_serve(dtype, head_dim, device):
  assert not attention.cudnn_serves(dtype, head_dim, _device(**device))


def test_cudnn_does_not_serve_here():
  assert not attention.cudnn_serves(jnp.bfloat16, 64)


def test_heads_are_kept_apart_on_a_tpu_alone():
  assert attention.keeps_heads_apart(_device(platform='tpu'))
  assert not attention.keeps_heads_apart(_device())
  assert not attention.keeps_heads_apart()


def _plain(length, dim=12):
  """A module, its variables and tokens."""
  x = tiny.normal(2, length, dim)
  plain = attention.Attention(3, jnp.float32)
  init = functools.partial(plain.init, turn=None)
  return plain, tiny.draw_like(jax.eval_shape(init, jax.random.key(1), x)), x


def _with_gradients(module, variables, x, turn=None):
  def loss(variables, x):
    y, weights = module.apply(variables, x, turn)
    return jnp.sum(y**3), (y, weights)

  return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(variables, x)


_assert_close = functools.partial(
  jax.tree.map,
  functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
)


@pytest.mark.parametrize('turned', [False, True])
def test_heads_apart_are_the_same_function_of_the_same_parameters(turned):
  turn = rotary_turn(2, 2, 4) if turned else None
  plain, variables, x = _plain(5)
  _assert_close(
    _with_gradients(plain.clone(apart=True), variables, x, turn),
    _with_gradients(plain, variables, x, turn),
  )


def test_the_packed_parameters_are_those_of_dense_layers():
  plain, variables, x = _plain(5)
  params = variables['params']
  assert {
    f'{layer}/{name}': x.shape
    for layer, named in params.items()
    for name, x in named.items()
  } == {
    'qkv/kernel': (12, 36),
    'qkv/bias': (36,),
    'proj/kernel': (12, 12),
    'proj/bias': (12,),
  }
  # Columns are query, key, value, and heads within each.
  _, state = jax.jit(
    lambda *arrays: plain.apply(*arrays, None, mutable=['intermediates'])
  )(variables, x)
  (keys,) = state['intermediates']['keys']
  packed = jax.jit(Dense(36).apply)({'params': params['qkv']}, x)
  expected = np.asarray(packed)[..., 12:24]
  np.testing.assert_allclose(keys.reshape(expected.shape), expected, rtol=1e-5)


@pytest.mark.parametrize('length', [5, 6])
def test_fused_attention_is_the_same_and_keeps_its_weights(monkeypatch, length):
  fused = jax.nn.dot_product_attention
  asked = []

  def without_cudnn(query, *args, implementation, **kwargs):
    asked.append((implementation, query.shape[1]))
    return fused(query, *args, implementation='xla', **kwargs)

  plain, variables, x = _plain(length)
  expected = _with_gradients(plain, variables, x)
  monkeypatch.setattr(jax.nn, 'dot_product_attention', without_cudnn)
  actual = _with_gradients(plain.clone(fused=True), variables, x)
  assert asked == [('cudnn', 6)]
  _assert_close(actual, expected)
