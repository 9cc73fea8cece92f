"""Published figures of chips and of what connects them; nothing is measured.

Peak bf16 FLOP/s and bytes/s of a link in one direction, as their makers state:

- TPU v4, v5e, v5p, v6e: the pages of these names of the Cloud TPU documentation
  (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e; 2025): 275, 197, 459, 918
  TFLOP/s; bidirectional inter-chip bandwidth of a chip 400 (v5e), 1,200 (v5p),
  800 GB/s (v6e) over 4, 6, 4 links; all-reduce bandwidth of 4,096 v4 1.1 PB/s,
  which is 6 links of 45 GB/s a chip; data-centre network 6.4 Tb/s a pod of 256
  (v5e), 25.6 (v6e).
- H100 SXM: NVIDIA H100 data sheet (2023): 989 TFLOP/s dense, NVLink 900 GB/s
  both ways, 8 GPUs a node; DGX H100 user guide (2023): one 400 Gb/s InfiniBand
  port a GPU.

Which axes of a slice close to a ring, and a microsecond a hop, are of "How to
Scale Your Model" (Austin et al. 2025, jax-ml.github.io/scaling-book).
"""

from __future__ import annotations

import math
from typing import NamedTuple

HOP_SECONDS = 1e-6
# Assumed of a switched network, host software included.
SWITCH_SECONDS = 5e-6
SIZES = (8, 32, 128, 256, 1024)


class Level(NamedTuple):
  """One level of a network, the fastest first.

  Attributes:
    size: chips, or groups of chips, that it connects.
    bytes_per_second: that a chip sends while it receives as many.
    hops: in sequence of an all-reduce.
    hop_seconds: latency of each.
  """

  size: int
  bytes_per_second: float
  hops: int
  hop_seconds: float


class Chip(NamedTuple):
  """A kind of chip.

  Attributes:
    name: of it.
    peak_flops: bf16, dense.
    link: bytes/s of a link in one direction.
    slices: sides of the torus by number of chips; empty if switches connect
      the chips of a node of eight.
    ring_sides: sides close to a ring that are multiples of this, all of them
      or each for itself.
    closes_alone: whether a side closes whatever the others are.
    network: bytes/s of a chip in one direction beyond the torus or the node.
  """

  name: str
  peak_flops: float
  link: float
  slices: dict[int, tuple[int, ...]]
  ring_sides: int
  closes_alone: bool
  network: float


_FLAT = {8: (2, 4), 32: (4, 8), 128: (8, 16), 256: (16, 16)}
_CUBIC = {
  8: (2, 2, 2),
  32: (2, 4, 4),
  128: (4, 4, 8),
  256: (4, 8, 8),
  1024: (8, 8, 16),
}
_POD = 256
CHIPS = (
  Chip('TPU v4', 275e12, 45e9, _CUBIC, 4, False, 0.0),
  Chip('TPU v5e', 197e12, 50e9, _FLAT, 16, True, 6.4e12 / 8 / _POD),
  Chip('TPU v5p', 459e12, 100e9, _CUBIC, 4, False, 0.0),
  Chip('TPU v6e', 918e12, 100e9, _FLAT, 16, True, 25.6e12 / 8 / _POD),
  Chip('H100 SXM', 989e12, 450e9, {}, 0, False, 400e9 / 8),
)
_NODE = 8


def torus(chip: Chip, sides: tuple[int, ...]) -> Level:
  """The network of a slice.

  Args:
    chip: one of `CHIPS` that a torus connects.
    sides: chips along each of its axes.
  """
  closed = [not side % chip.ring_sides for side in sides]
  if not chip.closes_alone:
    closed = [all(closed)] * len(sides)
  # A closed ring carries two directions at once, a line there and back.
  bandwidth = sum(chip.link * (1 + is_closed) for is_closed in closed)
  hops = sum(
    side if is_closed else 2 * (side - 1)
    for side, is_closed in zip(sides, closed)
  )
  return Level(math.prod(sides), bandwidth, hops, HOP_SECONDS)


def levels(chip: Chip, num_chips: int) -> list[Level]:
  """The networks over which so many chips are connected.

  Args:
    chip: one of `CHIPS`.
    num_chips: one of `SIZES`.
  """
  if chip.slices:
    inner = torus(chip, chip.slices[min(num_chips, max(chip.slices))])
  else:
    size = min(num_chips, _NODE)
    inner = Level(size, chip.link, 2, SWITCH_SECONDS)
  groups = num_chips // inner.size
  if groups == 1:
    return [inner]
  # Trees: twice the logarithm of the groups.
  hops = 2 * math.ceil(math.log2(groups))
  return [inner, Level(groups, chip.network, hops, SWITCH_SECONDS)]


def all_reduce_seconds(
  num_bytes: float, networks: list[Level], count: int = 1
) -> float:
  """Time of an all-reduce, level by level.

  Within a level of n, 2 (n - 1) / n of the bytes pass through a chip's links (a
  ring, or its like over a torus); the level above has 1 / n of them to sum.

  Args:
    num_bytes: of the array.
    networks: from `levels`.
    count: all-reduces one after the other that have these bytes together.
  """
  seconds = 0.0
  for level in networks:
    passed = 2 * (level.size - 1) / level.size * num_bytes
    seconds += passed / level.bytes_per_second
    seconds += count * level.hops * level.hop_seconds
    num_bytes /= level.size
  return seconds


def exchange_seconds(num_bytes: float, networks: list[Level]) -> float:
  """Time to hand bytes to other chips, over the slowest level: at best."""
  slowest = min(level.bytes_per_second for level in networks)
  return num_bytes / slowest


def collective_seconds(
  kind: str,
  num_bytes: float,
  group: int | None,
  chip: Chip,
  sides: tuple[int, ...],
) -> float:
  """Time of a collective by hand, if it has the links for itself.

  Args:
    kind: one of `collectives.KINDS`.
    num_bytes: of the whole arrays.
    group: chips that take part; None for all, or pairs of neighbours.
    chip: with published figures.
    sides: of the slice; fewer chips than all are taken as those of a line.
  """
  all_chips = math.prod(sides)
  whole = group is None or group >= all_chips
  level = torus(chip, sides if whole else (group,))
  if kind == 'collective-permute':
    return num_bytes / chip.link + level.hop_seconds
  if kind == 'send':
    # What the slices sum, both ways at once.
    return num_bytes / chip.network + 2 * SWITCH_SECONDS
  if kind == 'all-reduce':
    return all_reduce_seconds(num_bytes, [level])
  if kind in ('all-gather', 'reduce-scatter'):
    return all_reduce_seconds(num_bytes, [level]) / 2
  return num_bytes / level.bytes_per_second + level.hops * level.hop_seconds
