import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.devices import sharding
from cmd_jax.models.layers import BatchNorm

# 16 examples of 3x3 positions and 5 channels.
_SHAPE = (16, 3, 3, 5)


def _normal(seed, shape, loc=0.0, scale=1.0):
  draws = np.random.default_rng(seed).normal(loc, scale, shape)
  return draws.astype(np.float32)


@pytest.fixture(scope='module')
def case():
  """Variables, inputs of different means and deviations, loss weights."""
  channel = np.arange(1, _SHAPE[-1] + 1)
  variables = {
    'params': {
      'scale': _normal(0, _SHAPE[-1:], loc=1.0, scale=0.3),
      'bias': _normal(1, _SHAPE[-1:]),
    },
    'batch_stats': {
      'mean': _normal(2, _SHAPE[-1:]),
      'var': np.abs(_normal(3, _SHAPE[-1:])) + 0.5,
    },
  }
  # The mean varies along the batch, so that a device's share is not the whole.
  drift = np.linspace(-2, 2, _SHAPE[0]).reshape(-1, 1, 1, 1)
  x = _normal(4, _SHAPE, loc=channel, scale=channel) + drift
  return variables, x.astype(np.float32), _normal(5, _SHAPE)


def _formula(variables, x, weights, momentum=0.9, epsilon=1e-5):
  """Outputs, running statistics and gradients of mean(weights * y), float64."""
  x, weights = np.float64(x), np.float64(weights)
  scale, bias = (np.float64(variables['params'][k]) for k in ('scale', 'bias'))
  old = {k: np.float64(v) for k, v in variables['batch_stats'].items()}
  axes = tuple(range(x.ndim - 1))
  count = x.size // x.shape[-1]
  mean, var = x.mean(axes), x.var(axes)
  normal = (x - mean) / np.sqrt(var + epsilon)
  dy = weights / x.size
  dnormal = dy * scale
  # d normal / dx takes away the parts along 1 and along normal itself.
  dx = dnormal - dnormal.mean(axes) - normal * (dnormal * normal).mean(axes)
  return {
    'y': normal * scale + bias,
    'mean': momentum * old['mean'] + (1 - momentum) * mean,
    'var': momentum * old['var'] + (1 - momentum) * var * count / (count - 1),
    'd_scale': (dy * normal).sum(axes),
    'd_bias': dy.sum(axes),
    'd_x': dx / np.sqrt(var + epsilon),
  }


def _step(axis_name=None):
  """(variables, x, weights) -> the values of `_formula`, on a device's share.

  The loss is the mean over the share, and its gradients are averaged over the
  devices, as a train step does.
  """
  norm = BatchNorm(axis_name)

  def step(variables, x, weights):
    def loss(params, x):
      y, updated = norm.apply(
        variables | {'params': params}, x, True, mutable=['batch_stats']
      )
      return jnp.mean(y * weights), (y, updated['batch_stats'])

    grads, (y, stats) = jax.grad(loss, argnums=(0, 1), has_aux=True)(
      variables['params'], x
    )
    params = sharding.pmean(grads[0], axis_name)
    devices = sharding.psum(1, axis_name)
    return {
      'y': y,
      'mean': stats['mean'],
      'var': stats['var'],
      'd_scale': params['scale'],
      'd_bias': params['bias'],
      'd_x': grads[1] / devices,
    }

  return step


def _one_device(*arguments):
  return jax.jit(_step())(*arguments)


def _mesh(variables, x, weights):
  mesh = sharding.make_mesh(8)
  whole, split = sharding.replicated(mesh), sharding.sharded(mesh)
  step = jax.jit(_step(), in_shardings=(whole, split, split))
  return step(variables, x, weights)


def _pmap(variables, x, weights):
  axis = sharding.DATA_AXIS
  step = jax.pmap(_step(axis), axis, in_axes=(None, 0, 0))
  shares = (a.reshape(8, -1, *a.shape[1:]) for a in (x, weights))
  values = jax.tree.map(np.asarray, step(variables, *shares))
  for name in ('y', 'd_x'):
    values[name] = values[name].reshape(x.shape)
  for name in ('mean', 'var', 'd_scale', 'd_bias'):
    np.testing.assert_array_equal(values[name], values[name][:1].repeat(8, 0))
    values[name] = values[name][0]
  return values


@pytest.mark.parametrize('run', [_one_device, _mesh, _pmap])
def test_training_is_the_formula_over_the_whole_batch(case, run):
  expected = _formula(*case)
  ours = run(*case)
  for name, value in expected.items():
    # Values near 0 are differences of large ones: 1e-5 of the largest there.
    np.testing.assert_allclose(
      ours[name],
      value,
      rtol=1e-5,
      atol=1e-5 * np.abs(value).max(),
      err_msg=name,
    )


def test_evaluation_takes_the_running_statistics(case):
  variables, x, _ = case
  params, stats = variables['params'], variables['batch_stats']
  expected = (x - stats['mean']) / np.sqrt(stats['var'] + 1e-5)
  expected = expected * params['scale'] + params['bias']
  # Without `mutable` an update would raise.
  ours = jax.jit(lambda *arrays: BatchNorm().apply(*arrays, False))(
    variables, x
  )
  np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_variance_survives_a_large_mean():
  x = 1000 + _normal(0, (64, 1))

  @jax.jit
  def train(x):
    variables = BatchNorm().init(jax.random.key(0), x, False)
    return BatchNorm().apply(variables, x, True, mutable=['batch_stats'])

  y, _ = train(x)
  # E[x^2] - E[x]^2 in float32 has no digit left here.
  x = np.float64(x)
  expected = (x - x.mean()) / x.std()
  np.testing.assert_allclose(y, expected, atol=1e-3)


def test_initialising_leaves_the_running_statistics(case):
  _, x, _ = case
  init = jax.jit(lambda x: BatchNorm().init(jax.random.key(0), x, True))
  stats = init(x)['batch_stats']
  np.testing.assert_array_equal(stats['mean'], 0)
  np.testing.assert_array_equal(stats['var'], 1)


def test_bfloat16_has_float32_statistics(case):
  variables, x, weights = case
  x = jnp.asarray(x, jnp.bfloat16)
  norm = BatchNorm(dtype=jnp.bfloat16)
  y, updated = jax.jit(
    lambda *arrays: norm.apply(*arrays, True, mutable=['batch_stats'])
  )(variables, x)
  assert y.dtype == jnp.bfloat16
  expected = _formula(variables, np.float32(x), weights)
  for name, value in updated['batch_stats'].items():
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected[name], rtol=1e-5)
  np.testing.assert_allclose(
    np.float32(y), expected['y'], rtol=2**-8, atol=1e-2
  )
