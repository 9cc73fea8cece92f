"""ViT encoder and heads against the released vision_transformer.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cmd_jax.methods import networks
from cmd_jax.methods.base import Setting
from cmd_jax.models import heads, vit
from cmd_jax.models.positions import interpolate_positions
from tests.parity import golden, small


def _close(ours, theirs):
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def _networks(network):
  head = network.head
  setting = Setting(
    network.encoder,
    image_px=32,
    head=dict(
      num_prototypes=head.num_prototypes,
      hidden_dim=head.hidden_dim,
      bottleneck_dim=head.bottleneck_dim,
      norm_last_layer=head.norm_last_layer,
    ),
  )
  return networks.make_networks(setting, regions=True)


@jax.jit
def _look(params, images):
  """All that is compared, in one program for the fixtures of every seed."""
  network = small.make_small('vit')
  output, state = network.encoder.apply(
    {'params': params['encoder']},
    images,
    capture_intermediates=lambda module, _: isinstance(module, vit.Block),
  )
  norm = nn.LayerNorm(epsilon=1e-6)
  blocks, attentions = [], []
  for index in range(2):
    ((block, attention),) = state['intermediates'][f'block_{index}']['__call__']
    attentions.append(attention)
    blocks.append(norm.apply({'params': params['encoder']['norm']}, block))
  # The class tokens of the last two blocks, then the mean of the last patches.
  last = jnp.concatenate(
    [*(block[:, 0] for block in blocks), blocks[1][:, 1:].mean(1)], axis=1
  )

  def head(name, x):
    return network.head.apply({'params': params[name]}, x)

  heads_of = (
    head('image_head', output.image),
    head('region_head', output.tokens.reshape(-1, 48)),
  )
  positions = params['encoder']['pos_embed']
  side = images.shape[1] // 8
  patches = interpolate_positions(positions[:, 1:], (side, side))
  positions = jnp.concatenate([positions[:, :1], patches], axis=1)
  return output, heads_of, attentions, blocks[1], last, positions


@golden.fixtures('vit_forward')
@pytest.mark.parametrize('px', [32, 24, 40])
def test_embeddings_logits_and_attention(fixture, px):
  params = small.make_small('vit').to_params(fixture.under('w/'))
  images = golden.images(fixture[f'in/images{px}'])
  expected = fixture.under(f'out/s{px}/')
  output, heads_of, attentions, features, last, positions = _look(
    params, images
  )
  _close(output.image, expected['cls'])
  _close(output.tokens, expected['patches'])
  _close(output.attention, expected['last_selfattention'][:, :, 0, 1:])
  _close(heads_of[0], expected['head'])
  _close(heads_of[1], expected['head_dense'])
  for index, attention in enumerate(attentions):
    _close(attention, expected[f'all_selfattention{index}'])
  _close(features, expected['feature_maps'])
  _close(last, expected['n_last_blocks2_avgpool'])
  _close(positions, expected['pos_embed'])


@jax.jit
def _look_at_views(params, views):
  """Features, and logits by the name of their head, of each size of views."""
  modules = _networks(small.make_small('vit'))
  seen, _ = networks.apply_networks(modules, params, {}, views)
  prototypes = networks.prototypes_of(modules, params)

  def logits(name):
    kernel = getattr(prototypes, name).kernel()
    return [
      heads.prototype_logits(getattr(view, f'{name}_bottleneck'), kernel)
      for view in seen
    ]

  features = [view.features for view in seen]
  return features, {name: logits(name) for name in ('image', 'region')}


@golden.fixtures('vit_forward')
def test_views_of_two_sizes_in_one_pass(fixture):
  params = small.make_small('vit').to_params(fixture.under('w/'))
  large, local = (golden.images(fixture[f'in/images{px}']) for px in (40, 24))
  views = (
    np.stack([large, large[::-1]], axis=1),
    np.stack([local, local[::-1], np.float32(0.5) * local], axis=1),
  )
  features, logits = _look_at_views(params, views)
  expected = fixture.under('out/multicrop/')

  def crop_major(arrays):
    """[B, V, ..., D] of each size as rows, crop by crop."""
    return np.concatenate(
      [np.swapaxes(x, 0, 1).reshape(-1, x.shape[-1]) for x in arrays]
    )

  assert [x.shape[2] for x in features] == list(expected['npatch'])
  _close(crop_major(logits['image']), expected['cls_logits'])
  _close(crop_major(logits['region']), expected['region_logits'])
  _close(crop_major(features), expected['region_fea'])
