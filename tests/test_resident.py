import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax import parallel
from cmd_jax.data import canvas, resident
from cmd_jax.errors import UserError

NUM_EXAMPLES, BATCH = 27, 8
STEPS_PER_EPOCH = 3


def _canvases(num_examples=NUM_EXAMPLES):
  rng = np.random.default_rng(0)
  return canvas.Canvases(
    name='birds/train',
    images=rng.integers(0, 256, (num_examples, 4, 4, 3), np.uint8),
    sizes=rng.integers(4, 99, (num_examples, 2), np.int32),
    labels=np.zeros(num_examples, np.int32),
    file_names=tuple(f'{i}.png' for i in range(num_examples)),
    class_names=('bird',),
    part_ids=None,
    boxes=None,
    skipped=(),
  )


def _epoch(seed, epoch):
  """[3, 8] indices of the steps of an epoch."""
  steps = range(epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH)
  return np.stack(
    [
      resident.batch_indices(
        jax.random.key(seed),
        jnp.int32(step),
        num_examples=NUM_EXAMPLES,
        batch_size=BATCH,
      )
      for step in steps
    ]
  )


def test_an_epoch_shows_every_example_at_most_once():
  left_out = set()
  for epoch in range(12):
    seen = _epoch(3, epoch).ravel()
    # 27 = 3 * 8 + 3: the incomplete last batch is dropped.
    assert len(set(seen)) == STEPS_PER_EPOCH * BATCH
    assert seen.min() >= 0
    assert seen.max() < NUM_EXAMPLES
    left_out |= set(range(NUM_EXAMPLES)) - set(seen)
  # 36 draws of 27 that never leave out the same ones.
  assert len(left_out) > 12


def test_a_set_of_whole_batches_is_a_permutation():
  seen = [
    resident.batch_indices(
      jax.random.key(0), jnp.int32(step), num_examples=24, batch_size=8
    )
    for step in range(3, 6)
  ]
  assert sorted(np.concatenate(seen)) == list(range(24))


def test_order_is_a_function_of_seed_and_step_alone():
  np.testing.assert_array_equal(_epoch(0, 4), _epoch(0, 4))
  others = [_epoch(0, 0), _epoch(0, 1), _epoch(0, 4), _epoch(1, 0)]
  orders = {tuple(epoch.ravel()) for epoch in others}
  assert len(orders) == len(others)
  # Not merely the same batches in another order.
  batches = [frozenset(batch) for epoch in others for batch in epoch]
  assert len(set(batches)) == len(batches)


@pytest.mark.parametrize('num_devices', [1, 8])
def test_batches_are_the_canvases_that_their_indices_name(num_devices):
  canvases = _canvases()
  mesh = parallel.make_mesh(num_devices)
  batches = resident.make_resident_batches(
    canvases, batch_size=BATCH, rng=jax.random.key(5), mesh=mesh
  )
  for step in (0, 1, 7):
    batch = batches(step)
    index = np.asarray(batch.index)
    np.testing.assert_array_equal(
      index, _epoch(5, step // STEPS_PER_EPOCH)[step % STEPS_PER_EPOCH]
    )
    np.testing.assert_array_equal(batch.images, canvases.images[index])
    np.testing.assert_array_equal(batch.sizes, canvases.sizes[index])
    assert batch.images.dtype == jnp.uint8
    for leaf in jax.tree.leaves(batch):
      shares = {
        shard.device: shard.data.shape for shard in leaf.addressable_shards
      }
      assert set(shares) == set(mesh.devices.flat)
      assert {shape[0] for shape in shares.values()} == {BATCH // num_devices}


def test_a_set_smaller_than_a_batch_is_refused():
  with pytest.raises(UserError, match=r'birds/train has 7 .* 8: .* most 7$'):
    resident.make_resident_batches(
      _canvases(7),
      batch_size=8,
      rng=jax.random.key(0),
      mesh=parallel.make_mesh(1),
    )
