"""Stochastic depth and position embeddings against the released code."""

import jax
import numpy as np

from cmd_jax.models import layers, swin
from cmd_jax.models.positions import interpolate_positions
from tests.parity import golden


@golden.fixtures('drop_path')
def test_drop_path(fixture):
  for rate in (0.1, 0.5):
    ours = jax.jit(layers.drop_path)(
      fixture['in/x'], rate, fixture[f'p{rate}/uniform'].ravel()
    )
    np.testing.assert_allclose(ours, fixture[f'p{rate}/out'], rtol=1e-6)


@golden.fixtures('drop_path')
def test_rates_of_the_blocks(fixture):
  np.testing.assert_allclose(
    layers.drop_path_rates(0.1, 12),
    fixture['rates_depth12_0.1'],
    rtol=1e-6,
  )
  depth = swin.make_swin(variant='T').depth
  np.testing.assert_allclose(
    layers.drop_path_rates(0.1, depth),
    fixture['rates_swin_2262_0.1'],
    rtol=1e-6,
  )


@golden.fixtures('pos_embed_interp')
def test_position_embeddings_of_other_grids(fixture):
  positions = fixture['in/pos_embed']
  grids = [int(name) for name in fixture.under('out/grid')]
  assert grids
  for grid in grids:
    patches = jax.jit(interpolate_positions, static_argnums=1)(
      positions[:, 1:], (grid, grid)
    )
    expected = fixture[f'out/grid{grid}']
    np.testing.assert_array_equal(positions[:, :1], expected[:, :1])
    np.testing.assert_allclose(patches, expected[:, 1:], rtol=1e-4, atol=1e-5)
