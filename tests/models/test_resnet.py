import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax import errors
from cmd_jax.models import resnet
from tests.tiny import normal


def _init(encoder, px=32):
  images = normal(3, px, px, 3)
  init = jax.jit(encoder.init)
  return jax.device_get(init(jax.random.key(1), images)), images


@pytest.fixture(scope='module')
def tiny():
  encoder = resnet.make_resnet(variant='Mu')
  return encoder, *_init(encoder)


# torchvision's counts for the same models without their classifiers.
@pytest.mark.parametrize(
  'variant, count',
  [
    ('18', 11_176_512),
    ('34', 21_284_672),
    ('50', 23_508_032),
    ('101', 42_500_160),
  ],
)
def test_presets_have_the_published_number_of_parameters(variant, count):
  encoder = resnet.make_resnet(variant=variant)
  images = jnp.zeros((1, 64, 64, 3))
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), images)
  assert sum(x.size for x in jax.tree.leaves(shapes['params'])) == count


@pytest.mark.parametrize(
  'variant, width_ratio, channels',
  [
    ('Mu', 1.0, (64, 16, 32, 64, 128)),
    ('18', 1.0, (64, 64, 128, 256, 512)),
    ('50', 0.5, (64, 128, 256, 512, 1024)),
  ],
)
def test_shapes(variant, width_ratio, channels):
  encoder = resnet.make_resnet(variant=variant, width_ratio=width_ratio)
  images = jnp.zeros((2, 64, 50, 3))
  variables = jax.eval_shape(encoder.init, jax.random.key(0), images)
  stages = jax.eval_shape(
    lambda variables: encoder.apply(variables, images, method='stages'),
    variables,
  )
  sides = [(16, 13), (16, 13), (8, 7), (4, 4), (2, 2)]
  expected = [(2, *s, c) for s, c in zip(sides, channels, strict=True)]
  assert [x.shape for x in stages] == expected
  output = jax.eval_shape(encoder.apply, variables, images)
  assert output.image.shape == (2, channels[-1])
  assert output.tokens.shape == (2, 4, channels[-1])
  assert output.attention is None
  assert encoder.depth == 0


def test_tokens_are_the_last_stage_row_by_row(tiny):
  encoder, variables, _ = tiny
  images = normal(3, 64, 96, 3, seed=2)
  last = jax.jit(lambda v: encoder.apply(v, images, method='stages'))(
    variables
  )[-1]
  assert last.shape == (3, 2, 3, 128)
  output = jax.jit(encoder.apply)(variables, images, jnp.zeros((3, 0, 2)))
  for row in range(2):
    for column in range(3):
      np.testing.assert_allclose(
        output.tokens[:, 3 * row + column], last[:, row, column], rtol=1e-5
      )
  mean = np.asarray(last).mean((1, 2))
  np.testing.assert_allclose(output.image, mean, rtol=1e-5, atol=1e-6)


def _windows(x, side, stride, fill=0.0):
  """[B, h, w, C, side, side] with half a window of padding on every side."""
  margin = (side // 2, side // 2)
  x = np.pad(x, ((0, 0), margin, margin, (0, 0)), constant_values=fill)
  windows = np.lib.stride_tricks.sliding_window_view(x, (side, side), (1, 2))
  return windows[:, ::stride, ::stride]


def _conv(params, x, stride=1):
  """Convolution as in torch, and fresh batch normalisation in 'eval' mode."""
  kernel = np.asarray(params['kernel'])
  windows = _windows(x, len(kernel), stride)
  y = np.einsum('bhwcij,ijco->bhwo', windows, kernel, optimize=True)
  return y / np.sqrt(1 + 1e-5)


def test_the_stem_is_padded_as_in_torch(tiny):
  encoder, variables, images = tiny
  stages = jax.jit(lambda v: encoder.apply(v, images, method='stages'))
  y = np.maximum(_conv(variables['params']['conv1'], images, 2), 0)
  expected = _windows(y, 3, 2, -np.inf).max((-1, -2))
  np.testing.assert_allclose(stages(variables)[0], expected, 1e-5, 1e-5)


@pytest.mark.parametrize('bottleneck', [False, True])
def test_a_block_is_its_formula(bottleneck):
  block = resnet.Block(
    channels=4,
    stride=2,
    bottleneck=bottleneck,
    downsample=True,
    dtype=jnp.float32,
    axis_name=None,
  )
  x = normal(2, 6, 6, 5)
  variables = jax.jit(lambda *args: block.init(*args, False))(
    jax.random.key(1), x
  )
  params = variables['params']
  strides = (1, 2, 1) if bottleneck else (2, 1)
  y = x
  for index, stride in enumerate(strides, 1):
    y = y if index == 1 else np.maximum(y, 0)
    y = _conv(params[f'conv{index}'], y, stride)
  expected = np.maximum(y + _conv(params['downsample_conv'], x, 2), 0)
  ours = jax.jit(lambda *args: block.apply(*args, False))(variables, x)
  assert ours.shape == (2, 3, 3, 16 if bottleneck else 4)
  np.testing.assert_allclose(ours, expected, 1e-5, 1e-5)


def test_convolutions_start_as_in_torchvision(tiny):
  _, variables, _ = tiny
  params = variables['params']
  # Its outputs are not as many as its inputs: fan_in would show.
  kernel = np.asarray(params['layer4_0']['conv1']['kernel'])
  assert kernel.shape == (3, 3, 64, 128)
  # 73728 draws: the standard error of the deviation is 0.3 % of it.
  assert kernel.std() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.015)
  # A truncated normal would stop at two deviations.
  assert np.abs(kernel).max() > 3 * kernel.std()
  for name in ('bn1', 'bn2', 'downsample_bn'):
    np.testing.assert_array_equal(params['layer4_0'][name]['scale'], 1)
    np.testing.assert_array_equal(params['layer4_0'][name]['bias'], 0)


def test_training_takes_batch_statistics_and_has_gradients(tiny):
  encoder, variables, images = tiny

  @jax.jit
  def train(params, batch_stats):
    def loss(params):
      output, updated = encoder.apply(
        {'params': params, 'batch_stats': batch_stats},
        images,
        train=True,
        mutable=['batch_stats'],
      )
      return jnp.square(output.tokens[:, 0] - 1).mean(), (output, updated)

    return jax.grad(loss, has_aux=True)(params)

  grads, (trained, updated) = jax.device_get(train(**variables))
  evaluated = jax.jit(encoder.apply)(variables, images)
  assert np.abs(trained.image - evaluated.image).max() > 0.1
  for path, gradient in jax.tree_util.tree_leaves_with_path(grads):
    assert np.all(np.isfinite(gradient)), path
    assert np.any(gradient != 0), path
  for old, new in zip(
    jax.tree.leaves(variables['batch_stats']),
    jax.tree.leaves(updated['batch_stats']),
    strict=True,
  ):
    assert new.dtype == jnp.float32
    assert np.any(old != new)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(tiny):
  _, variables, images = tiny
  encoder = resnet.make_resnet(variant='Mu', dtype='bfloat16')
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), images)
  assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype('float32')}

  @jax.jit
  def apply(variables, images):
    return encoder.apply(variables, images), encoder.apply(
      variables, images, method='stages'
    )

  low, stages = apply(variables, images)
  assert {x.dtype for x in stages} == {jnp.dtype('bfloat16')}
  assert low.image.dtype == low.tokens.dtype == jnp.float32
  high = jax.jit(tiny[0].apply)(variables, images)
  difference = np.abs(low.image - high.image).max()
  assert 0 < difference < 0.05 * np.abs(high.image).max()


@pytest.mark.parametrize(
  'kwargs, words',
  [
    (dict(variant='52'), ['variant', 'Mu, 18, 34, 50, 101']),
    (dict(dtype='int8'), ['dtype', 'float32, bfloat16']),
    (dict(width_ratio=0.01), ['width_ratio', '0.01', '1/64']),
  ],
)
def test_wrong_arguments_are_explained(kwargs, words):
  with pytest.raises(errors.UserError) as caught:
    resnet.make_resnet(**kwargs)
  assert all(word in str(caught.value) for word in words)
