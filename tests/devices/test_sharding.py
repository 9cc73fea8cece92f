import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from cmd_jax import errors
from cmd_jax.devices import chips, sharding


@pytest.mark.parametrize(
  'shape, spec',
  [
    ((16, 32), P(None, 'data')),
    ((32, 16), P('data', None)),
    # The first of equals.
    ((16, 16), P('data', None)),
    # The longest that the devices divide.
    ((8, 30), P('data', None)),
    ((2, 3, 64), P(None, None, 'data')),
    ((100,), P()),
    ((104,), P('data')),
    # Small, empty and single ones stay whole.
    ((8, 7), P()),
    ((0, 128), P()),
    ((), P()),
  ],
)
def test_the_longest_axis_that_divides_is_spread(shape, spec):
  assert sharding.fsdp_spec(shape, 8, min_size=64) == spec


def test_a_device_keeps_its_share_of_what_is_spread():
  mesh = sharding.make_mesh(8)
  tree = {'kernel': jnp.zeros((64, 32)), 'bias': jnp.zeros(32)}
  shardings = sharding.fsdp_shardings(tree, mesh, 64)
  placed = jax.device_put(tree, shardings)
  assert sharding.bytes_per_device(placed) == 4 * (64 * 4 + 32)
  assert placed['kernel'].addressable_shards[3].data.shape == (8, 32)
  gathered = sharding.gather(placed, mesh)
  assert sharding.bytes_per_device(gathered) == 4 * (64 * 32 + 32)
  assert all(x.is_fully_replicated for x in gathered.values())


@pytest.mark.parametrize(
  'state, mode, words',
  [
    ('zero', 'jit', 'auto, replicated, fsdp'),
    ('fsdp', 'pmap', 'mode=pmap cannot do: set config.parallel.mode=jit'),
  ],
)
def test_a_layout_that_cannot_be_is_refused(state, mode, words):
  with pytest.raises(errors.UserError, match=words):
    sharding.check_state(state, mode)


def test_a_state_is_spread_where_asked_or_where_memory_is_short():
  class Device:
    platform = 'gpu'

    def memory_stats(self):
      return {'bytes_limit': 1000}

  class Devices:
    size = 2
    devices = np.array([Device(), Device()])

  def wants(state, num_bytes, mode='jit', mesh=Devices):
    sharding.check_state(state, mode)
    return sharding.wants_fsdp(state, mode=mode, num_bytes=num_bytes, mesh=mesh)

  assert wants('fsdp', 1) and not wants('replicated', 10**6)
  assert wants('auto', 301) and not wants('auto', 300)
  assert not wants('auto', 301, mode='pmap')
  # A CPU's devices share one memory.
  assert not wants('auto', 10**12, mesh=sharding.make_mesh(8))


def test_a_device_that_is_only_described_is_known_by_its_kind():
  class Device:
    platform = 'tpu'
    device_kind = 'TPU v5 lite'

    def memory_stats(self):
      raise jax.errors.JaxRuntimeError('only for addressable devices')

  class Devices:
    size = 2
    devices = np.array([Device(), Device()])

  limit = chips.memory_limit(Device())
  assert limit == 15.75 * 2**30
  assert sharding.platform_of(Devices) == 'tpu'
  assert sharding.platform_of(None) == 'cpu'
  for num_bytes in (0.31 * limit, 0.29 * limit):
    is_spread = sharding.wants_fsdp(
      'auto', mode='jit', num_bytes=num_bytes, mesh=Devices
    )
    assert is_spread == (num_bytes > 0.3 * limit)
  Device.device_kind = 'TPU v99'
  assert chips.memory_limit(Device()) is None


def test_parts_of_a_batch_stay_where_they_are():
  mesh = sharding.make_mesh(4)
  split = sharding.sharded(mesh)
  batch = {'x': np.arange(48).reshape(16, 3), 'index': np.arange(16)}
  placed = jax.device_put(batch, split)

  def split_batch(batch):
    return sharding.split_microbatches(batch, 2, mesh)

  compiled = jax.jit(split_batch).lower(placed).compile()
  moves = ('all-', 'collective-permute', 'reduce-scatter')
  assert not any(word in compiled.as_text() for word in moves)
  parts = compiled(placed)
  # Four devices with four examples each: two of every device in each part.
  expected = [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]
  np.testing.assert_array_equal(parts['index'], expected)
  np.testing.assert_array_equal(parts['x'], batch['x'][np.array(expected)])
  local = sharding.split_microbatches(batch, 2, None)
  np.testing.assert_array_equal(local['index'], np.arange(16).reshape(2, 8))
