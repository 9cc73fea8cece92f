import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax import errors
from cmd_jax.models import part_pooling as pooling

_sample_parts = jax.jit(pooling.sample_parts, static_argnums=2)


def _keys(batch, seed=0):
  return jax.random.split(jax.random.key(seed), batch)


def test_each_token_is_of_the_part_with_the_largest_area():
  part_ids = np.full((4, 6), 255, np.uint8)
  part_ids[:2, :2] = [[1, 1], [3, 3]]  # a tie: the first
  part_ids[:2, 2:4] = [[2, 2], [2, 0]]
  part_ids[2:, 2:4] = [[255, 255], [255, 1]]
  part_ids[2:, 4:] = 3
  tokens = pooling.part_of_each_token(
    jnp.array(part_ids)[None], num_parts=4, grid=(2, 3)
  )
  # Part 0 stands for none at all, of which the third and the fourth have 4.
  np.testing.assert_array_equal(tokens, [[1, 2, 0, 0, 1, 3]])
  assert tokens.dtype == jnp.int32


def test_ids_beyond_the_parts_are_no_part():
  part_ids = jnp.array([[9, 9], [9, 2]], jnp.uint8)

  def token(num_parts):
    ids = pooling.part_of_each_token(part_ids, num_parts=num_parts, grid=(1, 1))
    return int(ids[0])

  assert (token(2), token(3), token(10)) == (0, 2, 9)


@pytest.mark.parametrize(
  'image_px, num_tokens, grid',
  [((32, 32), 16, (4, 4)), ((40, 24), 15, (5, 3)), ((7, 7), 1, (1, 1))],
)
def test_grid_of_the_tokens(image_px, num_tokens, grid):
  assert pooling.token_grid(image_px, num_tokens) == grid


@pytest.mark.parametrize('image_px, num_tokens', [((32, 32), 9), ((8, 8), 12)])
def test_tokens_that_do_not_tile_the_view_are_explained(image_px, num_tokens):
  with pytest.raises(errors.UserError, match='global_px'):
    pooling.token_grid(image_px, num_tokens)


def test_present_parts_come_first_and_absent_ones_fill_up():
  tokens = np.array([[[4, 4, 1, 1]], [[2, 2, 2, 2]], [[0, 1, 2, 3]]])
  present = np.asarray(
    jax.jit(pooling.present_parts, static_argnums=1)(tokens, 5)
  )
  np.testing.assert_array_equal(present.sum(-1), [[2], [1], [4]])
  sample = jax.jit(lambda keys: pooling.sample_parts(keys, present, 4))
  ids = np.array([sample(_keys(3, seed)) for seed in range(20)])[:, :, 0]
  assert all(len(set(row)) == 4 for row in ids.reshape(-1, 4))
  assert all(set(row[:2]) == {1, 4} for row in ids[:, 0])
  assert np.all(ids[:, 1, 0] == 2)
  assert all(set(row) == {0, 1, 2, 3} for row in ids[:, 2])
  assert len(np.unique(ids[:, 2], axis=0)) > 5


def test_every_present_part_is_equally_likely():
  present = np.broadcast_to(np.array([1, 0, 1, 1, 1], bool), (2000, 1, 5))
  ids = np.array(_sample_parts(_keys(2000), present, 2))
  counts = np.bincount(ids.ravel(), minlength=5)
  assert counts[1] == 0
  # Five standard deviations of a binomial with n 2000 and p 1/2.
  np.testing.assert_allclose(counts[[0, 2, 3, 4]], 1000, atol=5 * 500**0.5)


def test_draws_depend_on_the_key_of_the_example_alone():
  present = np.ones((3, 2, 9), bool)
  ids = np.asarray(_sample_parts(_keys(3), present, 4))
  np.testing.assert_array_equal(
    _sample_parts(_keys(3)[::-1], present, 4), ids[::-1]
  )
  # Views of one image are drawn separately.
  assert np.any(ids[:, 0] != ids[:, 1])


def test_pooled_features_are_means_and_zero_for_an_empty_part():
  rng = np.random.default_rng(0)
  features = rng.normal(size=(2, 4, 3)).astype(np.float32)
  tokens = np.array([[0, 1, 1, 0], [2, 2, 2, 2]])
  ids = np.array([[1, 0, 3], [2, 3, 0]])
  masks = np.asarray(jax.jit(pooling.part_masks)(tokens, ids))
  np.testing.assert_allclose(masks.sum(-1), [[1, 1, 0], [1, 0, 0]], rtol=1e-6)
  pooled = jax.jit(pooling.pool_parts)(features, tokens, ids)
  zero = np.zeros(3)
  expected = [
    [features[0, 1:3].mean(0), features[0, [0, 3]].mean(0), zero],
    [features[1].mean(0), zero, zero],
  ]
  np.testing.assert_allclose(pooled, expected, rtol=1e-5, atol=1e-6)
