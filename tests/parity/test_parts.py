"""PARTICLE's ViT, extractor and hypercolumn against the released code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cmd_jax.convert import entries
from cmd_jax.convert import vit as vit_table
from cmd_jax.models import vit
from cmd_jax.models.positions import interpolate_positions
from cmd_jax.parts import features
from tests.parity import golden


def _close(ours, theirs):
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def _make_encoder(width, depth, num_heads):
  return vit.make_vit(
    image_px=32,
    patch_px=8,
    width=width,
    depth=depth,
    num_heads=num_heads,
    interpolation='dinov2',
    drop_path_rate=0.0,
  )


def _variables(encoder, fixture):
  return entries.from_torch(vit_table.entries(encoder), fixture.under('w/'))


@jax.jit
def _look(variables, images):
  """All that is compared, in one program for the fixtures of every seed."""
  encoder = _make_encoder(width=48, depth=2, num_heads=3)
  output, state = encoder.apply(
    variables,
    images,
    capture_intermediates=lambda module, _: isinstance(module, vit.Block),
  )
  norm = nn.LayerNorm(epsilon=1e-6)
  blocks = []
  for index in range(2):
    ((block, attention),) = state['intermediates'][f'block_{index}']['__call__']
    blocks.append(norm.apply({'params': variables['params']['norm']}, block))
  positions = variables['params']['pos_embed']
  patches = interpolate_positions(
    positions[:, 1:], encoder.grid(*images.shape[1:3]), 'dinov2'
  )
  positions = jnp.concatenate([positions[:, :1], patches], axis=1)
  return output, blocks, attention, positions


@golden.fixtures('particle_vit')
@pytest.mark.parametrize('size', ['32x32', '24x24', '40x24', '48x48'])
def test_vit(fixture, size):
  encoder = _make_encoder(width=48, depth=2, num_heads=3)
  output, blocks, attention, positions = _look(
    _variables(encoder, fixture), golden.images(fixture[f'in/{size}'])
  )
  expected = fixture.under(f'out/{size}/')
  _close(output.image, expected['cls'])
  _close(output.tokens, expected['patches'])
  _close(output.attention, expected['last_selfattention'][:, :, 0, 1:])
  for index, block in enumerate(blocks):
    _close(block, expected[f'intermediate{index}'])
  _close(attention, expected['last_selfattention'])
  _close(positions, expected['pos_embed'])


@golden.fixtures('particle_vit')
@pytest.mark.parametrize('side', [6, 10, 16, 28])
def test_positions(fixture, side):
  positions = fixture['in/pos_embed_14']
  _close(
    jax.jit(interpolate_positions, static_argnums=(1, 2))(
      positions[:, 1:], (side, side), 'dinov2'
    ),
    fixture[f'out/pos_embed_grid{side}'][:, 1:],
  )


@golden.fixtures('vit_extractor')
@pytest.mark.parametrize('stride_px', [4, 8])
def test_extractor(fixture, stride_px):
  encoder = _make_encoder(width=24, depth=12, num_heads=6)

  @jax.jit
  def look(variables, images):
    maps = features.key_maps(
      encoder,
      variables,
      images,
      stride_px=stride_px,
      saliency_heads=(0, 2, 4, 5),
    )
    return maps, features.log_bin(maps.keys)

  maps, binned = look(
    _variables(encoder, fixture), golden.images(fixture['in/image'])
  )
  expected = fixture.under(f'out/stride{stride_px}_')
  assert maps.keys.shape[1:3] == tuple(expected['num_patches'])
  _close(maps.keys.reshape(1, 1, -1, 24), expected['key_layer11'])
  _close(maps.saliency.reshape(1, -1), expected['saliency'])
  if 'key_layer11_binned' in expected:
    _close(binned.reshape(1, 1, -1, 408), expected['key_layer11_binned'])


@golden.fixtures('hypercolumn')
@pytest.mark.parametrize('num_layers, side', [(4, 24), (5, 16), (2, 20)])
def test_hypercolumn(fixture, num_layers, side):
  maps = [golden.images(fixture[f'in/stage{i}']) for i in (5, 4, 3, 2, 1)]
  ours = jax.jit(features.hypercolumn, static_argnums=1)(
    maps[:num_layers], (side, side)
  )
  expected = fixture[f'out/layers{num_layers}_{side}']
  _close(ours, golden.images(expected))
