import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.data.canvas import Canvases
from cmd_jax.errors import UserError
from cmd_jax.models import make_encoder
from cmd_jax.parts import cosegment, discover, features, store
from tests import tiny

_PX, _CELLS = 24, 6
# A head and a body on a background, as colours.
_HEAD, _BODY, _GROUND = (250, 20, 20), (20, 250, 20), (30, 30, 60)
_COSEGMENT = cosegment.Cosegmentation(
  num_parts=2, num_clusters=3, num_sampled=200
)
_HYPERCOLUMN = discover.Hypercolumn(num_parts=3, grid_px=6, num_layers=1)


def _canvases(count=5):
  """Images, [N, R, R] truth: 0 ground, 1 head, 2 body."""
  rng = np.random.default_rng(0)
  truth = np.zeros((count, _CELLS, _CELLS), int)
  for mask in truth:
    top, left = rng.integers(0, 3, 2)
    mask[top : top + 2, left : left + 2] = 1
    mask[top + 2 : top + 4, left : left + 4] = 2
  colours = np.array([_GROUND, _HEAD, _BODY])
  truth = truth.repeat(4, 1).repeat(4, 2)
  images = colours[truth] + rng.integers(-5, 6, (count, _PX, _PX, 3))
  canvases = Canvases(
    name='boxes',
    images=images.astype(np.uint8),
    sizes=np.full((count, 2), _PX, np.int32),
    labels=np.zeros(count, np.int32),
    file_names=tuple(f'{i}.png' for i in range(count)),
    class_names=('box',),
    part_ids=None,
    boxes=None,
    skipped=(),
  )
  return canvases, truth


def _cells(images):
  x = jnp.asarray(images, jnp.float32) / 255
  return x.reshape(len(x), _CELLS, 4, _CELLS, 4, 3).mean((2, 4))


def _encode_keys(images, sizes):
  del sizes
  keys = _cells(images)
  centres = (jnp.arange(_CELLS) + 0.5) / _CELLS
  saliency = (keys[..., :2].max(-1) > 0.5).astype(jnp.float32)
  return features.KeyMaps(keys, saliency, centres, centres)


def _encode_maps(images, sizes):
  del sizes
  return (_cells(images),)


def _discover(encode, settings, seed=0, **options):
  canvases, _ = _canvases()
  return discover.discover(
    encode,
    canvases,
    settings=settings,
    seed=seed,
    **dict(batch_size=3) | options,
  )


def test_parts_mean_the_same_in_all_images():
  _, truth = _canvases()
  masks = _discover(_encode_keys, _COSEGMENT)
  assert masks.dtype == np.uint8
  pairs = set(zip(truth.ravel().tolist(), masks.ravel().tolist()))
  assert len(pairs) == 3
  assert (0, 0) in pairs


def test_hypercolumns_are_clustered_image_by_image():
  _, truth = _canvases()
  masks = _discover(_encode_maps, _HYPERCOLUMN)
  for mask, own in zip(masks, truth):
    assert len(set(zip(own.ravel().tolist(), mask.ravel().tolist()))) == 3


@pytest.mark.parametrize(
  'encode, settings',
  [(_encode_keys, _COSEGMENT), (_encode_maps, _HYPERCOLUMN)],
)
def test_an_interrupted_run_goes_on_and_gives_the_same(
  tmp_path, encode, settings
):
  canvases, _ = _canvases()
  manifest = store.make_manifest(
    {},
    canvases.file_names,
    settings=discover.as_json(settings),
    seed=0,
    mask_px=_PX,
  )
  expected = _discover(encode, settings)
  calls = []

  def interrupted(images, sizes):
    calls.append(len(images))
    if len(calls) == 2:
      raise KeyboardInterrupt
    return encode(images, sizes)

  options = dict(folder=tmp_path / 'chunks', manifest=manifest)
  with pytest.raises(KeyboardInterrupt):
    _discover(interrupted, settings, **options)
  masks = _discover(interrupted, settings, **options)
  assert calls == [3, 3, 3]
  np.testing.assert_array_equal(masks, expected)


def test_the_batch_makes_no_difference():
  for encode, settings in (
    (_encode_keys, _COSEGMENT),
    (_encode_maps, _HYPERCOLUMN),
  ):
    np.testing.assert_array_equal(
      _discover(encode, settings), _discover(encode, settings, batch_size=5)
    )


def test_the_elbow_stops_where_another_cluster_gains_little():
  rng = np.random.default_rng(0)
  corners = np.eye(3)[np.arange(300) % 3]
  sample = (corners + 0.01 * rng.normal(size=(300, 3))).astype(np.float32)
  # 3 clusters leave the noise alone, of which a fourth takes a few per cent.
  settings = cosegment.Cosegmentation(max_clusters=6, elbow=0.6)
  assert len(cosegment.find_clusters(sample, settings, 0)) == 4


def test_votes():
  labels = np.array([[[0, 1], [1, 2]], [[0, 0], [1, 1]], [[0, 2], [2, 2]]])
  saliency = np.where(labels == 1, 0.5, np.where(labels == 2, 0.3, 0.0))
  settings = cosegment.Cosegmentation(votes=0.6, saliency=0.2)
  np.testing.assert_array_equal(
    cosegment.vote(labels, saliency, 4, settings), [False, True, True, False]
  )
  # Nobody has all votes: the one with most, of those the more salient.
  np.testing.assert_array_equal(
    cosegment.vote(labels, saliency, 4, settings._replace(votes=1.0)),
    [False, True, False, False],
  )


def test_pixels_take_the_nearest_sample():
  labels = np.array([[[1, 2], [3, 4]]])
  rows, columns = np.array([0.2, 0.4]), np.array([0.25, 0.75])
  masks = discover.resize_nearest(labels, rows, columns, 4)
  np.testing.assert_array_equal(masks[0, :, 0], [1, 3, 3, 3])
  np.testing.assert_array_equal(masks[0, 0], [1, 1, 2, 2])


def test_features_that_are_not_finite_are_refused():
  def broken(images, sizes):
    return tuple(x * jnp.nan for x in _encode_maps(images, sizes))

  with pytest.raises(UserError, match='not finite'):
    _discover(broken, _HYPERCOLUMN)


@pytest.mark.parametrize(
  'settings, word',
  [
    (_HYPERCOLUMN._replace(num_parts=257), 'most 256'),
    (_COSEGMENT._replace(num_parts=256), 'most 255'),
    (_COSEGMENT._replace(stride_px=0), 'stride_px'),
    (_COSEGMENT._replace(num_parts=150), 'fewer'),
  ],
)
def test_settings_that_cannot_be_are_refused(settings, word):
  with pytest.raises(UserError, match=word):
    _discover(_encode_keys, settings)


def test_real_encoders_give_what_is_needed():
  images = tiny.normal(2, 20, 16, 3)
  encoder = make_encoder(
    'vit', variant='Mu', depth=1, image_px=16, patch_px=8, num_registers=2
  )
  variables = tiny.draw_like(
    jax.eval_shape(encoder.init, jax.random.key(1), images[:, :16])
  )
  maps = jax.jit(lambda v, x: features.key_maps(encoder, v, x, stride_px=4))(
    variables, images
  )
  assert maps.keys.shape == (2, 4, 3, 96)
  np.testing.assert_allclose(maps.rows, np.array([4, 8, 12, 16]) / 20)
  np.testing.assert_allclose(maps.saliency.min((1, 2)), 0)
  np.testing.assert_allclose(maps.saliency.max((1, 2)), 1)
  for options, word in (
    (dict(stride_px=9), 'stride'),
    (dict(stride_px=4, saliency_heads=(0, 3)), '0 to 2'),
  ):
    with pytest.raises(UserError, match=word):
      features.key_maps(encoder, variables, images, **options)
  with pytest.raises(UserError, match='smaller than a patch'):
    features.key_maps(encoder, variables, images[:, :7], stride_px=4)
  with pytest.raises(UserError, match='hypercolumns need'):
    features.hypercolumn_maps(encoder, variables, images)
  resnet = make_encoder('resnet', variant='Mu', width_ratio=0.25)
  with pytest.raises(UserError, match='keys need'):
    features.key_maps(resnet, {}, images, stride_px=4)
  shapes = jax.eval_shape(
    lambda: features.hypercolumn_maps(
      resnet, resnet.init(jax.random.key(0), images), images
    )
  )
  assert [x.shape[1:] for x in shapes] == [
    (1, 1, 32),
    (2, 1, 16),
    (3, 2, 8),
    (5, 4, 4),
  ]


def test_the_maps_of_an_efficientnet_are_a_hypercolumn():
  images = np.zeros((2, 40, 24, 3), np.float32)
  encoder = make_encoder('efficientnet', variant='Mu', width_ratio=0.5)

  def maps(num_layers):
    variables = encoder.init(jax.random.key(0), images)
    return features.hypercolumn_maps(encoder, variables, images, num_layers)

  shapes = jax.eval_shape(lambda: maps(5))
  assert [x.shape[1:] for x in shapes] == [
    (2, 1, 1280),
    # Half of the widths of the fifth, third, second and first stage.
    (3, 2, 16),
    (5, 3, 8),
    (10, 6, 6),
    (20, 12, 4),
  ]
  assert [x.shape for x in jax.eval_shape(lambda: maps(4))] == [
    x.shape for x in shapes[:4]
  ]
