"""Devices in several slices: a second axis, over which batches are spread."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from cmd_jax.devices import sharding
from cmd_jax.errors import UserError
from cmd_jax.training.recipe import check_parallel


def test_a_batch_is_spread_over_all_and_a_state_within_a_slice():
  mesh = sharding.make_mesh(8, num_slices=2)
  assert dict(mesh.shape) == {'dcn': 2, 'data': 4}
  assert list(mesh.devices.flat) == jax.devices()[:8]
  batch = jax.device_put(np.arange(16), sharding.sharded(mesh))
  shares = {x.device: x.data for x in batch.addressable_shards}
  for number, device in enumerate(mesh.devices.flat):
    np.testing.assert_array_equal(shares[device], [2 * number, 2 * number + 1])
  tree = {'kernel': jnp.zeros((64, 32)), 'bias': jnp.zeros(32)}
  shardings = sharding.fsdp_shardings(tree, mesh, 64)
  assert shardings['kernel'].spec == P('data', None)
  # A fourth of it on each of eight devices.
  placed = jax.device_put(tree, shardings)
  assert sharding.bytes_per_device(placed) == 4 * (64 * 8 + 32)


def test_parts_of_a_batch_stay_in_their_slices():
  mesh = sharding.make_mesh(4, num_slices=2)
  batch = jax.device_put(np.arange(16), sharding.sharded(mesh))

  def split_batch(batch):
    return sharding.split_microbatches(batch, 2, mesh)

  compiled = jax.jit(split_batch).lower(batch).compile()
  moves = ('all-', 'collective-permute', 'reduce-scatter')
  assert not any(word in compiled.as_text() for word in moves)
  np.testing.assert_array_equal(
    compiled(batch),
    [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]],
  )


@pytest.mark.parametrize('num_slices', [1, 2, 4])
def test_collectives_are_those_of_all_devices(num_slices):
  mesh = sharding.make_mesh(4, num_slices=num_slices)
  x = np.arange(8, dtype=np.float32)

  def share(shared, examples, axes):
    index = sharding.axis_index(axes)
    return (
      (
        sharding.psum(jnp.sum(examples), axes),
        sharding.pmean(jnp.mean(examples), axes),
        sharding.logsumexp(jax.nn.logsumexp(examples), axes),
        sharding.all_gather(examples, axes),
      ),
      examples + shared + 10 * index,
    )

  (total, mean, lse, gathered), moved = jax.jit(
    sharding.on_each_device(share, mesh)
  )(np.float32(100), x)
  assert (total, mean) == (28, 3.5)
  np.testing.assert_allclose(lse, np.log(np.sum(np.exp(x))), rtol=1e-6)
  np.testing.assert_array_equal(gathered, x)
  np.testing.assert_array_equal(moved, x + 100 + 10 * np.repeat(range(4), 2))


def _described(slices):
  return [
    types.SimpleNamespace(id=i, slice_index=x, platform='tpu')
    for i, x in enumerate(slices)
  ]


def test_devices_that_know_their_slices_are_put_together():
  ordered = sharding._by_slice(_described([1, 0, 1, 0]), 2)
  assert [x.id for x in ordered] == [1, 3, 0, 2]
  # All of one slice can be divided for a trial.
  assert [x.id for x in sharding._by_slice(_described([0] * 4), 2)] == [
    0,
    1,
    2,
    3,
  ]


@pytest.mark.parametrize(
  ('slices', 'num_slices', 'message'),
  [
    ([0, 0, 0], 2, 'num_slices is 2, which 3 devices cannot be divided by'),
    ([0, 0, 1, 2], 2, 'but the devices are in 3 slices'),
    ([0, 0, 0, 1], 2, 'but the devices are in 2 slices'),
  ],
)
def test_other_slices_than_there_are_are_refused(slices, num_slices, message):
  with pytest.raises(UserError, match=message):
    sharding._by_slice(_described(slices), num_slices)


def test_pmap_knows_no_slices():
  fields = dict(
    num_slices=2,
    mode='pmap',
    state='auto',
    steps_per_dispatch=1,
    grad_accum_steps=1,
  )
  config = ConfigDict(dict(parallel=fields, batch_size=8))
  with pytest.raises(UserError, match='num_slices is 2, which .*mode=pmap'):
    check_parallel(config, 8, 'tpu')
