"""Factors of large products are rounded to bfloat16, and nothing else is."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.extend import core
from jax.sharding import PartitionSpec as P

from cmd_jax.devices import sharding
from cmd_jax.devices.products import with_bfloat16_products

_RNG = np.random.default_rng(0)
_LARGE, _SMALL = 100, 99


def _square(side):
  return _RNG.normal(size=(side, side)).astype(np.float32)


def _rounded(x):
  return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def _products(function, *args):
  """Pairs of dtypes of factors in a program, wherever in it they are."""
  found = []

  def visit(value):
    if isinstance(value, tuple | list):
      for x in value:
        visit(x)
    elif isinstance(value, core.ClosedJaxpr):
      visit(value.jaxpr)
    elif isinstance(value, core.Jaxpr):
      for equation in value.eqns:
        if equation.primitive.name == 'dot_general':
          found.append([x.aval.dtype.name for x in equation.invars])
          assert equation.outvars[0].aval.dtype == jnp.float32
        for x in equation.params.values():
          visit(x)

  visit(jax.make_jaxpr(function)(*args))
  return found


@pytest.mark.parametrize('batched', [False, True])
def test_only_the_factors_of_large_products_are_rounded(batched):
  multiply = jax.vmap(jnp.matmul) if batched else jnp.matmul
  rounding = jax.jit(with_bfloat16_products(multiply))
  for side, seen in ((_LARGE, _rounded), (_SMALL, np.asarray)):
    pair = [_square(side), _square(side)]
    args = [x[None] for x in pair] if batched else pair
    found = rounding(*args)
    assert found.dtype == jnp.float32
    left, right = (seen(x).astype(np.float64) for x in pair)
    np.testing.assert_allclose(
      found[0] if batched else found, left @ right, atol=1e-4
    )


def test_other_types_are_left_alone():
  x = _square(_LARGE)
  for dtype in (np.int32, ml_dtypes.bfloat16):
    program = jax.make_jaxpr(with_bfloat16_products(jnp.matmul))(
      x.astype(dtype), x.astype(dtype)
    )
    assert str(program) == str(
      jax.make_jaxpr(jnp.matmul)(x.astype(dtype), x.astype(dtype))
    )


@jax.custom_vjp
def _own_gradient(x, y):
  return x @ y


_own_gradient.defvjp(
  lambda x, y: (x @ y, (x, y)),
  lambda kept, of_result: (of_result @ kept[1].T, kept[0].T @ of_result),
)


def _in_loop(x, y):
  return jax.lax.scan(lambda x, _: (x @ y, None), x, None, length=2)[0]


def _in_branch(x, y):
  return jax.lax.cond(jnp.isfinite(x[0, 0]), jnp.matmul, jnp.add, x, y)


@pytest.mark.parametrize(
  'multiply, count',
  [
    (jnp.matmul, 3),
    (jax.jit(jnp.matmul), 3),
    (jax.checkpoint(jnp.matmul), 3),
    (_own_gradient, 3),
    (_in_loop, 3),
    (_in_branch, 3),
  ],
  ids=['plain', 'jit', 'remat', 'custom_vjp', 'scan', 'cond'],
)
def test_products_are_found_wherever_they_are(multiply, count):
  x, y = _square(_LARGE), _square(_LARGE)
  exact = jax.value_and_grad(lambda x, y: (multiply(x, y) ** 2).mean(), (0, 1))
  rounding = with_bfloat16_products(exact)
  found = _products(rounding, x, y)
  assert len(found) == len(_products(exact, x, y)) >= count
  assert {x for pair in found for x in pair} == {'bfloat16'}
  for a, b in zip(
    jax.tree.leaves(jax.jit(rounding)(x, y)),
    jax.tree.leaves(jax.jit(exact)(x, y)),
    strict=True,
  ):
    error = np.linalg.norm(a - b) / np.linalg.norm(b)
    # Of eight bits: by chance never the same, and never further than this.
    assert 1e-6 < error < 2e-2


def test_a_function_called_twice_stays_one_function():
  multiply = jax.jit(jnp.matmul)
  x = _square(_LARGE)
  program = jax.make_jaxpr(
    with_bfloat16_products(lambda x: multiply(multiply(x, x), x))
  )(x)
  inner = [e.params['jaxpr'] for e in program.eqns if 'jaxpr' in e.params]
  assert len(inner) == 2 and inner[0] is inner[1]


def test_names_of_scopes_stay():
  def scoped(x):
    with jax.named_scope('heads'):
      return x @ x

  lowered = jax.jit(with_bfloat16_products(scoped)).lower(_square(_LARGE))
  assert 'heads/dot_general' in lowered.as_text(debug_info=True)


def test_trees_go_in_and_come_out():
  x = _square(_LARGE)

  def function(pair, nothing):
    assert nothing is None
    return {'sum': pair['a'] + pair['b']}, (pair['a'] @ pair['b'], None)

  first, (second, third) = with_bfloat16_products(function)(
    {'a': x, 'b': x}, None
  )
  np.testing.assert_array_equal(first['sum'], x + x)
  assert second.shape == x.shape and third is None


def test_sums_over_devices_are_left_in():
  mesh = sharding.make_mesh(2)
  x = _square(2 * _LARGE)

  def share(x):
    return jax.lax.psum(x.T @ x, sharding.DATA_AXIS)

  spread = jax.jit(
    jax.shard_map(
      with_bfloat16_products(share),
      mesh=mesh,
      in_specs=P(sharding.DATA_AXIS),
      out_specs=P(),
    )
  )
  exact = _rounded(x).T @ _rounded(x)
  np.testing.assert_allclose(spread(x), exact, atol=1e-3)
