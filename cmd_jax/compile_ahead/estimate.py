"""How long a TPU's compiler thinks a program takes, by part of the step.

Every fusion of the optimised text carries `estimated_cycles`. Their sum, with
the loops as often as they run, is an estimate of where the time goes and no
measurement. Collectives have none, and neither have kernels (custom calls),
which get a roofline of what they read and write.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from cmd_jax.compile_ahead import hlo
from cmd_jax.devices.chips import Chip

# The named scopes of the step; 'loss' has encoder and heads inside.
PARTS = ('augment', 'encoder', 'heads', 'loss', 'optimiser', 'teacher')
REST = 'rest'

_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_SCOPE = re.compile(rf'(?:^|[/(])({"|".join(PARTS)})(?=[/)]|$)')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
# Kernels written in Pallas, for TPU, and for GPU by Triton or Mosaic.
_KERNELS = ('tpu_custom_call', '__gpu$xla.gpu.triton', 'mosaic_gpu_v2')
_COSTS = re.compile(r'"cost_estimate":\{[^}]*"flops":"?(\d+)')


class Kernels(NamedTuple):
  """Custom calls that compute, together.

  Attributes:
    count: executions in a step.
    seconds: the roofline of each, summed: the larger of its bytes over the
      memory's rate and of the FLOPs that it states over the peak.
  """

  count: float
  seconds: float


def part_of(op_name: str) -> str:
  """The part of the step that an operation belongs to, by its innermost scope.

  Args:
    op_name: as the metadata of an instruction has it, such as
      'jit(step)/transpose(jvp(loss))/encoder/...'.
  """
  scopes = _SCOPE.findall(op_name)
  return scopes[-1] if scopes else REST


def cycles_by_part(program: hlo.Program) -> dict[str, float]:
  """Estimated cycles of one execution, by part; {} where there are none."""
  total: dict[str, float] = {}
  for name, times in hlo.executions(program).items():
    for instruction in program.computations[name].values():
      found = _CYCLES.search(instruction.attributes)
      if found:
        named = _OP_NAME.search(instruction.attributes)
        part = part_of(named.group(1)) if named else REST
        total[part] = total.get(part, 0) + times * int(found.group(1))
  return {part: total[part] for part in (*PARTS, REST) if part in total}


def _kernel_seconds(
  instruction: hlo.Instruction,
  siblings: dict[str, hlo.Instruction],
  chip: Chip,
) -> float | None:
  """The roofline of a kernel; None of any other instruction."""
  target = _TARGET.search(instruction.attributes)
  if instruction.opcode != 'custom-call' or not target:
    return None
  if target.group(1) not in _KERNELS:
    return None
  moved = hlo.num_bytes(instruction.shape) + sum(
    hlo.num_bytes(siblings[x].shape) for x in instruction.operands
  )
  stated = _COSTS.search(instruction.attributes)
  flops = int(stated.group(1)) if stated else 0
  return max(flops / chip.peak_flops, moved / chip.bandwidth)


def kernels(program: hlo.Program, chip: Chip) -> Kernels:
  """Custom calls of kernels and their rooflines."""
  count = seconds = 0.0
  for name, times in hlo.executions(program).items():
    siblings = program.computations[name]
    for instruction in siblings.values():
      of_kernel = _kernel_seconds(instruction, siblings, chip)
      if of_kernel is not None:
        count += times
        seconds += times * of_kernel
  return Kernels(count, seconds)


def seconds_of(
  instruction: hlo.Instruction,
  siblings: dict[str, hlo.Instruction],
  chip: Chip,
) -> float:
  """How long an instruction takes once; 0 where there is no estimate.

  Args:
    instruction: of a program; what it calls is not looked at.
    siblings: instructions of its computation, by name.
    chip: on which it runs.
  """
  found = _CYCLES.search(instruction.attributes)
  of_kernel = _kernel_seconds(instruction, siblings, chip)
  cycles = int(found.group(1)) if found and chip.clock else 0
  return (of_kernel or 0.0) + (cycles / chip.clock if cycles else 0.0)
