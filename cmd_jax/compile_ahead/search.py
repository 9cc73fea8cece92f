"""The largest batch that fits, by few compilations."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

# Each takes minutes; the line through two of them is mostly right at once.
MAX_TRIES = 8


class Try(NamedTuple):
  """A batch size that was compiled.

  Attributes:
    batch_size: B.
    needed: bytes of a device; None if the compiler does not say.
    fits: whether it does.
  """

  batch_size: int
  needed: int | None
  fits: bool


def _guess(tries: list[Try], limit: int) -> float:
  """Where a line through what was needed meets the limit."""
  known = sorted((x.batch_size, x.needed) for x in tries if x.needed)
  if not known:
    return tries[-1].batch_size / 2
  nearest = sorted(known, key=lambda x: abs(x[1] - limit))[:2]
  if len(nearest) == 1:
    size, needed = nearest[0]
    return size * limit / needed
  (one, less), (two, more) = sorted(nearest)
  if more <= less:
    return two * 2
  return one + (two - one) * (limit - less) / (more - less)


def find_largest(
  attempt: Callable[[int], Try], *, start: int, unit: int, limit: int
) -> list[Try]:
  """Looks for the largest batch size that fits.

  Args:
    attempt: batch size -> how it went; needs are assumed to grow with it.
    start: multiple of `unit` to begin with.
    unit: of which batch sizes are multiples.
    limit: bytes of a device.

  Returns:
    All that was tried, in order. The search has ended where one that fits and
    one that does not are `unit` apart, nothing fits at all, or after
    `MAX_TRIES`.
  """
  tries: list[Try] = []
  size = start
  while len(tries) < MAX_TRIES:
    tries.append(attempt(size))
    low = max((x.batch_size for x in tries if x.fits), default=0)
    high = min((x.batch_size for x in tries if not x.fits), default=None)
    if high is not None and high - low <= unit:
      break
    size = int(_guess(tries, limit) // unit) * unit
    size = max(size, low + unit)
    size = min(size, 8 * low if high is None else high - unit)
  return tries


def largest(tries: list[Try]) -> int | None:
  """The largest batch size that fitted; None if none did."""
  return max((x.batch_size for x in tries if x.fits), default=None)


def is_settled(tries: list[Try], unit: int) -> bool:
  """Whether the next larger batch size was tried, and did not fit."""
  best = largest(tries) or 0
  return any(x.batch_size == best + unit and not x.fits for x in tries)
