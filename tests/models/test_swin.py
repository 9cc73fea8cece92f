import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax import errors
from cmd_jax.models import swin, windows
from tests import tiny


def _tiny(**kwargs):
  return swin.make_swin(**dict(variant='Mu', image_px=32, window=4) | kwargs)


def _init(encoder, px=32):
  images = tiny.normal(2, px, px, 3)
  shapes = jax.eval_shape(encoder.init, jax.random.key(1), images)
  return tiny.draw_like(shapes), images


# timm's counts for the same models without a classifier.
@pytest.mark.parametrize(
  'variant, count',
  [('T', 27_519_354), ('S', 48_837_258), ('B', 86_743_224)],
)
def test_presets_have_the_published_number_of_parameters(variant, count):
  encoder = swin.make_swin(variant=variant)
  shapes = jax.eval_shape(
    encoder.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3))
  )
  assert sum(x.size for x in jax.tree.leaves(shapes)) == count
  assert encoder.depth == sum(encoder.depths)


# 33 is not divisible by the patch, 24 and 40 pixels not by the windows, 20
# pixels are an odd number of patches.
@pytest.mark.parametrize(
  'size, grid',
  [((32, 32), (4, 4)), ((33, 24), (4, 3)), ((20, 40), (3, 5))],
)
def test_shapes_at_any_size(size, grid):
  encoder = _tiny()
  variables, _ = _init(encoder)
  images = tiny.normal(2, *size, 3, seed=2)
  output = jax.jit(encoder.apply)(variables, images)
  count = grid[0] * grid[1]
  assert output.tokens.shape == (2, count, 64)
  assert output.attention.shape == (2, 4, count)
  np.testing.assert_allclose(
    output.image, output.tokens.mean(1), rtol=1e-5, atol=1e-6
  )
  np.testing.assert_allclose(output.attention.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize(
  'window, expected',
  [
    (7, [(7, 3), (7, 3), (7, 3), (7, 0)]),
    (14, [(14, 7), (14, 7), (14, 0), (7, 0)]),
    (100, [(56, 0), (28, 0), (14, 0), (7, 0)]),
  ],
)
def test_windows_are_clipped_at_the_resolution_of_the_build(window, expected):
  encoder = swin.make_swin(window=window)
  assert [encoder.window_and_shift(i, 1) for i in range(4)] == expected
  assert all(encoder.window_and_shift(i, 0)[1] == 0 for i in range(4))


def _softmax(x):
  exp = np.exp(x - x.max())
  return exp / exp.sum()


def _naive_attention(x, params, num_heads, window, shift):
  """Outputs [H, W, D] and weights {query: {key: [heads]}}, pair by pair.

  Positions keep their place on the padded map; the shift only decides who
  shares a window, and the border of the map who sees whom in it.
  """
  rows, columns, dim = x.shape
  height, width = (int(np.ceil(n / window)) * window for n in (rows, columns))
  padded = np.zeros((height, width, dim))
  padded[:rows, :columns] = x
  qkv = padded @ params['qkv']['kernel'] + params['qkv']['bias']
  qkv = qkv.reshape(height, width, 3, num_heads, -1)
  table = params['relative_position_bias_table']
  places = [(y, x) for y in range(height) for x in range(width)]
  result = np.zeros((height, width, dim))
  weights = {}
  for qy, qx in places:
    py, px = (qy - shift) % height, (qx - shift) % width
    keys, logits = [], []
    for ky, kx in places:
      oy, ox = (ky - shift) % height, (kx - shift) % width
      if (py // window, px // window) != (oy // window, ox // window):
        continue
      row = (py - oy + window - 1) * (2 * window - 1) + px - ox + window - 1
      products = (qkv[qy, qx, 0] * qkv[ky, kx, 1]).sum(-1)
      is_apart = (qy < shift) != (ky < shift) or (qx < shift) != (kx < shift)
      keys.append((ky, kx))
      logits.append(
        products / (dim // num_heads) ** 0.5 + table[row] - 100 * is_apart
      )
    shares = [_softmax(head) for head in np.transpose(logits)]
    weights[qy, qx] = dict(zip(keys, np.transpose(shares), strict=True))
    result[qy, qx] = sum(
      (share[:, None] * qkv[key][2]).reshape(-1)
      for key, share in weights[qy, qx].items()
    )
  result = result @ params['proj']['kernel'] + params['proj']['bias']
  return result[:rows, :columns], weights


@pytest.mark.parametrize('shift', [0, 1])
@pytest.mark.parametrize('grid', [(6, 6), (4, 5)])
def test_window_attention_agrees_with_its_definition(shift, grid):
  rows, columns = grid
  module = swin.WindowAttention(2, 3, shift, jnp.float32)
  x = tiny.normal(2, rows, columns, 8)
  # Biases are 0 at first: padding would make no difference.
  shapes = jax.eval_shape(module.init, jax.random.key(1), x)['params']
  params = tiny.draw_like(shapes, scale=0.5)
  with jax.default_matmul_precision('highest'):

    @jax.jit
    def attend(params, x):
      ours, weights = module.apply({'params': params}, x)
      return ours, windows.received_attention(weights, rows, columns, shift)

    ours, received = jax.device_get(attend(params, x))
  for example in range(2):
    expected, given = _naive_attention(
      np.asarray(x[example], np.float64),
      jax.tree.map(lambda p: np.asarray(p, np.float64), params),
      2,
      3,
      shift,
    )
    np.testing.assert_allclose(ours[example], expected, rtol=1e-4, atol=1e-5)
    shares = []
    for key in np.ndindex(rows, columns):
      queries = [given[query] for query in np.ndindex(rows, columns)]
      shares.append(np.mean([g[key] for g in queries if key in g], axis=0))
    shares = np.transpose(shares) / np.sum(shares, 0)[:, None]
    np.testing.assert_allclose(received[example], shares, rtol=1e-4, atol=1e-6)


def test_merging_keeps_the_released_order_of_channels():
  x = jnp.array([[[1.0, 3.0, 5.0], [2.0, 4.0, 6.0]]])[..., None]
  module = swin.PatchMerging(1e-6, jnp.float32)
  _, state = jax.jit(
    lambda x: module.init_with_output(
      jax.random.key(0),
      x,
      capture_intermediates=lambda module, _: module.name == 'norm',
    )
  )(x)
  (normed,) = state['intermediates']['norm']['__call__']
  joined = np.array([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 0.0, 0.0]])
  expected = joined - joined.mean(-1, keepdims=True)
  expected /= joined.std(-1, keepdims=True)
  np.testing.assert_allclose(normed[0, 0], expected, rtol=1e-4)


def test_initialisation_is_the_released_one():
  images = jnp.zeros((1, 32, 32, 3))
  variables = jax.jit(_tiny(width=64).init)(jax.random.key(1), images)
  params = variables['params']
  attention = params['stage_1_block_0']['attn']
  for weights in (
    attention['qkv']['kernel'],
    attention['relative_position_bias_table'],
    params['stage_1_merge']['reduction']['kernel'],
  ):
    assert abs(float(weights.std()) - 0.02) < 0.003
  assert not attention['qkv']['bias'].any()
  for weights in params['patch_embed'].values():
    bound = 48**-0.5
    assert 0.9 * bound < float(jnp.abs(weights).max()) <= bound


def test_branches_are_dropped_one_by_one_at_rising_rates():
  encoder = _tiny(drop_path_rate=0.9)
  variables, images = _init(encoder)
  uniforms = np.full((2, 4, 2), 0.999, np.float32)
  uniforms[:, 3, 0] = 0
  dropped = jax.jit(encoder.apply)(variables, images, uniforms)
  params = jax.tree.map(lambda p: p, variables['params'])
  names = [f'stage_{i}_block_{j}' for i in range(2) for j in range(2)]
  for name, rate in zip(names, (0, 0.3, 0.6, 0.9), strict=True):
    kept = 1 / (1 - rate)
    for layer, factor in (
      (params[name]['attn']['proj'], 0 if name == names[3] else kept),
      (params[name]['mlp']['fc2'], kept),
    ):
      layer.update({key: factor * value for key, value in layer.items()})
  expected = jax.jit(encoder.apply)({'params': params}, images)
  np.testing.assert_allclose(
    dropped.image, expected.image, rtol=1e-4, atol=1e-5
  )


def test_without_uniforms_nothing_is_dropped():
  variables, images = _init(_tiny())
  outputs = [
    jax.jit(_tiny(drop_path_rate=rate).apply)(variables, images).image
    for rate in (0.5, 0.0)
  ]
  np.testing.assert_array_equal(*outputs)


def test_gradient_is_finite_and_reaches_every_bias_table():
  encoder = _tiny()
  variables, _ = _init(encoder)
  images = tiny.normal(2, 24, 24, 3, seed=2)
  uniforms = np.random.default_rng(3).uniform(0.2, 1, (2, 4, 2))

  @jax.jit
  @jax.grad
  def gradient(variables):
    output = encoder.apply(variables, images, uniforms, train=True)
    return jnp.sum(output.tokens**3) + jnp.sum(output.attention**2)

  for path, value in jax.tree.leaves_with_path(gradient(variables)):
    assert np.isfinite(value).all()
    if 'table' in jax.tree_util.keystr(path):
      assert value.any()


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
  encoder = _tiny(dtype='bfloat16')
  variables, images = _init(encoder, px=24)
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype('float32')}

  @jax.jit
  def encode(variables, images):
    return encoder.apply(
      variables,
      images,
      capture_intermediates=lambda module, _: isinstance(module, swin.Block),
    )

  low, state = encode(variables, images)
  for block in state['intermediates'].values():
    ((features, weights),) = block['__call__']
    assert features.dtype == jnp.bfloat16
    assert weights.dtype == jnp.float32
  high = jax.jit(_tiny().apply)(variables, images)
  assert {x.dtype for x in low} == {jnp.dtype('float32')}
  difference = np.abs(low.tokens - high.tokens).max()
  assert 0 < difference < 0.1


def test_an_empty_override_leaves_the_preset():
  encoder = swin.make_swin(variant='S', depths=(), num_heads=None)
  assert encoder.depths == (2, 2, 18, 2)
  assert encoder.num_heads == (3, 6, 12, 24)


@pytest.mark.parametrize(
  'kwargs, words',
  [
    (dict(variant='XL'), ['variant', 'Mu, T, S, B']),
    (dict(dtype='int8'), ['dtype', 'float32, bfloat16']),
    (dict(depths=(2, 2)), ['depths (2, 2)', 'num_heads (3, 6, 12, 24)']),
    (dict(depths=(2, 0, 6, 2)), ['depths', '0', 'at least 1']),
    (dict(window=0), ['window', '0']),
    (dict(patch_px=0), ['patch_px', '0']),
    (dict(num_heads=(3, 6, 12, 25)), ['width', '768', 'stage 3', '25 heads']),
    (dict(drop_path_rate=1.0), ['drop_path_rate', '1.0']),
    (dict(image_px=50), ['50', 'patch_px 4']),
    (dict(image_px=16), ['image_px is 16', '4 stages', '32']),
  ],
)
def test_wrong_arguments_are_explained(kwargs, words):
  with pytest.raises(errors.UserError) as caught:
    swin.make_swin(**kwargs)
  assert all(word in str(caught.value) for word in words)
