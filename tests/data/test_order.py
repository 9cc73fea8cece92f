import subprocess
import sys

import numpy as np

from cmd_jax.data.pipeline import order

NUM_EXAMPLES, BATCH = 27, 8
STEPS_PER_EPOCH = 3
GOLDEN = (
  [0, 8, 19, 26, 9, 3, 18, 21],
  [26, 1, 18, 16, 22, 4, 23, 3],
)


def _batch(seed, step, num_examples=NUM_EXAMPLES):
  return order.batch_indices(
    seed, step, num_examples=num_examples, batch_size=BATCH
  )


def _epoch(seed, epoch):
  """[3, 8] indices of the steps of an epoch."""
  first = epoch * STEPS_PER_EPOCH
  return np.stack([_batch(seed, first + i) for i in range(STEPS_PER_EPOCH)])


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
  seen = [_batch(0, step, num_examples=24) for step in range(3, 6)]
  assert sorted(np.concatenate(seen)) == list(range(24))


def test_order_is_a_function_of_seed_and_step_alone():
  first = _epoch(0, 4).copy()
  order._sorted_by_chance.cache_clear()
  np.testing.assert_array_equal(_epoch(0, 4), first)
  # Neither a later epoch nor another seed repeats an epoch.
  others = [(0, 0), (0, 1), (0, 4), (1, 0), (1, 3), (-1, 0)]
  batches = [
    frozenset(batch.tolist()) for which in others for batch in _epoch(*which)
  ]
  assert len(set(batches)) == len(batches)


def test_the_order_of_a_run_survives_upgrades():
  assert _batch(0, 0).dtype == np.int32
  assert _batch(0, 0).tolist() == GOLDEN[0]
  assert _batch(7, 100).tolist() == GOLDEN[1]


def test_every_place_sees_every_example_alike():
  count = np.zeros((5, 5))
  for epoch in range(2000):
    count[np.arange(5), order.epoch_order(1, epoch, 5)] += 1
  # 400 each, with a standard deviation of 18.
  assert np.abs(count - 400).max() < 90


def test_nothing_that_decodes_imports_jax():
  code = (
    'import sys, cmd_jax.data.pipeline.worker; sys.exit("jax" in sys.modules)'
  )
  assert subprocess.run([sys.executable, '-c', code]).returncode == 0
