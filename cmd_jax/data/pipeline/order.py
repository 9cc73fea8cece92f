"""The order of the examples of a run, a pure function of (seed, step).

So is which of its neighbours goes with an example. Both routes to the device
follow it, and so do processes that decode, which need nothing but NumPy for it.
"""

from __future__ import annotations

import functools
import threading

import numpy as np

# Threads that begin an epoch together would each sort it.
_lock = threading.Lock()


@functools.lru_cache(maxsize=4)
def _sorted_by_chance(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  # A seed may be negative, a NumPy seed may not.
  entropy = np.random.SeedSequence((seed % 2**64, epoch))
  # The raw numbers of a bit generator stay the same from one NumPy to the
  # next, which those of its distributions need not: runs resume after upgrades.
  draws = np.random.Philox(entropy).random_raw(num_examples)
  order = np.argsort(draws, kind='stable').astype(np.int32)
  order.setflags(write=False)
  return order


def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  """The permutation of an epoch.

  Args:
    seed: of the run.
    epoch: number of the epoch, from 0.
    num_examples: N.

  Returns:
    [N] int32, not to be written to.
  """
  with _lock:
    return _sorted_by_chance(seed, epoch, num_examples)


def batch_indices(
  seed: int, step: int, *, num_examples: int, batch_size: int
) -> np.ndarray:
  """The examples of a step: a slice of the epoch's permutation.

  Every epoch is shuffled anew and drops its incomplete last batch, so an
  example is seen at most once an epoch.

  Args:
    seed: of the run.
    step: number of the step, from 0.
    num_examples: size of the set.
    batch_size: B, at most `num_examples`.

  Returns:
    [B] int32.
  """
  epoch, place = divmod(step, num_examples // batch_size)
  start = place * batch_size
  return epoch_order(seed, epoch, num_examples)[start : start + batch_size]


def choose_partners(
  seed: int, step: int, index: np.ndarray, neighbours: np.ndarray
) -> np.ndarray:
  """The neighbour that goes with each example of a step.

  Args:
    seed: of the run.
    step: number of the step, from 0.
    index: [B] the examples, from `batch_indices`.
    neighbours: [N, k] of every example of the set.

  Returns:
    [B] int32.
  """
  # Not the entropy of an epoch's order, which has one number less.
  entropy = np.random.SeedSequence((seed % 2**64, step, 0))
  draws = np.random.Philox(entropy).random_raw(len(index))
  column = draws % np.uint64(neighbours.shape[1])
  return neighbours[index, column.astype(int)].astype(np.int32)
