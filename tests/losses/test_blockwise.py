import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.devices import sharding
from cmd_jax.losses import blockwise

_K, _BATCH, _ROWS, _DIM = 12, 8, 3, 5

# (bytes of a block, bytes kept): everything at once; blocks of examples; of
# prototypes as well; and of logits that are computed anew.
_BUDGETS = [(2**30, 2**30), (700, 2**30), (100, 600), (150, 1)]


def _scores(prototypes, constants, examples, targets):
  student = jnp.einsum('bnd,dk->bnk', examples['x'], prototypes['w'])
  teacher = jnp.einsum('bnd,dk->bnk', targets['y'], constants['w'])
  return blockwise.Scores(
    {'rows': student * prototypes['g']},
    (teacher - constants['centre']) / constants['temperature'],
  )


def _compare(scores, normalisers, constants, examples, targets):
  """Every kind of dependence: on rows, on bags of them, and on attention."""
  log_probs = scores.student['rows'] - normalisers.student['rows'][..., None]
  probs = jnp.exp(scores.teacher - normalisers.teacher[..., None])
  cross_entropy = -(probs[:, targets['match'][0]] * log_probs).sum(-1).mean(1)
  bag = jnp.einsum('bn,bnk->bk', examples['a'], jnp.exp(log_probs))
  divergence = (probs[:, 0] * (jnp.log(probs[:, 0]) - jnp.log(bag))).sum(-1)
  loss = cross_entropy + constants['weight'] * divergence
  return loss, {'divergence': divergence}


_OBJECTIVE = blockwise.Objective(_scores, _compare)


def _inputs(dtype=jnp.float32):
  keys = iter(jax.random.split(jax.random.key(0), 8))

  def normal(*shape):
    return jax.random.normal(next(keys), shape)

  prototypes = {'w': normal(_DIM, _K), 'g': 1 + 0.1 * normal(1, _K)}
  constants = {
    'w': normal(_DIM, _K),
    'centre': normal(_K),
    'temperature': jnp.float32(0.5),
    'weight': jnp.float32(0.3),
  }
  examples = {
    'x': normal(_BATCH, _ROWS, _DIM).astype(dtype),
    'a': jax.nn.softmax(normal(_BATCH, _ROWS)),
  }
  targets = {
    'y': normal(_BATCH, _ROWS, _DIM).astype(dtype),
    'match': jnp.tile(jnp.array([[2, 0, 0]]), (_BATCH, 1)),
  }
  return prototypes, constants, examples, targets


def _plain(*inputs):
  loss, values = blockwise.compare_at_once(_OBJECTIVE, *inputs)
  return 3 * loss.mean(), values


def _streamed(*inputs, objective=_OBJECTIVE, **options):
  loss, values = blockwise.mean_over_examples(objective, *inputs, **options)
  return 3 * loss, values


def _with_gradients(fn):
  return jax.jit(jax.value_and_grad(fn, argnums=(0, 2), has_aux=True))


def _assert_same(one, other, rtol=1e-5, atol=1e-6):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(
      a.astype(np.float32), b.astype(np.float32), rtol=rtol, atol=atol
    )


@pytest.mark.parametrize('budget', _BUDGETS)
def test_value_and_gradient_are_those_of_the_plain_formula(budget):
  inputs = _inputs()
  budget = blockwise.Budget(*budget)
  _assert_same(
    _with_gradients(lambda *x: _streamed(*x, budget=budget))(*inputs),
    _with_gradients(_plain)(*inputs),
  )


@pytest.mark.parametrize(
  'budget, expected',
  [
    ((2**30, 2**30), (8, 12, True)),
    ((700, 2**30), (2, 12, True)),
    # An example has 2 x 3 x 12 logits of 4 bytes.
    ((96, 600), (1, 4, True)),
    ((150, 1), (1, 6, False)),
    ((1, 1), (1, 1, False)),
  ],
)
def test_blocks_keep_to_the_budget(budget, expected):
  inputs = blockwise._Inputs(*_inputs())
  plan = blockwise._make_plan(_OBJECTIVE, inputs, blockwise.Budget(*budget))
  assert plan == expected


def test_what_cannot_be_split_is_not():
  objective = _OBJECTIVE._replace(sums_over_prototypes=False)
  inputs = blockwise._Inputs(*_inputs())
  plan = blockwise._make_plan(objective, inputs, blockwise.Budget(1, 1))
  assert plan == (1, _K, True)


def test_a_prime_number_of_prototypes_is_taken_whole():
  prototypes, constants, examples, targets = _inputs()
  inputs = blockwise._Inputs(
    {'w': jnp.zeros((_DIM, 1009)), 'g': jnp.ones((1, 1009))},
    {**constants, 'w': jnp.zeros((_DIM, 1009)), 'centre': jnp.zeros(1009)},
    examples,
    targets,
  )
  plan = blockwise._make_plan(
    _OBJECTIVE, inputs, blockwise.Budget(2**12, 2**30)
  )
  assert plan.prototypes == 1009


def test_devices_share_the_batch():
  prototypes, constants, examples, targets = _inputs()
  mesh = sharding.make_mesh(4)
  spread = jax.device_put((examples, targets), sharding.sharded(mesh))
  ours = _with_gradients(
    lambda *x: _streamed(*x, budget=blockwise.Budget(100, 2**30), mesh=mesh)
  )(prototypes, constants, *spread)
  plain = _with_gradients(_plain)(prototypes, constants, examples, targets)
  _assert_same(ours, plain)


def test_low_precision_gradients_keep_their_type_and_value():
  inputs = _inputs(jnp.bfloat16)
  budget = blockwise.Budget(300, 2**30)
  ours = _with_gradients(lambda *x: _streamed(*x, budget=budget))(*inputs)
  _assert_same(ours, _with_gradients(_plain)(*inputs), rtol=1e-2, atol=2e-3)
  (_, _), (of_prototypes, of_examples) = ours
  assert of_prototypes['w'].dtype == jnp.float32
  assert of_examples['x'].dtype == jnp.bfloat16


def test_what_is_reported_has_no_gradient():
  prototypes, *rest = _inputs()

  def reported(prototypes):
    _, values = _streamed(prototypes, *rest)
    return values['divergence'].sum()

  np.testing.assert_array_equal(
    jax.grad(reported)(prototypes)['w'], np.zeros((_DIM, _K))
  )


def test_temporaries_do_not_grow_with_the_prototypes():
  """But for gradients, which are as large as the prototypes."""

  def temporaries(num_prototypes):
    prototypes, constants, examples, targets = _inputs()
    prototypes = {
      'w': jnp.zeros((_DIM, num_prototypes)),
      'g': jnp.ones((1, num_prototypes)),
    }
    constants['w'] = prototypes['w']
    constants['centre'] = jnp.zeros(num_prototypes)
    fn = _with_gradients(
      lambda *x: _streamed(*x, budget=blockwise.Budget(2**13, 2**10))
    )
    compiled = fn.lower(prototypes, constants, examples, targets).compile()
    gradients = sum(x.nbytes for x in jax.tree.leaves(prototypes))
    return compiled.memory_analysis().temp_size_in_bytes - 2 * gradients

  assert temporaries(2**14) < temporaries(2**10) + 2**16


@pytest.mark.parametrize('number', [5, 2048, 4099])
def test_over_prototypes_joins_the_blocks(number):
  prototypes = {'w': jax.random.normal(jax.random.key(0), (3, number))}
  ours = blockwise.over_prototypes(
    lambda block: jnp.ones((2, 3)) @ block['w'], prototypes
  )
  np.testing.assert_allclose(
    ours, jnp.ones((2, 3)) @ prototypes['w'], rtol=1e-6
  )
