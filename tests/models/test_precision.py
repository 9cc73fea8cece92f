import jax
import jax.numpy as jnp
import pytest
from jax.extend import core

from cmd_jax.models import heads, make_encoder

_ENCODERS = {
  'vit': dict(variant='Mu', depth=1, image_px=16, patch_px=8),
  'swin': dict(variant='Mu', image_px=16, window=2),
  'resnet': dict(variant='Mu'),
  'efficientnet': dict(variant='Mu'),
}


def _operands(jaxpr, names):
  """Dtypes of what the primitives of these names are given, at any depth."""
  found = {}
  for equation in jaxpr.eqns:
    if equation.primitive.name in names:
      dtypes = found.setdefault(equation.primitive.name, set())
      dtypes.add(equation.invars[0].aval.dtype.name)
    for inner in jax.tree.leaves(
      equation.params,
      is_leaf=lambda x: isinstance(x, (core.Jaxpr, core.ClosedJaxpr)),
    ):
      if isinstance(inner, core.ClosedJaxpr):
        inner = inner.jaxpr
      if isinstance(inner, core.Jaxpr):
        for name, dtypes in _operands(inner, names).items():
          found.setdefault(name, set()).update(dtypes)
  return found


@pytest.mark.parametrize('name', _ENCODERS)
def test_bfloat16_multiplies_in_16_bits_and_normalises_in_32(name):
  encoder = make_encoder(name, dtype='bfloat16', **_ENCODERS[name])
  images = jnp.ones((2, 32, 32, 3))
  variables = jax.eval_shape(encoder.init, jax.random.key(0), images)
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  jaxpr = jax.make_jaxpr(
    lambda v, x: encoder.apply(v, x, train=True, mutable=['batch_stats'])
  )(variables, images)
  found = _operands(jaxpr.jaxpr, ('rsqrt', 'exp'))
  assert found['rsqrt'] == {'float32'}
  assert found.get('exp', {'float32'}) == {'float32'}
  products = 'conv_general_dilated' if name == 'resnet' else 'dot_general'
  assert 'bfloat16' in _operands(jaxpr.jaxpr, (products,))[products]
  outputs = {x.dtype.name for x in jaxpr.out_avals}
  assert outputs == {'float32'}


def test_head_normalises_and_gives_logits_in_32_bits():
  head = heads.PrototypeHead(
    num_prototypes=4, hidden_dim=4, bottleneck_dim=2, dtype=jnp.bfloat16
  )
  x = jnp.ones((2, 4))
  variables = jax.eval_shape(head.init, jax.random.key(0), x)
  jaxpr = jax.make_jaxpr(head.apply)(variables, x)
  assert {x.dtype.name for x in jaxpr.out_avals} == {'float32'}
  found = _operands(jaxpr.jaxpr, ('rsqrt', 'sqrt'))
  assert {'float32'} == set().union(*found.values())
