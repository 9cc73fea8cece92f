"""Mask pooling and projection against PARTICLE's two networks."""

import jax
import numpy as np
import pytest

from cmd_jax.convert import entries, resnet
from cmd_jax.models import part_pooling as pooling
from cmd_jax.models.mlp_heads import MlpHead
from cmd_jax.models.resnet import make_resnet
from tests.parity import golden, particle_runs
from tests.parity.particle_runs import mlp_entries


@golden.fixtures('mask_pool')
@pytest.mark.parametrize('case', ['vit', 'resnet', 'few_present'])
def test_mask_pooling(fixture, case):
  expected = fixture.under(f'{case}/')
  num_parts, num_samples, cell_px = expected['params']
  part_ids = expected['masks'].astype(np.uint8)
  side = part_ids.shape[-1] // cell_px

  @jax.jit
  def run(part_ids, ids, features):
    tokens = pooling.part_of_each_token(
      part_ids, num_parts=int(num_parts), grid=(side, side)
    )
    # The generator differs, but not what may be drawn.
    present = pooling.present_parts(tokens, int(num_parts))
    keys = jax.random.split(jax.random.key(0), len(present))
    return (
      tokens,
      pooling.part_masks(tokens, ids),
      pooling.pool_parts(features, tokens, ids),
      present,
      pooling.sample_parts(keys, present[:, None], int(num_samples))[:, 0],
    )

  ids = expected['sampled_ids']
  tokens, masks, pooled, present, ours = jax.device_get(
    run(part_ids, ids, expected['features'])
  )
  onehot = tokens[:, None] == np.arange(num_parts)[:, None]
  np.testing.assert_array_equal(onehot, expected['pooled_onehot'])
  np.testing.assert_allclose(
    masks,
    expected['sampled_masks_normalised'],
    rtol=1e-7,
  )
  np.testing.assert_allclose(
    pooled,
    expected['pooled_features'],
    rtol=1e-6,
    atol=1e-6,
  )
  for drawn in (ids, ours):
    assert all(len(set(row)) == num_samples for row in drawn)
    chosen = np.take_along_axis(present, drawn, axis=1)
    least = np.minimum(present.sum(1), num_samples)
    assert np.all(np.arange(num_samples) < least[:, None], where=chosen)
    np.testing.assert_array_equal(chosen.sum(1), least)


@golden.fixtures('particle_network')
def test_the_resnet_variant_projects_its_parts(fixture):
  encoder = make_resnet(variant='Mu')
  tensors = particle_runs.from_sequential(fixture.under('w/'))
  table = particle_runs.with_prefix('encoder.', resnet.entries(encoder))
  projector = MlpHead(hidden_dim=32, output_dim=16, initialisation='torch')

  @jax.jit
  def run(images, part_ids, ids):
    variables = entries.from_torch(table, tensors)
    features = encoder.apply(variables, images).tokens
    grid = pooling.token_grid(images.shape[1:3], features.shape[1])
    tokens = pooling.part_of_each_token(part_ids, num_parts=6, grid=grid)
    pooled = pooling.pool_parts(features, tokens, ids)

    def project(x):
      of_projector = mlp_entries('projector.')
      return projector.apply(entries.from_torch(of_projector, tensors), x)

    masks = pooling.part_masks(tokens, ids)
    return features, masks, pooled, project(pooled), project(features)

  features, masks, pooled, projection, discovery = run(
    golden.images(fixture['in/images']),
    fixture['in/masks'].astype(np.uint8),
    fixture['out/sampled_ids'],
  )
  theirs = golden.images(fixture['out/encoder'])
  for ours, expected in (
    (features, theirs.reshape(features.shape)),
    (pooled, fixture['out/pooled']),
    (projection, fixture['out/projection']),
    (discovery, fixture['out/discovery']),
  ):
    largest = np.abs(expected).max()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 * largest)
  np.testing.assert_allclose(masks, fixture['out/masks'], rtol=1e-7)


@golden.fixtures('particle_vit')
def test_the_vit_variant_projects_its_patches(fixture):
  projector = MlpHead(hidden_dim=64, output_dim=16, initialisation='normal')
  variables = entries.from_torch(mlp_entries('projector.'), fixture.under('w/'))
  for size in ('32x32', '24x24', '40x24', '48x48'):
    expected = fixture[f'out/{size}/projector_of_patches']
    ours = jax.jit(projector.apply)(variables, fixture[f'out/{size}/patches'])
    np.testing.assert_allclose(
      ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )
