"""Every primitive by itself, against onnxruntime."""

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from jax import lax

from cmd_jax.errors import UserError
from cmd_jax.export.onnx import function_to_onnx
from cmd_jax.export.onnx_operators import CONVERTERS
from cmd_jax.models.layers import GELUS, gelu

_RNG = np.random.default_rng(0)
_SHAPE = (4, 6, 2)
_W = _RNG.normal(size=_SHAPE).astype(np.float32)
_MASK = _RNG.random(_SHAPE) < 0.5


def _draw(*shape):
  return _RNG.normal(size=shape).astype(np.float32)


_KERNEL, _MATRIX, _FAN = _draw(3, 2, 2, 4), _draw(2, 5), _draw(6, 3)
_CASES = {
  'arithmetic': lambda x: (x + 2 * _W - x / _W) * -x,
  'max': lambda x: jnp.maximum(x, _W),
  'min': lambda x: jnp.minimum(x, _W),
  'exp': jnp.exp,
  'tanh': jnp.tanh,
  'sigmoid': jax.nn.sigmoid,
  'relu': jax.nn.relu,
  'softmax': jax.nn.softmax,
  'gelu': gelu,
  'gelu by tanh': GELUS['tanh'],
  'norm': lambda x: lax.rsqrt(lax.square(x).sum((1, 3)) + 1e-6),
  'stop_gradient': lambda x: lax.stop_gradient(x) - x.max(2, keepdims=True),
  'reshape': lambda x: x.reshape(x.shape[0], 8, 6)[:, None],
  'squeeze': lambda x: jnp.squeeze(x.max(1, keepdims=True), 1),
  'transpose': lambda x: x.transpose(0, 3, 1, 2),
  'broadcast': lambda x: jnp.broadcast_to(x[:, None], (x.shape[0], 3, 4, 6, 2)),
  'broadcast to the batch': lambda x: jnp.concatenate(
    [jnp.broadcast_to(_W[:1], (x.shape[0], 1, 6, 2)), x], 1
  ),
  'large constant': lambda x: x + jnp.zeros((300, 4, 6, 2)).sum(0) + 1,
  'slice': lambda x: lax.slice_in_dim(x, 1, 6, 2, 2),
  'split': lambda x: jnp.concatenate(jnp.split(x, (1, 4), 2)[::-1], 2),
  'roll': lambda x: jnp.roll(x, (1, -2), (1, 2)),
  'pad': lambda x: jnp.pad(x, ((0, 0), (0, 1), (2, 0), (0, 0))),
  'float64': lambda x: x * np.arange(1.0, 49.0).reshape(_SHAPE),
  'where': lambda x: jnp.where(_MASK, x, -3.0),
  'cast': lambda x: x.astype(jnp.int32).astype(jnp.float32),
  'dense': lambda x: x @ _MATRIX,
  'dense on another axis': lambda x: jnp.einsum('bhwc,wk->bhck', x, _FAN),
  'products': lambda x: jnp.einsum('bqhd,bkhd->bhqk', x, 2 * x + 1),
  'weighted products': lambda x: jnp.einsum('bhwc,hw->bch', x, _W[..., 0]),
  'two summed axes': lambda x: jnp.einsum('bhwc,kwc->bhk', x, _W),
  'conv': lambda x: lax.conv_general_dilated(
    x,
    _KERNEL,
    (1, 2),
    ((1, 2), (0, 1)),
    rhs_dilation=(2, 1),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  ),
  'grouped conv': lambda x: lax.conv_general_dilated(
    x,
    _KERNEL[:, :, :1],
    (1, 1),
    'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NCHW'),
    feature_group_count=2,
  ),
  'max pool': lambda x: lax.reduce_window(
    x,
    -np.inf,
    lax.max,
    (1, 3, 2, 1),
    (1, 2, 1, 1),
    ((0, 0), (1, 1), (0, 1), (0, 0)),
  ),
  'constant': lambda x: jnp.broadcast_to(_W[0], (x.shape[0], 6, 2)),
}


def _named(function):
  """As the converter takes it, of one kind of variable: none."""
  return lambda variables, x: {'y': function(x)}


def _primitives(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn.primitive.name
    inner = eqn.params.get('jaxpr') or eqn.params.get('call_jaxpr')
    if inner is not None:
      yield from _primitives(inner.jaxpr)


@pytest.mark.parametrize('name', _CASES)
def test_it_computes_what_jax_computes(name):
  function = _CASES[name]
  model = function_to_onnx(_named(function), {}, _SHAPE, ('y',))
  session = onnxruntime.InferenceSession(model.SerializeToString())
  x = _draw(3, *_SHAPE)
  want = np.asarray(jax.jit(function)(x))
  for count in (1, 3):
    (got,) = session.run(['y'], {'images': x[:count]})
    np.testing.assert_allclose(got, want[:count], rtol=1e-5, atol=1e-5)


def test_every_converter_is_among_these():
  x = np.zeros((2, *_SHAPE), np.float32)
  found = set()
  for function in _CASES.values():
    found |= set(_primitives(jax.make_jaxpr(function)(x).jaxpr))
  assert CONVERTERS.keys() <= found


@pytest.mark.parametrize(
  'function, words',
  [
    (lambda x: jnp.sin(lax.cumsum(x, 1)), r'\(cumsum, sin\): use --format'),
    (
      lambda x: lax.fori_loop(0, 3, lambda _, y: y * 2, x),
      r'\(scan\)',
    ),
    (lambda x: lax.slice_in_dim(x, 1, None), 'slice of the batch'),
    (
      lambda x: lax.pad(x, 0.0, [(0, 0, 0), (0, 0, 1), (0, 0, 0), (0, 0, 0)]),
      'pad within',
    ),
    (
      lambda x: lax.conv_transpose(x, _KERNEL, (2, 2), 'SAME'),
      'transposed',
    ),
    (
      lambda x: lax.reduce_window(
        x, -np.inf, lax.max, (1, 2, 2, 2), (1, 1, 1, 1), 'VALID'
      ),
      'other than images',
    ),
    (
      lambda x: lax.select_n(x.astype(jnp.int32) % 3, x, x, x),
      'more than two',
    ),
  ],
)
def test_what_has_no_counterpart_is_refused_by_name(function, words):
  with pytest.raises(UserError, match=words):
    function_to_onnx(_named(function), {}, _SHAPE, ('y',))


def test_constants_are_computed_beforehand_and_keep_their_names():
  variables = {'params': {'kernel': _MATRIX, 'scale': _draw(5)}}

  def function(variables, x):
    params = variables['params']
    return {'y': (x @ params['kernel']) * (jnp.sin(params['scale']) + 1)}

  model = function_to_onnx(function, variables, _SHAPE, ('y',))
  assert [node.op_type for node in model.graph.node] == [
    'MatMul',
    'Mul',
    'Identity',
  ]
  names = {tensor.name for tensor in model.graph.initializer}
  assert 'params.kernel' in names and len(names) == 2
