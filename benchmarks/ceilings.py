"""What the machine can do at most: matrix products, memory, both (roofline).

Ceilings are measured between the steps of a run, so that whatever else the
machine does slows both sides. Attainable is the roofline of Williams et al.
2009: min(products per second, intensity x bytes per second).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

# Beyond what caches hold.
BANDWIDTH_BYTES = 256 * 2**20
REPEATS = 3


def make_matmul_ceiling(
  shapes: Sequence[tuple[int, int, int]], dtype: str
) -> Callable[[], float]:
  """() -> FLOP/s of the fastest product [m, k] @ [k, n] on one device.

  Args:
    shapes: (m, k, n) to choose from.
    dtype: of the operands.
  """
  product = jax.jit(jnp.dot)
  operands = [
    (jnp.ones((m, k), dtype), jnp.ones((k, n), dtype)) for m, k, n in shapes
  ]
  for a, b in operands:
    product(a, b).block_until_ready()

  def measure():
    best = 0.0
    for (a, b), (m, k, n) in zip(operands, shapes):
      start = time.perf_counter()
      for _ in range(REPEATS):
        result = product(a, b)
      result.block_until_ready()
      seconds = time.perf_counter() - start
      best = max(best, REPEATS * 2 * m * k * n / seconds)
    return best

  return measure


def make_bandwidth_ceiling(
  num_bytes: int = BANDWIDTH_BYTES,
) -> Callable[[], float]:
  """() -> bytes/s read and written by x + 1 on one device.

  Args:
    num_bytes: of x.
  """
  # In place: a new array would be paid for by the page, not by the byte.
  add = jax.jit(lambda x: x + 1, donate_argnums=0)
  array = add(jnp.zeros(num_bytes // 4, jnp.float32)).block_until_ready()

  def measure():
    nonlocal array
    start = time.perf_counter()
    for _ in range(REPEATS):
      array = add(array)
    array.block_until_ready()
    return REPEATS * 2 * array.nbytes / (time.perf_counter() - start)

  return measure


def roofline(
  *,
  flops: float,
  num_bytes: float,
  seconds: float,
  matmul_ceiling: float,
  bandwidth_ceiling: float,
) -> dict[str, float]:
  """Where a program stands under the roofline.

  Args:
    flops: of one execution on one device.
    num_bytes: that pass through memory.
    seconds: of one execution.
    matmul_ceiling: FLOP/s.
    bandwidth_ceiling: bytes/s.

  Returns:
    Intensity in FLOPs a byte, attainable and achieved GFLOP/s, their ratio.
  """
  intensity = flops / num_bytes
  attainable = min(matmul_ceiling, intensity * bandwidth_ceiling)
  return {
    'gflops_counted': flops / 1e9,
    'gbytes_of_program': num_bytes / 1e9,
    'intensity_flops_per_byte': intensity,
    'matmul_ceiling_gflops': matmul_ceiling / 1e9,
    'bandwidth_ceiling_gbytes': bandwidth_ceiling / 1e9,
    'attainable_gflops': attainable / 1e9,
    'achieved_gflops': flops / seconds / 1e9,
    'share_of_attainable': flops / seconds / attainable,
  }
