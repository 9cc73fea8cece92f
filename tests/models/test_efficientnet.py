import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax import errors
from cmd_jax.data.augment import multi_crop
from cmd_jax.models import efficientnet
from tests import tiny


@functools.cache
def _tiny(**changes):
  """A tiny encoder, drawn variables of it and images."""
  encoder = tiny.make_tiny_encoder('efficientnet').clone(**changes)
  images = np.random.default_rng(0).normal(size=(3, 32, 32, 3))
  images = images.astype(np.float32)
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), images)
  # Larger than usual, or what is said of an image hardly depends on it.
  return encoder, tiny.draw_like(shapes, scale=0.5), images


@functools.cache
def _train(**changes):
  """Jitted: (variables, images, uniforms) -> output, updated, gradient."""
  encoder, *_ = _tiny(**changes)

  @jax.jit
  def train(variables, images, uniforms):
    def loss(params):
      output, updated = encoder.apply(
        {**variables, 'params': params},
        images,
        uniforms,
        train=True,
        mutable=['batch_stats'],
      )
      total = jnp.square(output.image - 1).mean() + output.tokens[:, 0].mean()
      return total, (output, updated)

    gradient, aux = jax.grad(loss, has_aux=True)(variables['params'])
    return *aux, gradient

  return lambda *arguments: jax.device_get(train(*arguments))


# The counts of efficientnet_lite_pytorch's classes without their classifiers.
@pytest.mark.parametrize(
  'variant, count',
  [('lite0', 3_371_008), ('lite1', 4_135_680), ('lite2', 4_811_072)],
)
def test_presets_have_the_published_number_of_parameters(variant, count):
  encoder = efficientnet.make_efficientnet(variant=variant)
  images = jnp.zeros((1, 32, 32, 3))
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), images)
  assert sum(x.size for x in jax.tree.leaves(shapes['params'])) == count


@pytest.mark.parametrize(
  'tokens, shape', [('stride16', (2, 4 * 4, 112)), ('stride32', (2, 4, 1280))]
)
def test_shapes(tokens, shape):
  encoder = efficientnet.make_efficientnet(tokens=tokens)
  images = jnp.zeros((2, 64, 50, 3))
  variables = jax.eval_shape(encoder.init, jax.random.key(0), images)
  stages = jax.eval_shape(
    lambda variables: encoder.apply(variables, images, method='stages'),
    variables,
  )
  assert [x.shape for x in stages] == [
    (2, 32, 25, 16),
    (2, 16, 13, 24),
    (2, 8, 7, 40),
    (2, 4, 4, 112),
    (2, 2, 2, 1280),
  ]
  output = jax.eval_shape(encoder.apply, variables, images)
  assert output.image.shape == (2, 1280)
  assert output.tokens.shape == shape
  assert output.attention is None
  assert encoder.depth == 16


@pytest.mark.parametrize('tokens, which', [('stride16', -2), ('stride32', -1)])
def test_tokens_are_their_map_row_by_row(tokens, which):
  encoder, variables, _ = _tiny(tokens=tokens)
  images = np.random.default_rng(1).normal(size=(2, 64, 96, 3))
  stages, output = jax.jit(
    lambda v, x: (
      encoder.apply(v, x, method='stages'),
      encoder.apply(v, x),
    )
  )(variables, images)
  batch, height, width, channels = stages[which].shape
  assert (height, width) == ((4, 6) if tokens == 'stride16' else (2, 3))
  np.testing.assert_allclose(
    output.tokens.reshape(batch, height, width, channels),
    stages[which],
    rtol=1e-5,
    atol=1e-6,
  )
  np.testing.assert_allclose(
    output.image, stages[-1].mean((1, 2)), rtol=1e-5, atol=1e-6
  )


def test_images_are_normalised_as_the_weights_were_trained():
  encoder, variables, _ = _tiny()
  pixels = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3))
  mean, std = (
    np.array(x) for x in (multi_crop.IMAGENET_MEAN, multi_crop.IMAGENET_STD)
  )
  normalised = ((pixels / 255 - mean) / std).astype(np.float32)
  plain = encoder.clone(input_normalisation='imagenet')
  expected = jax.jit(plain.apply)(
    variables, ((pixels - 127) / 128).astype(np.float32)
  )
  found = jax.jit(encoder.apply)(variables, normalised)
  np.testing.assert_allclose(found.image, expected.image, rtol=0, atol=1e-3)
  other = jax.jit(plain.apply)(variables, normalised)
  assert np.abs(other.image - expected.image).max() > 1


def test_synchronised_statistics_are_the_batchs_and_are_updated():
  encoder, variables, images = _tiny()
  output, updated, gradient = _train()(variables, images, None)
  evaluated = jax.jit(encoder.apply)(variables, images)
  assert np.abs(output.image - evaluated.image).max() > 0.01
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    assert np.all(np.isfinite(leaf)), path
    assert np.any(leaf != 0), path
  for old, new in zip(
    jax.tree.leaves(variables['batch_stats']),
    jax.tree.leaves(updated['batch_stats']),
    strict=True,
  ):
    assert new.dtype == jnp.float32
    assert np.any(old != new)


def test_frozen_statistics_normalise_and_stay_in_training():
  encoder, variables, images = _tiny(batch_statistics='frozen')
  output, updated, gradient = _train(batch_statistics='frozen')(
    variables, images, None
  )
  evaluated = jax.jit(encoder.apply)(variables, images)
  np.testing.assert_allclose(output.image, evaluated.image, rtol=1e-5)
  jax.tree.map(
    np.testing.assert_array_equal,
    updated['batch_stats'],
    variables['batch_stats'],
  )
  # What is learned of a norm is still trained.
  assert np.any(gradient['bn_stem']['scale'] != 0)


def test_stochastic_depth_drops_the_branches_that_the_draws_say():
  changes = dict(
    stage_sizes=(1, 1, 2, 1, 1, 1, 1),
    drop_path_rate=0.8,
    batch_statistics='frozen',
  )
  _, variables, images = _tiny(**changes)
  train = _train(**changes)
  whole, *_ = train(variables, images, None)
  # Block 3 of 8, the only one with a shortcut, is dropped at a rate of 0.3 and
  # otherwise scaled by 1 / 0.7; the second draw is for other encoders.
  uniforms = np.full((3, 8, 2), 0.5, np.float32)
  uniforms[1, 3, 0] = 0.2
  uniforms[2, 3, 1] = 0.2
  scaled = jax.tree.map(np.array, variables)
  for name in ('scale', 'bias'):
    scaled['params']['block_3']['project_bn'][name] /= 0.7
  expected, *_ = train(scaled, images, None)
  without = jax.tree.map(np.array, variables)
  for name in ('scale', 'bias'):
    without['params']['block_3']['project_bn'][name] *= 0
  dropped, *_ = train(without, images, None)
  found, *_ = train(variables, images, uniforms)
  np.testing.assert_allclose(
    found.image[1], dropped.image[1], rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(
    found.image[::2], expected.image[::2], rtol=1e-4, atol=1e-5
  )
  assert np.abs(whole.image - found.image).max(1).min() > 1e-4


def test_convolutions_start_as_published():
  encoder = efficientnet.make_efficientnet(variant='lite0')

  # What is not returned is not compiled.
  @jax.jit
  def init(rng):
    return encoder.init(rng, jnp.zeros((1, 32, 32, 3)))['params']['block_14']

  block = init(jax.random.key(0))
  # N(0, sqrt(2 / fan_out)); that of a depthwise kernel is its own 5 * 5.
  for name, deviation in (
    ('expand_conv', (2 / 1152) ** 0.5),
    ('depthwise_conv', (2 / 25) ** 0.5),
    ('project_conv', (2 / 192) ** 0.5),
  ):
    kernel = np.asarray(block[name]['kernel'])
    assert kernel.std() == pytest.approx(deviation, rel=0.02)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_outputs():
  encoder, variables, images = _tiny()
  low = encoder.clone(dtype=jnp.bfloat16)
  stages, output = jax.jit(
    lambda v, x: (low.apply(v, x, method='stages'), low.apply(v, x))
  )(variables, images)
  assert {x.dtype for x in stages} == {jnp.dtype('bfloat16')}
  assert output.image.dtype == output.tokens.dtype == jnp.float32
  high = jax.jit(encoder.apply)(variables, images)
  difference = np.abs(output.image - high.image).mean()
  assert 0 < difference < 0.05 * np.abs(high.image).mean()


@pytest.mark.parametrize(
  'kwargs, words',
  [
    (dict(variant='lite9'), ['variant', 'Mu, lite0, lite1, lite2']),
    (dict(tokens='stride8'), ['tokens', 'stride16, stride32']),
    (dict(batch_statistics='own'), ['synchronised, frozen']),
    (dict(input_normalisation='caffe'), ['tensorflow, imagenet']),
    (dict(dtype='int8'), ['dtype', 'float32, bfloat16']),
    (dict(remat='some'), ['remat', 'none, dots, narrow, full']),
    (dict(drop_path_rate=1.0), ['drop_path_rate', '1.0']),
    (dict(width_ratio=0.01), ['width_ratio', '0.01', '1/16']),
  ],
)
def test_wrong_arguments_are_explained(kwargs, words):
  with pytest.raises(errors.UserError) as caught:
    efficientnet.make_efficientnet(**kwargs)
  assert all(word in str(caught.value) for word in words)
