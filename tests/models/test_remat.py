import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax import errors
from cmd_jax.models import make_encoder
from cmd_jax.models.layers import REMATS
from tests import tiny

_ENCODERS = {
  'vit': dict(variant='Mu', depth=2, image_px=16, patch_px=8),
  'rotary': dict(
    name='vit',
    variant='Mu',
    depth=2,
    image_px=16,
    patch_px=8,
    positions='rotary',
    num_heads=2,
  ),
  'swin': dict(variant='Mu', image_px=16, window=2, width=8),
  'resnet': dict(variant='Mu', width_ratio=0.25),
  'efficientnet': dict(variant='Mu', width_ratio=0.25, drop_path_rate=0.2),
}


def _make(name, remat):
  return make_encoder(**dict(name=name) | _ENCODERS[name] | dict(remat=remat))


def _make_loss(encoder):
  def loss(params, variables, images):
    uniforms = jnp.full((len(images), encoder.depth, 2), 0.5)
    output, updated = encoder.apply(
      {**variables, 'params': params},
      images,
      uniforms,
      train=True,
      mutable=['batch_stats'],
    )
    total = jnp.mean(jnp.square(output.image)) + jnp.mean(output.tokens[:, 0])
    if output.attention is not None:
      total += jnp.mean(jnp.square(output.attention))
    return total, updated

  return loss


def _kept_bytes(loss, variables, images):
  """Bytes that the backward pass is handed, the variables' own not counted."""

  def kept(variables, images):
    _, backward, _ = jax.vjp(
      lambda params: loss(params, variables, images),
      variables['params'],
      has_aux=True,
    )
    return backward

  leaves = jax.tree.leaves(jax.eval_shape(kept, variables, images))
  return sum(x.size * x.dtype.itemsize for x in leaves)


@pytest.mark.parametrize(
  'name',
  [
    # The same blocks as the ViT's.
    pytest.param(x, marks=pytest.mark.slow) if x == 'rotary' else x
    for x in _ENCODERS
  ],
)
def test_values_and_gradients_stay_and_memory_falls(name):
  images = tiny.normal(2, 16, 16, 3)
  encoder = _make(name, 'none')
  variables = tiny.draw_like(
    jax.eval_shape(encoder.init, jax.random.key(1), images)
  )
  results, kept = {}, {}
  for remat in REMATS:
    encoder = _make(name, remat)
    shapes = jax.eval_shape(encoder.init, jax.random.key(1), images)
    assert jax.tree.structure(shapes) == jax.tree.structure(variables)
    loss = _make_loss(encoder)
    kept[remat] = _kept_bytes(loss, variables, images)
    if remat in ('none', 'full'):
      gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
      results[remat] = gradient(variables['params'], variables, images)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    results['full'],
    results['none'],
  )
  assert kept['full'] <= kept['narrow'] <= kept['dots'] < kept['none']
  assert name == 'resnet' or kept['full'] < kept['narrow']
  if name in ('vit', 'swin'):
    assert kept['narrow'] < kept['dots']


@pytest.mark.parametrize('name', ['vit', 'swin', 'resnet', 'efficientnet'])
def test_unknown_remat_lists_the_known(name):
  with pytest.raises(errors.UserError, match=r'remat.*none, dots, narrow'):
    _make(name, 'some')
