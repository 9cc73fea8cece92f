import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from cmd_jax import errors
from cmd_jax.models import partial
from tests import tiny


def _params(name='vit'):
  encoder = tiny.make_tiny_encoder(name)
  images = jnp.ones((2, 16, 16, 3))
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), images)
  return encoder, tiny.draw_like(shapes)['params'], images


def _init_lora(params):
  init = jax.jit(partial.init_lora, static_argnums=2)
  return jax.device_get(init(jax.random.key(1), params, 3))


def test_adapters_change_nothing_at_first():
  _, params, _ = _params()
  lora = _init_lora(params)
  merged = jax.jit(partial.merge_lora)(params, lora, 2.0)
  jax.tree.map(np.testing.assert_array_equal, merged, params)


def test_a_merged_kernel_is_the_sum():
  _, params, _ = _params()
  lora = jax.tree.map(lambda x: np.float32(x + 0.5), _init_lora(params))
  merged = jax.jit(partial.merge_lora)(params, lora, 0.25)
  before, after, adapters = (
    traverse_util.flatten_dict(x) for x in (params, merged, lora)
  )
  layers = {path[:-1] for path in adapters}
  assert len(layers) == 2 * 4
  for path, kernel in before.items():
    if path[:-1] in layers and path[-1] == 'kernel':
      a, b = adapters[*path[:-1], 'a'], adapters[*path[:-1], 'b']
      assert a.shape == (kernel.shape[0], 3)
      assert b.shape == (3, kernel.shape[1])
      expected = kernel + 0.25 * np.asarray(a) @ np.asarray(b)
      np.testing.assert_allclose(after[path], expected, rtol=1e-5)
    else:
      np.testing.assert_array_equal(after[path], kernel)


def test_frozen_parameters_get_no_gradient():
  encoder, params, images = _params()
  is_frozen = partial.make_is_frozen(encoder, train_last_blocks=1, lora_rank=0)

  def loss(params):
    frozen = partial.freeze({'encoder': params}, is_frozen)['encoder']
    return jnp.sum(encoder.apply({'params': frozen}, images).image ** 2)

  gradient = jax.device_get(jax.jit(jax.grad(loss))(params))
  moving = {
    name
    for name, tree in gradient.items()
    if any(np.any(x != 0) for x in jax.tree.leaves(tree))
  }
  assert moving == {'block_1', 'norm'}


@pytest.mark.parametrize('name', ['vit', 'swin', 'resnet', 'efficientnet'])
def test_names_of_the_layers_are_names_of_parameters(name):
  encoder, params, _ = _params(name)
  assert set(encoder.block_names) <= set(encoder.layer_names) <= set(params)
  assert {n for n in params if 'block' in n or 'layer' in n} == set(
    encoder.block_names
  )


@pytest.mark.parametrize(
  'options, words',
  [
    (dict(train_last_blocks=3, lora_rank=0), 'train_last_blocks is 3.*0 to 2'),
    (dict(train_last_blocks=-2, lora_rank=0), 'train_last_blocks is -2'),
    (dict(train_last_blocks=-1, lora_rank=-1), 'lora.rank is -1'),
    (dict(train_last_blocks=1, lora_rank=4), 'set one of them'),
  ],
)
def test_what_cannot_be_is_explained(options, words):
  encoder = tiny.make_tiny_encoder()
  with pytest.raises(errors.UserError, match=words):
    partial.make_is_frozen(encoder, **options)


def test_an_encoder_without_attention_has_nothing_to_adapt():
  _, params, _ = _params('resnet')
  with pytest.raises(errors.UserError, match='no attention to adapt'):
    partial.init_lora(jax.random.key(0), params, 4)


@pytest.mark.parametrize('name, width', [('vit', 16), ('swin', 8)])
def test_a_rank_above_the_width_is_refused(name, width):
  _, params, _ = _params(name)
  partial.init_lora(jax.random.key(0), params, width)
  with pytest.raises(
    errors.UserError, match=f'rank is {width + 1}, .*{width} w'
  ):
    partial.init_lora(jax.random.key(0), params, width + 1)
