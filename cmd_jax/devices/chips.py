"""What kinds of devices are: memory, rates, clocks, as their makers state.

A device that is only described, for which a program is compiled ahead, says
nothing but its kind. TPUs: the pages v5e, v5p and v6e of the Cloud TPU
documentation; their usable memory is what the compiler allows a program, and
their clock is the peak divided by what the matrix units do in a cycle. GPUs:
NVIDIA's data sheets, dense bfloat16.
"""

from __future__ import annotations

from typing import NamedTuple

import jax

# Of a GPU's memory, what JAX takes (XLA_PYTHON_CLIENT_MEM_FRACTION).
GPU_SHARE = 0.75


class Chip(NamedTuple):
  """A kind of device.

  Attributes:
    name: as users call it.
    memory: bytes that programs may use.
    peak_flops: bfloat16, dense.
    bandwidth: bytes/s of its memory.
    clock: cycles/s of the compiler's estimates; 0 where it makes none.
  """

  name: str
  memory: int
  peak_flops: float
  bandwidth: float
  clock: float = 0.0


def _gib(number: float) -> int:
  return round(number * 2**30)


# By `jax.Device.device_kind`.
CHIPS = {
  'TPU v5 lite': Chip('v5e', _gib(15.75), 197e12, 0.82e12, 1.5e9),
  'TPU v6 lite': Chip('v6e', _gib(31.25), 918e12, 1.64e12, 1.75e9),
  'TPU v5': Chip('v5p', _gib(95.74), 459e12, 2.77e12, 1.75e9),
  'NVIDIA H100 80GB HBM3': Chip(
    'h100', int(GPU_SHARE * 84_942_979_072), 989e12, 3.35e12
  ),
  'NVIDIA H200 141GB HBM3e': Chip(
    'h200', int(GPU_SHARE * 151_397_597_184), 989e12, 4.8e12
  ),
  'NVIDIA A100-SXM4-80GB': Chip(
    'a100', int(GPU_SHARE * 85_094_825_984), 312e12, 2.04e12
  ),
  'NVIDIA L4': Chip('l4', int(GPU_SHARE * 23_580_639_232), 121e12, 0.3e12),
}


def memory_limit(device: jax.Device) -> int | None:
  """Bytes that programs may use; None if they are the host's or unknown."""
  if device.platform == 'cpu':
    return None
  try:
    return (device.memory_stats() or {}).get('bytes_limit')
  except jax.errors.JaxRuntimeError:
    # It is only described.
    chip = CHIPS.get(device.device_kind)
    return chip and chip.memory
