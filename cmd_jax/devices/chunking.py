"""Batches cut into blocks of examples, so that what is made of one fits."""

from __future__ import annotations

from typing import Any

import jax


def largest_divisor(number: int, limit: int) -> int:
  """The largest divisor of a number that is at most `limit`, 1 at least."""
  limit = max(1, min(number, limit))
  return next(d for d in range(limit, 0, -1) if not number % d)


def examples_in_a_block(
  batch_size: int, bytes_an_example: int, limit: int
) -> int:
  """The largest divisor of a batch of which no more than `limit` bytes is made.

  Args:
    batch_size: B.
    bytes_an_example: what is made of an example.
    limit: bytes of a block; a block has one example at least.
  """
  return largest_divisor(batch_size, limit // max(1, bytes_an_example))


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
