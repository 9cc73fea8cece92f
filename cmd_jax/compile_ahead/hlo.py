"""What a compiled program says of itself: instructions, products, bytes.

XLA's own cost analysis looks at the body of a loop once, however often it runs.
How often is in the text of the optimised program (`compiled.as_text()`), which
is read here: every instruction with its shape and operands, and how often the
computation that it stands in is executed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# Those that name memory rather than touch it, and those followed inside.
FREE = frozenset(
  (
    'parameter',
    'constant',
    'tuple',
    'get-tuple-element',
    'bitcast',
    'while',
    'conditional',
    'call',
  )
)
SLICES = ('dynamic-slice', 'slice', 'gather', 'dynamic-update-slice')
_ARRAY = re.compile(r'\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.-]+) (?:\(.*)?\{$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%?([\w.-]+) = (.*)$')
_CONDITION = re.compile(r'condition=%?([\w.-]+)')
_CALLED = re.compile(r'(?:calls|to_apply|body)=%?([\w.-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_INTEGER = re.compile(r'[su]\d+\[\]')
_ELEMENT = re.compile(r'index=\d+')
_CONTRACTED = re.compile(r'lhs_contracting_dims=\{([\d,]*)\}')


class Instruction(NamedTuple):
  """One line of a program.

  Attributes:
    name: unique within its computation.
    shape: of the result, as text.
    opcode: what it does.
    operands: names of its operands.
    attributes: the rest of the line.
    is_root: whether it is its computation's result.
  """

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  is_root: bool


class Program(NamedTuple):
  """A program by computations.

  Attributes:
    computations: instructions by name, by the computation's name.
    entry: the computation that starts.
  """

  computations: dict[str, dict[str, Instruction]]
  entry: str


class Work(NamedTuple):
  """What a device does in one execution.

  Attributes:
    dot_flops: of the matrix products, 2 a multiplication.
    num_bytes: read and written by instructions; a fusion counts as one.
  """

  dot_flops: float
  num_bytes: float


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
  """(type, dimensions) of every array in the text of a shape."""
  return [
    (dtype, tuple(int(n) for n in dims.split(',') if n))
    for dtype, dims in _ARRAY.findall(shape)
  ]


def num_bytes(shape: str) -> int:
  """Bytes of all arrays in the text of a shape; tokens have none."""
  total = 0
  for dtype, dims in arrays(shape):
    if dtype == 'token':
      continue
    digits = re.search(r'\d+', dtype)
    bits = int(digits.group()) if digits else 8
    total += math.ceil(bits * math.prod(dims) / 8)
  return total


def _closing(text: str) -> int:
  """Index of the bracket that closes the one at the start."""
  depth = 0
  for index, char in enumerate(text):
    depth += (char == '(') - (char == ')')
    if not depth:
      return index
  raise ValueError(f'no closing bracket: {text[:80]}')


def _read_instruction(line: str) -> Instruction | None:
  match = _INSTRUCTION.match(line)
  if not match:
    return None
  root, name, rest = match.groups()
  end = _closing(rest) + 1 if rest[0] == '(' else rest.index(' ')
  shape, rest = rest[:end], rest[end:].lstrip()
  opcode, _, rest = rest.partition('(')
  end = _closing(f'({rest}') - 1
  operands = re.findall(r'%([\w.-]+)', rest[:end])
  return Instruction(
    name,
    shape,
    opcode,
    # Of a parameter its number.
    (rest[:end],) if opcode == 'parameter' else tuple(operands),
    # Of a constant its value, too.
    rest if opcode == 'constant' else rest[end + 1 :],
    bool(root),
  )


def read_program(text: str) -> Program:
  """Reads the text of an optimised program.

  Args:
    text: `jax.stages.Compiled.as_text()`.

  Raises:
    ValueError: no computation is marked as the entry.
  """
  computations, entry, current = {}, None, {}
  for line in text.splitlines():
    if line.endswith('{') and (match := _COMPUTATION.match(line)):
      current = computations.setdefault(match.group(2), {})
      entry = match.group(2) if match.group(1) else entry
    elif instruction := _read_instruction(line):
      current[instruction.name] = instruction
  if entry is None:
    raise ValueError('not the text of an HLO program: it has no ENTRY')
  return Program(computations, entry)


def _constant(instruction: Instruction) -> int | None:
  """The number that a constant is; None of anything else."""
  value = instruction.attributes.partition(')')[0]
  is_number = instruction.opcode == 'constant' and value.lstrip('-').isdigit()
  return int(value) if is_number else None


def _step(program: Program, loop: Instruction, counter: str) -> int:
  """What a loop adds to a number that it counts; 1 where it is not seen.

  Args:
    program: that has the loop.
    loop: a `while`.
    counter: which element of what the loop carries, as 'index=4'.
  """
  body = program.computations.get(called_by(loop), {})
  root = next((x for x in body.values() if x.is_root), None)
  index = int(counter.partition('=')[2])
  if root is None or index >= len(root.operands):
    return 1
  counted = body.get(root.operands[index])
  if counted is None or counted.opcode != 'add':
    return 1
  added = [_constant(body[x]) for x in counted.operands if x in body]
  return next((x for x in added if x), 1)


def _trips(program: Program, loop: Instruction) -> int:
  """How often a loop runs; 1 where the program does not say."""
  if trips := _TRIPS.search(loop.attributes):
    return int(trips.group(1))
  # A count from 0 ends at the only number that its condition knows.
  condition = _CONDITION.search(loop.attributes)
  instructions = program.computations[condition.group(1)] if condition else {}
  found = [(x.shape, _constant(x)) for x in instructions.values()]
  ends = [n for shape, n in found if _INTEGER.match(shape) and n is not None]
  if len(ends) != 1:
    return 1
  counters = {
    counter.group()
    for x in instructions.values()
    if (counter := _ELEMENT.search(x.attributes))
  }
  step = _step(program, loop, counters.pop()) if len(counters) == 1 else 1
  return max(math.ceil(ends[0] / step), 1)


def called_by(instruction: Instruction) -> str | None:
  """The computation that a fusion, a call or a loop is about, if any."""
  found = _CALLED.search(instruction.attributes)
  return found and found.group(1)


def followed(
  program: Program, instruction: Instruction, with_trips: bool = True
) -> Iterator[tuple[str, float]]:
  """Computations an instruction runs, with how often; fusions are not.

  Args:
    program: that has them.
    instruction: one of its instructions.
    with_trips: see `executions`.
  """
  if instruction.opcode == 'while':
    times = _trips(program, instruction) if with_trips else 1
    yield _CALLED.search(instruction.attributes).group(1), times
  elif instruction.opcode == 'conditional':
    names = _BRANCHES.search(instruction.attributes).group(1).split(',')
    # Which one is chosen is not known here: each counts in part.
    for name in names:
      yield name.strip().lstrip('%'), 1 / len(names)
  elif instruction.opcode in ('call', 'async-start'):
    yield _CALLED.search(instruction.attributes).group(1), 1


def executions(program: Program, with_trips: bool = True) -> dict[str, float]:
  """How often each computation is executed in one run of the program.

  Args:
    program: from `read_program`.
    with_trips: whether a loop counts as often as it runs (where the compiler
      knows), or once.
  """
  times: dict[str, float] = {}

  def visit(name, count):
    times[name] = times.get(name, 0) + count
    for instruction in program.computations[name].values():
      for called, factor in followed(program, instruction, with_trips):
        visit(called, count * factor)

  visit(program.entry, 1.0)
  return times


def _dot_flops(instruction: Instruction, siblings) -> float:
  _, dims = arrays(siblings[instruction.operands[0]].shape)[0]
  match = _CONTRACTED.search(instruction.attributes)
  axes = [int(x) for x in match.group(1).split(',') if x] if match else []
  _, result = arrays(instruction.shape)[0]
  return 2.0 * math.prod(result) * math.prod(dims[axis] for axis in axes)


def _read_of_operand(fused: dict[str, Instruction], index: int) -> int | None:
  """Bytes of a fusion's operand that is only sliced; None if all is read."""
  parameter = next(
    x.name
    for x in fused.values()
    if x.opcode == 'parameter' and x.operands == (str(index),)
  )
  total = 0
  for user in fused.values():
    if user.opcode == 'parameter' or parameter not in user.operands:
      continue
    if user.operands[0] != parameter or user.opcode not in SLICES:
      return None
    # What is updated in place is not read.
    if user.opcode != 'dynamic-update-slice':
      total += num_bytes(user.shape)
  return total


def _moved(instruction: Instruction, siblings, program: Program) -> float:
  """Bytes that an instruction reads and writes."""
  written = num_bytes(instruction.shape)
  read = [num_bytes(siblings[x].shape) for x in instruction.operands]
  if instruction.opcode == 'dynamic-update-slice':
    return 2 * read[1]
  if instruction.opcode in SLICES:
    return 2 * written
  if instruction.opcode == 'fusion':
    name = _CALLED.search(instruction.attributes).group(1)
    fused = program.computations[name]
    for index, size in enumerate(read):
      sliced = _read_of_operand(fused, index)
      read[index] = size if sliced is None else sliced
    root = next(x for x in fused.values() if x.is_root)
    if root.opcode == 'dynamic-update-slice':
      written = num_bytes(fused[root.operands[1]].shape)
  return written + sum(read)


def work(program: Program, with_trips: bool = True) -> Work:
  """Matrix products and bytes of one execution on one device.

  Args:
    program: from `read_program`.
    with_trips: see `executions`; without, bytes compare with XLA's own.
  """
  flops = moved = 0.0
  for name, times in executions(program, with_trips).items():
    siblings = program.computations[name]
    for instruction in siblings.values():
      if instruction.opcode == 'dot':
        flops += times * _dot_flops(instruction, siblings)
      if instruction.opcode == 'fusion':
        called = _CALLED.search(instruction.attributes).group(1)
        fused = program.computations[called]
        for inner in fused.values():
          if inner.opcode == 'dot':
            flops += times * _dot_flops(inner, fused)
      if instruction.opcode not in FREE:
        moved += times * _moved(instruction, siblings, program)
  return Work(flops, moved)
