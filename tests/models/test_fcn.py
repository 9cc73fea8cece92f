import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax import errors
from cmd_jax.models import fcn, make_encoder


def _maps(*shape, seed=0):
  return jnp.array(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
  'old, new', [(4, 8), (3, 7), (5, 5), (7, 3), (1, 4), (4, 1), (2, 2), (1, 1)]
)
def test_interpolation_is_linear_between_the_ends(old, new):
  values = np.random.default_rng(0).normal(size=old)
  places = np.linspace(0, old - 1, new) if new > 1 else [0.0]
  expected = np.interp(places, np.arange(old), values)
  ours = fcn.corner_aligned_matrix(old, new) @ values
  np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_resize_treats_rows_and_columns_alike():
  maps = _maps(2, 3, 4, 2)
  resized = fcn.resize_corner_aligned(maps, (6, 5))
  rows, columns = (
    fcn.corner_aligned_matrix(*sides) for sides in ((3, 6), (4, 5))
  )
  expected = np.einsum('ih,jw,bhwc->bijc', rows, columns, maps)
  np.testing.assert_allclose(resized, expected, rtol=1e-5, atol=1e-6)
  assert fcn.resize_corner_aligned(maps, (3, 4)) is maps


@pytest.mark.parametrize('variant', fcn.VARIANTS)
def test_logits_have_the_size_asked_for(variant):
  decoder = fcn.make_decoder(num_classes=3, variant=variant, channels=(8, 4, 2))
  maps = jax.ShapeDtypeStruct((2, 3, 4, 5), jnp.float16)
  for size, blocks in (
    ((24, 32), 3),
    ((112, 30), 3),
    ((23, 32), 2),
    ((12, 16), 2),
    ((6, 8), 1),
    ((2, 2), 1),
  ):
    logits, variables = jax.eval_shape(
      lambda maps, size=size: decoder.init_with_output(
        jax.random.key(0), maps, size
      ),
      maps,
    )
    assert logits.shape == (2, *size, 3)
    assert logits.dtype == jnp.float32
    names = {f'up_{index}' for index in range(blocks)}
    assert set(variables['params']) == names | {'classifier'}


def test_only_the_second_variant_sees_beyond_its_neighbours():
  # Two sides of a map that bilinear interpolation mixes with the next alone.
  maps = _maps(1, 4, 4, 3)
  changed = maps.at[0, 0, 0].add(1.0)
  reach = {}
  for variant in fcn.VARIANTS:
    decoder = fcn.make_decoder(num_classes=2, variant=variant, channels=(4,))

    @jax.jit
    def difference(one, other, decoder=decoder):
      variables = decoder.init(jax.random.key(0), one, (8, 8))
      return decoder.apply(variables, one, (8, 8)) - decoder.apply(
        variables, other, (8, 8)
      )

    seen = np.abs(difference(maps, changed)).max((0, 3)) > 1e-7
    reach[variant] = np.flatnonzero(seen.any(axis=1)).max()
  # Row i of eight lies at 3 i / 7: rows 0 to 2 touch the first of four; two
  # 3x3 convolutions carry it two rows on.
  assert reach == {'fcn': 2, 'fcn_dino': 4}


def test_a_resnet_segments_with_its_last_stride_at_one():
  images = jnp.zeros((1, 64, 48, 3))
  encoder = make_encoder('resnet', variant='Mu')
  finer = encoder.clone(last_stride=1)
  variables, again = (
    jax.eval_shape(e.init, jax.random.key(0), images) for e in (encoder, finer)
  )
  assert variables == again
  decoder = fcn.make_decoder(num_classes=3, channels=(8, 4, 2))
  for network, sides in ((encoder, (2, 2)), (finer, (4, 3))):
    stages = jax.eval_shape(
      lambda v, network=network: network.apply(v, images, method='stages'),
      variables,
    )
    assert stages[-1].shape == (1, *sides, 128)
    logits, _ = jax.eval_shape(
      lambda maps: decoder.init_with_output(jax.random.key(0), maps, (64, 48)),
      stages[-1],
    )
    assert logits.shape == (1, 64, 48, 3)


def test_training_has_gradients_and_updates_statistics():
  decoder = fcn.make_decoder(num_classes=3, channels=(8, 4))
  maps = _maps(4, 2, 2, 5)
  variables = jax.jit(decoder.init, static_argnums=2)(
    jax.random.key(0), maps, (8, 8)
  )

  @jax.jit
  def train(params, batch_stats):
    def loss(params):
      logits, updated = decoder.apply(
        {'params': params, 'batch_stats': batch_stats},
        maps,
        (8, 8),
        True,
        mutable=['batch_stats'],
      )
      return jax.nn.log_softmax(logits)[..., 0].mean(), updated

    return jax.grad(loss, has_aux=True)(params)

  grads, updated = train(**variables)
  for path, gradient in jax.tree_util.tree_leaves_with_path(grads):
    assert np.all(np.isfinite(gradient)), path
    # What a bias before a normalisation adds is taken off again.
    if 'conv_0' not in str(path) or 'bias' not in str(path):
      assert np.abs(gradient).max() > 1e-6, path
  for old, new in zip(
    jax.tree.leaves(variables['batch_stats']),
    jax.tree.leaves(updated['batch_stats']),
    strict=True,
  ):
    assert np.all(old != new)


@pytest.mark.parametrize(
  'kwargs, words',
  [
    (dict(num_classes=3, variant='unet'), ['unet', 'fcn, fcn_dino']),
    (dict(num_classes=1), ['1 class', 'background']),
  ],
)
def test_wrong_arguments_are_explained(kwargs, words):
  with pytest.raises(errors.UserError) as caught:
    fcn.make_decoder(**kwargs)
  assert all(word in str(caught.value) for word in words)
