from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.devices import sharding
from cmd_jax.losses import blockwise, prototype_attention
from cmd_jax.losses.prototype_tiles import Levels, Settings, Teacher
from tests import tiny

_K, _BATCH, _ROWS, _DIM = 12, 8, 3, 5


class _Weights(NamedTuple):
  direction: jax.Array
  scale: jax.Array

  def kernel(self):
    return self.direction * self.scale


def _loss(plan, prototypes, so_far, constants, examples, targets):
  """Of each example; reports how many there were at a time."""

  def regions(x):
    return None if x is None else Levels(None, x)

  rows = jnp.swapaxes(examples['x'], 0, 1)
  attended = prototype_attention.attend(
    Settings(0.5, None, None, plan.prototypes, plan.keeps),
    regions(prototypes),
    Levels((), (rows,)),
    (),
    Teacher(
      Levels((), (rows,)),
      regions(constants['prototypes']),
      regions(constants['bias']),
      jnp.float32(1),
    ),
    (),
    regions(so_far),
  )
  products = (attended.expected.regions[0] * rows).sum(-1)
  losses = (attended.normalisers.regions[0] - products).T * targets['a']
  size = jnp.full(len(losses), len(losses))
  assert len(losses) == plan.examples
  return losses.sum(-1), {'peak': losses.max(-1), 'size': size}


def _inputs(dtype=jnp.float32):
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.array(rng.normal(size=shape), jnp.float32)

  return (
    _Weights(normal(_DIM, _K), normal(1, _K)),
    {
      'bias': normal(_K),
      'prototypes': _Weights(normal(_DIM, _K), jnp.ones(_K)),
    },
    {'x': normal(_BATCH, _ROWS, _DIM).astype(dtype)},
    {'a': normal(_BATCH, _ROWS)},
  )


def _blockwise(size, *inputs, mesh=None):
  loss, values = blockwise.mean_over_examples(
    _loss,
    lambda batch_size: blockwise.Plan(min(size, batch_size), _K, False),
    *inputs,
    mesh=mesh,
  )
  return 3 * loss, values


def _plain(*inputs):
  prototypes, *rest = inputs
  losses, values = _loss(
    blockwise.Plan(_BATCH, _K, False), prototypes, None, *rest
  )
  return 3 * losses.mean(), values


def _with_gradients(fn, *inputs):
  gradient = jax.value_and_grad(fn, argnums=(0, 2), has_aux=True)
  return jax.jit(gradient)(*inputs)


def _assert_same(one, other, rtol=1e-5, atol=1e-6):
  (loss, values), gradients = one
  (other_loss, other_values), other_gradients = other
  for a, b in zip(
    jax.tree.leaves((loss, values['peak'], gradients)),
    jax.tree.leaves((other_loss, other_values['peak'], other_gradients)),
    strict=True,
  ):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(
      a.astype(np.float32), b.astype(np.float32), rtol=rtol, atol=atol
    )


@pytest.mark.parametrize('size', [1, 4, _BATCH])
def test_value_and_gradient_are_those_of_the_whole_batch(size):
  inputs = _inputs()
  ours = _with_gradients(lambda *x: _blockwise(size, *x), *inputs)
  _assert_same(ours, _with_gradients(_plain, *inputs))
  np.testing.assert_array_equal(ours[0][1]['size'], np.full(_BATCH, size))


def test_devices_share_the_batch():
  prototypes, constants, examples, targets = _inputs()
  mesh = sharding.make_mesh(4)
  spread = jax.device_put((examples, targets), sharding.sharded(mesh))
  ours = _with_gradients(
    lambda *x: _blockwise(1, *x, mesh=mesh), prototypes, constants, *spread
  )
  plain = _with_gradients(_plain, prototypes, constants, examples, targets)
  _assert_same(ours, plain)


def test_low_precision_gradients_keep_their_type_and_value():
  inputs = _inputs(jnp.bfloat16)
  ours = _with_gradients(lambda *x: _blockwise(2, *x), *inputs)
  _assert_same(ours, _with_gradients(_plain, *inputs), rtol=1e-2, atol=2e-2)
  _, (of_prototypes, of_examples) = ours
  assert of_prototypes.direction.dtype == jnp.float32
  assert of_examples['x'].dtype == jnp.bfloat16


def test_what_is_reported_has_no_gradient():
  prototypes, *rest = _inputs()

  def reported(prototypes):
    _, values = _blockwise(4, prototypes, *rest)
    return values['peak'].sum()

  np.testing.assert_array_equal(
    jax.jit(jax.grad(reported))(prototypes).direction, np.zeros((_DIM, _K))
  )


@pytest.mark.parametrize(
  'budget, expected',
  [
    ((2**30, 2**30), (8, 12, True)),
    ((2**30, 0), (8, 12, False)),
    ((600, 2**30), (2, 12, True)),
    # An example has 6 x 12 logits of 4 bytes.
    ((96, 600), (1, 4, True)),
    ((150, 1), (1, 6, False)),
    ((1, 1), (1, 1, False)),
  ],
)
def test_blocks_keep_to_the_budget(budget, expected):
  plan = blockwise.make_plan(
    blockwise.Budget(*budget), batch_size=8, num_rows=6, num_prototypes=12
  )
  assert plan == (*expected, '')


@pytest.mark.parametrize(
  'kernels, expected',
  [
    ('auto', ['tpu', '', '']),
    ('pallas', ['tpu', 'gpu', '']),
    ('xla', ['', '', '']),
  ],
)
def test_kernels_are_those_of_the_platform(kernels, expected):
  platforms = ('tpu', 'gpu', 'cpu')
  budgets = [blockwise.budget_for(x, kernels) for x in platforms]
  assert [x.kernels for x in budgets] == expected


def test_a_prime_number_of_prototypes_is_taken_whole():
  plan = blockwise.make_plan(
    blockwise.Budget(2**12, 2**30),
    batch_size=8,
    num_rows=6,
    num_prototypes=1009,
  )
  assert plan.prototypes == 1009


def test_a_cpu_keeps_logits_and_others_do_not():
  assert blockwise.budget_for('cpu').kept_bytes
  assert not blockwise.budget_for('tpu').kept_bytes
  assert not blockwise.budget_for('gpu').kept_bytes


def test_sum_over_prototypes_is_the_sum_of_all():
  (prototypes, _, examples, _) = _inputs()

  def of_block(prototypes, x):
    return (x @ prototypes.kernel() ** 2).sum((1, 2))

  def check(fn):
    def loss(prototypes, x):
      values = fn(prototypes, x)
      return values @ jnp.arange(1.0, 1 + len(values)), values

    gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return jax.jit(gradient)(prototypes, examples['x'])

  ours = check(lambda *x: blockwise.sum_over_prototypes(of_block, 3, *x))
  for a, b in zip(
    jax.tree.leaves(ours), jax.tree.leaves(check(of_block)), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('number', [5, 2048, 4099])
def test_over_prototypes_joins_the_blocks(number):
  prototypes = {'w': tiny.normal(3, number)}

  def of_block(block):
    return jnp.ones((2, 3)) @ block['w']

  ours = jax.jit(lambda x: blockwise.over_prototypes(of_block, x))(prototypes)
  np.testing.assert_allclose(
    ours, np.ones((2, 3)) @ prototypes['w'], rtol=1e-6, atol=1e-6
  )
