import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.models import attention

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


@pytest.mark.parametrize('length', [5, 6])
def test_fused_attention_is_the_same_and_keeps_its_weights(monkeypatch, length):
  fused = jax.nn.dot_product_attention
  asked = []

  def without_cudnn(query, *args, implementation, **kwargs):
    asked.append((implementation, query.shape[1]))
    return fused(query, *args, implementation='xla', **kwargs)

  x = jax.random.normal(jax.random.key(0), (2, length, 12))
  plain = attention.Attention(3, jnp.float32)
  variables = jax.jit(functools.partial(plain.init, turn=None))(
    jax.random.key(1), x
  )

  def run(module):
    def loss(variables, x):
      y, weights = module.apply(variables, x, None)
      return jnp.sum(y**3), (y, weights)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(variables, x)

  expected = run(plain)
  monkeypatch.setattr(jax.nn, 'dot_product_attention', without_cudnn)
  actual = run(plain.clone(fused=True))
  assert asked == [('cudnn', 6)]
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7),
    actual,
    expected,
  )
