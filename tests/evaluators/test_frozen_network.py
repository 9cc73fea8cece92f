import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.data.augment.multi_crop import make_eval_view
from cmd_jax.devices import sharding
from cmd_jax.evaluators import FrozenNetwork, frozen_network
from cmd_jax.models import heads
from cmd_jax.models.last_blocks import last_blocks
from cmd_jax.models.pooling import generalised_mean
from tests import scored_runs, tiny
from tests.scored_runs import PX

SPLIT = scored_runs.make_canvases('test', 13, 0)


def _draw(module, *args):
  return tiny.draw_like(jax.eval_shape(module.init, jax.random.key(0), *args))


def _make(name='vit', *, mil=False, crop_fraction=None):
  encoder = tiny.make_tiny_encoder(name)
  variables = _draw(encoder, jnp.zeros((1, PX, PX, 3)))
  fields = {}
  if mil:
    head = heads.MilAttention(8, dtype=jnp.float32)
    params = _draw(head, jnp.zeros((1, 16, 16)))['params']
    fields = dict(mil=head, mil_params=params)
  network = FrozenNetwork(
    encoder,
    variables,
    view_px=PX,
    crop_fraction=crop_fraction,
    batch_size=5,
    mesh=sharding.make_mesh(2),
    **fields,
  )
  return network, variables


def _views(crop_fraction=None):
  view = make_eval_view(view_px=PX, crop_fraction=crop_fraction)
  return jax.jit(view)(SPLIT.images, SPLIT.sizes)


def test_vectors_maps_and_attention_are_those_of_the_encoder():
  network, variables = _make(mil=True, crop_fraction=0.5)
  assert network.batch_size == 6
  apply = jax.jit(network.encoder.apply)
  central, whole = (
    jax.device_get(apply(variables, _views(fraction)))
    for fraction in (0.5, None)
  )
  apply_mil = jax.jit(network.mil.apply)
  close = dict(atol=1e-5)
  features = network.embeddings(SPLIT)
  np.testing.assert_allclose(features.vectors, central.image, **close)
  np.testing.assert_array_equal(features.labels, SPLIT.labels)
  assert features.file_names == SPLIT.file_names
  assert features.class_names == SPLIT.class_names
  np.testing.assert_allclose(
    network.last_blocks(SPLIT).vectors,
    jax.jit(lambda *arrays: last_blocks(network.encoder, *arrays))(
      variables, _views(0.5)
    ),
    **close,
  )
  # Masks and boxes are of whole images, and so is what is compared with them.
  maps = network.feature_maps(SPLIT)
  assert maps.shape == (13, 4, 4, 16) and maps.dtype == np.float16
  np.testing.assert_allclose(
    maps.reshape(13, 16, 16), whole.tokens, rtol=2e-3, atol=1e-3
  )
  attention = network.attention(SPLIT)
  np.testing.assert_allclose(
    attention['encoder'], whole.attention.mean(1), **close
  )
  mil = apply_mil(network.mil_variables, whole.tokens)
  np.testing.assert_allclose(attention['mil'], mil, **close)
  outputs = network.encode(SPLIT.images[:6], SPLIT.sizes[:6])
  np.testing.assert_allclose(outputs.tokens, central.tokens[:6], **close)
  mil = np.asarray(apply_mil(network.mil_variables, central.tokens))
  np.testing.assert_allclose(outputs.attention, mil[:6], **close)
  np.testing.assert_allclose(
    network.attend(SPLIT.images[:3], SPLIT.sizes[:3]), mil[:3], **close
  )


def test_maps_have_a_size_and_a_facet_of_their_own():
  network, variables = _make()
  maps = network.feature_maps(SPLIT, view_px=8, facet='key')
  assert maps.shape == (13, 2, 2, 16)
  assert network.feature_maps(SPLIT, facet='key').shape == (13, 4, 4, 16)
  tokens = network.feature_maps(SPLIT, view_px=8)
  assert np.abs(tokens - maps).max() > 0.01


def test_attention_that_learns_nothing_needs_no_parameters():
  encoder = tiny.make_tiny_encoder('resnet')
  variables = _draw(encoder, jnp.zeros((1, PX, PX, 3)))
  network = FrozenNetwork(
    encoder,
    variables,
    view_px=PX,
    crop_fraction=None,
    batch_size=5,
    mil=heads.StrengthAttention(),
    mesh=sharding.make_mesh(2),
  )
  outputs = network.encode(SPLIT.images[:4], SPLIT.sizes[:4])
  squares = np.square(outputs.tokens).sum(-1)
  for attention in (outputs.attention, network.attention(SPLIT)['mil'][:4]):
    np.testing.assert_allclose(
      attention, squares / squares.sum(-1, keepdims=True), rtol=1e-4
    )
  assert network.attention_name == "the length of each patch's features"


def test_a_network_without_attention_looks_at_long_features():
  network, variables = _make('resnet')
  assert network.attention(SPLIT) == {}
  assert network.mil_variables is None
  outputs = network.encode(SPLIT.images[:4], SPLIT.sizes[:4])
  assert outputs.attention is None
  np.testing.assert_allclose(
    network.attend(SPLIT.images[:4], SPLIT.sizes[:4]),
    np.linalg.norm(outputs.tokens, axis=-1),
    rtol=1e-4,
  )


@pytest.mark.parametrize('what', ['embeddings', 'feature_maps', 'attention'])
def test_what_is_asked_for_again_is_remembered(monkeypatch, what):
  network, _ = _make()
  calls = []

  def extract(encode, images, sizes, **options):
    calls.append(len(images))
    return np.zeros((len(images), 3))

  monkeypatch.setattr(frozen_network, 'extract', extract)
  again = SPLIT._replace(images=SPLIT.images[:5])
  for split in (SPLIT, again, SPLIT, again):
    getattr(network, what)(split)
  assert calls == [13, 5]


def test_vectors_are_kept_beyond_the_network(tmp_path, monkeypatch):
  want = {}
  for attempt in range(2):
    network, _ = _make()
    network.keep_features(tmp_path, 'of the data')
    for name in ('embeddings', 'last_blocks'):
      vectors = getattr(network, name)(SPLIT).vectors
      np.testing.assert_array_equal(vectors, want.setdefault(name, vectors))
    if attempt == 0:
      monkeypatch.setattr(frozen_network, 'extract', None)
  assert len(list(tmp_path.iterdir())) == 2
  network.keep_features(tmp_path, 'of other data')
  with pytest.raises(TypeError):
    _ = network.embeddings(SPLIT._replace(name='birds/train'))


def test_other_views_are_pooled_another_way():
  network, variables = _make('efficientnet', crop_fraction=0.5)
  view = make_eval_view(view_px=40, crop_fraction=0.5)
  maps = jax.jit(lambda v, x: network.encoder.apply(v, x, method='stages')[-1])(
    variables, view(SPLIT.images, SPLIT.sizes)
  )
  found = network.embeddings(SPLIT, view_px=40, pooling='gem')
  assert maps.shape[1:3] == (2, 2)
  np.testing.assert_allclose(
    found.vectors, generalised_mean(maps), rtol=1e-4, atol=1e-5
  )
  np.testing.assert_array_equal(found.labels, SPLIT.labels)
  # What is scored otherwise is as it was, whatever was asked for before.
  usual = network.embeddings(SPLIT)
  fresh = _make('efficientnet', crop_fraction=0.5)[0].embeddings(SPLIT)
  np.testing.assert_array_equal(usual.vectors, fresh.vectors)
  assert network.embeddings(SPLIT, view_px=PX) is usual
  larger = network.embeddings(SPLIT, view_px=40)
  np.testing.assert_allclose(larger.vectors, maps.mean((1, 2)), atol=1e-5)
