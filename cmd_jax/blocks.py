"""Batches cut into blocks of examples, so that what is made of one fits."""

from __future__ import annotations

from typing import Any

import jax


def examples_in_a_block(
  batch_size: int, bytes_an_example: int, limit: int
) -> int:
  """The largest divisor of a batch of which no more than `limit` bytes is made.

  Args:
    batch_size: B.
    bytes_an_example: what is made of an example.
    limit: bytes of a block; a block has one example at least.
  """
  most = max(1, limit // max(1, bytes_an_example))
  divisors = (d for d in range(1, batch_size + 1) if not batch_size % d)
  return max(d for d in divisors if d <= most)


def split(tree: Any, size: int) -> Any:
  """[B, ...] -> [B / size, size, ...] for every array."""
  # Not -1: there may be no elements.
  return jax.tree.map(
    lambda x: x.reshape(len(x) // size, size, *x.shape[1:]), tree
  )


def join(tree: Any) -> Any:
  """Undoes `split`."""
  return jax.tree.map(
    lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), tree
  )
