import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax import parallel
from cmd_jax.losses import blockwise


def _compare(shared, examples, constants):
  logits = examples['x'] @ shared['w'] + constants
  loss = jax.nn.logsumexp(logits, -1) * examples['a'].sum(-1)
  return loss, {'largest': logits.max(-1)}


def _inputs(dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 4)
  shared = {'w': jax.random.normal(keys[0], (3, 5))}
  examples = {
    'x': jax.random.normal(keys[1], (8, 3), dtype),
    'a': jax.random.normal(keys[2], (8, 2), dtype),
  }
  return shared, examples, jax.random.normal(keys[3], (5,))


def _plain(shared, examples, constants):
  loss, values = _compare(shared, examples, constants)
  return 3 * loss.mean(), values


def _in_blocks(shared, examples, constants, **options):
  loss, values = blockwise.mean_over_examples(
    _compare, shared, examples, constants, **options
  )
  return 3 * loss, values


def _with_gradients(fn):
  return jax.jit(jax.value_and_grad(fn, argnums=(0, 1), has_aux=True))


def _assert_same(one, other, rtol=1e-5):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(
      a.astype(np.float32), b.astype(np.float32), rtol=rtol, atol=1e-6
    )


@pytest.mark.parametrize('num_bytes', [0, 1, 2**24, 2**40])
def test_value_and_gradient_are_those_of_the_whole_batch(num_bytes):
  inputs = _inputs()
  _assert_same(
    _with_gradients(lambda *x: _in_blocks(*x, bytes_an_example=num_bytes))(
      *inputs
    ),
    _with_gradients(_plain)(*inputs),
  )


def test_devices_share_the_batch():
  shared, examples, constants = _inputs()
  mesh = parallel.make_mesh(4)
  spread = jax.device_put(examples, parallel.split_over_data(mesh))
  ours = _with_gradients(
    lambda *x: _in_blocks(*x, bytes_an_example=2**40, mesh=mesh)
  )(shared, spread, constants)
  _assert_same(ours, _with_gradients(_plain)(shared, examples, constants))


def test_low_precision_gradients_keep_their_type():
  inputs = _inputs(jnp.bfloat16)
  (_, _), (of_shared, of_examples) = _with_gradients(
    lambda *x: _in_blocks(*x, bytes_an_example=2**40)
  )(*inputs)
  assert of_shared['w'].dtype == jnp.float32
  assert of_examples['x'].dtype == jnp.bfloat16


def test_what_is_reported_has_no_gradient():
  shared, examples, constants = _inputs()

  def reported(shared):
    _, values = _in_blocks(shared, examples, constants, bytes_an_example=1)
    return values['largest'].sum()

  np.testing.assert_array_equal(
    jax.grad(reported)(shared)['w'], np.zeros((3, 5))
  )
