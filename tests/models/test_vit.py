import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cmd_jax import errors
from cmd_jax.models import last_blocks, make_encoder, vit
from cmd_jax.models.positions import INTERPOLATIONS
from tests import tiny


def _tiny(**kwargs):
  return vit.make_vit(
    **dict(variant='Mu', depth=2, image_px=32, patch_px=8) | kwargs
  )


def _init(encoder, px=32, seed=0):
  images = tiny.normal(3, px, px, 3, seed=seed)
  shapes = jax.eval_shape(encoder.init, jax.random.key(1), images)
  return tiny.draw_like(shapes), images


# timm's counts for the same models without a classifier.
@pytest.mark.parametrize(
  'variant, count',
  [('Ti', 5_524_416), ('S', 21_665_664), ('B', 85_798_656)],
)
def test_presets_have_the_published_number_of_parameters(variant, count):
  encoder = vit.make_vit(variant=variant)
  shapes = jax.eval_shape(
    encoder.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3))
  )
  assert sum(x.size for x in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize('pool', vit.POOLS)
@pytest.mark.parametrize('px', [32, 24, 40])
def test_shapes_at_any_size(pool, px):
  encoder = _tiny(pool=pool)
  variables, _ = _init(encoder)
  output = jax.jit(encoder.apply)(variables, jnp.ones((3, px, px, 3)))
  count = (px // 8) ** 2
  assert output.image.shape == (3, 96)
  assert output.tokens.shape == (3, count, 96)
  assert output.attention.shape == (3, 3, count)
  if pool == 'mean':
    mean = np.asarray(output.tokens).mean(1)
    np.testing.assert_allclose(output.image, mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('num_registers', [0, 2])
def test_without_a_class_token_there_are_the_patches(num_registers):
  encoder = _tiny(class_token=False, pool='mean', num_registers=num_registers)
  variables, images = _init(encoder)
  assert 'cls_token' not in variables['params']
  assert variables['params']['pos_embed'].shape == (1, 16, 96)
  output, keys = jax.jit(
    lambda *arrays: vit.encode_with_keys(encoder, *arrays)
  )(variables, images)
  assert output.tokens.shape == (3, 16, 96)
  assert keys.shape == (3, 16, 3, 32)
  mean = np.asarray(output.tokens).mean(1)
  np.testing.assert_allclose(output.image, mean, rtol=1e-5, atol=1e-6)
  # What all tokens of an image receive adds up to 1.
  total = np.asarray(output.attention).sum(-1)
  assert output.attention.shape == (3, 3, 16)
  if num_registers:
    assert (total < 1).all()
  else:
    np.testing.assert_allclose(total, 1, rtol=1e-5)
  last = jax.jit(lambda *arrays: last_blocks.last_blocks(encoder, *arrays, 1))(
    variables, images
  )
  np.testing.assert_allclose(last, output.image, rtol=0, atol=1e-5)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
  encoder = _tiny(dtype='bfloat16')
  variables, images = _init(encoder)
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  low = jax.jit(encoder.apply)(variables, images)
  high = jax.jit(_tiny().apply)(variables, images)
  assert low.image.dtype == jnp.float32
  difference = np.abs(low.image - high.image).max()
  assert 0 < difference < 0.1


def _naive_bicubic(square, out, scale):
  """torch's formula, sample by sample: A = -0.75, clamped borders."""

  def cubic(x):
    x = abs(x)
    if x <= 1:
      return 1.25 * x**3 - 2.25 * x**2 + 1
    if x < 2:
      return -0.75 * x**3 + 3.75 * x**2 - 6 * x + 3
    return 0.0

  old = len(square)
  result = np.zeros((out, out, square.shape[2]))
  for y in range(out):
    for x in range(out):
      cy, cx = (y + 0.5) / scale - 0.5, (x + 0.5) / scale - 0.5
      for j in range(int(np.floor(cy)) - 1, int(np.floor(cy)) + 3):
        for i in range(int(np.floor(cx)) - 1, int(np.floor(cx)) + 3):
          sample = square[np.clip(j, 0, old - 1), np.clip(i, 0, old - 1)]
          result[y, x] += cubic(cy - j) * cubic(cx - i) * sample
  return result


_interpolate = jax.jit(vit.interpolate_positions, static_argnums=(1, 2))


@pytest.mark.parametrize('grid', [3, 5, 8])
def test_positions_are_interpolated_as_in_torch(grid):
  positions = np.random.default_rng(0).normal(size=(1, 25, 4))
  ours = _interpolate(jnp.array(positions), (grid, grid))
  expected = _naive_bicubic(positions.reshape(5, 5, 4), grid, grid / 5)
  np.testing.assert_allclose(
    ours, expected.reshape(1, grid * grid, 4), rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize('grid', [(3, 3), (5, 5), (8, 8), (2, 7)])
def test_positions_are_interpolated_with_antialiasing(grid):
  # Pillow resizes floats by the same kernel as torch with antialias=True.
  positions = np.random.default_rng(0).normal(size=(6, 6, 3))
  flat = jnp.array(positions.reshape(1, 36, 3))
  ours = _interpolate(flat, grid, 'antialias')
  channels = [
    Image.fromarray(positions[..., i].astype(np.float32)).resize(
      grid[::-1], Image.Resampling.BICUBIC
    )
    for i in range(3)
  ]
  np.testing.assert_allclose(
    np.asarray(ours).reshape(*grid, 3),
    np.stack([np.asarray(x) for x in channels], -1),
    atol=2e-6,
  )


@pytest.mark.parametrize('grid', [3, 8])
def test_positions_are_interpolated_with_an_offset(grid):
  positions = np.random.default_rng(0).normal(size=(1, 25, 4))
  ours = _interpolate(jnp.array(positions), (grid,) * 2, 'dinov2')
  square = positions.reshape(5, 5, 4)
  expected = _naive_bicubic(square, grid, (grid + 0.1) / 5)
  np.testing.assert_allclose(
    ours, expected.reshape(1, grid * grid, 4), rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize('interpolation', INTERPOLATIONS)
def test_positions_of_the_same_grid_are_untouched(interpolation):
  same = jnp.arange(32.0).reshape(1, 16, 2)
  assert vit.interpolate_positions(same, (4, 4), interpolation) is same


def test_drop_path_keeps_the_expectation():
  x = np.ones((20_000, 1, 1), np.float32)
  uniforms = np.random.default_rng(0).random(20_000, np.float32)
  dropped = np.asarray(jax.jit(vit.drop_path)(x, 0.3, uniforms))
  assert set(np.unique(dropped)) <= {0.0, np.float32(1 / 0.7)}
  # The standard error of the mean is 0.0046.
  assert abs(float(dropped.mean()) - 1) < 0.02


def test_a_dropped_block_is_as_if_it_were_not_there():
  encoder = _tiny(drop_path_rate=0.9)
  variables, images = _init(encoder)
  # The rate rises from 0 in the first block to 0.9 in the last.
  dropped = jax.jit(encoder.apply)(
    variables, images, np.zeros((3, 2, 2), np.float32)
  )
  shorter = jax.jit(_tiny(depth=1).apply)(
    {
      'params': {
        name: value
        for name, value in variables['params'].items()
        if name != 'block_1'
      }
    },
    images,
  )
  np.testing.assert_allclose(dropped.image, shorter.image, rtol=1e-5, atol=1e-6)


def test_without_uniforms_nothing_is_dropped():
  variables, images = _init(_tiny())
  with_rate, without = (
    jax.jit(_tiny(drop_path_rate=rate).apply)(variables, images)
    for rate in (0.5, 0.0)
  )
  np.testing.assert_array_equal(with_rate.image, without.image)


@pytest.mark.parametrize(
  'kwargs, words',
  [
    (dict(variant='XL'), ['variant', 'Mu, Ti, S, B, L']),
    (dict(pool='max'), ['pool', 'cls, mean']),
    (dict(dtype='int8'), ['dtype', 'float32, bfloat16']),
    (dict(width=100, num_heads=3), ['100', 'num_heads 3']),
    (dict(drop_path_rate=1.0), ['drop_path_rate', '1.0']),
    (dict(image_px=50, patch_px=16), ['50', 'patch_px 16']),
    (dict(class_token=False), ["pool is 'cls'", 'class_token']),
    (dict(gelu='fast'), ["gelu is 'fast'", 'exact, tanh']),
  ],
)
def test_wrong_arguments_are_explained(kwargs, words):
  with pytest.raises(errors.UserError) as caught:
    vit.make_vit(**kwargs)
  assert all(word in str(caught.value) for word in words)


def test_unknown_encoder_lists_those_there_are():
  with pytest.raises(errors.UserError, match='vit'):
    make_encoder('resnet9000')
