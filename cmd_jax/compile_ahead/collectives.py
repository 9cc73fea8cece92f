"""What the devices of a compiled program send each other, and when.

A collective is overlapped if the program starts it in one place and waits for
it in another, with computation in between. Compilers write that in several
ways:

- as a pair of instructions, `all-gather-start` and `all-gather-done`, or
  `async-start` and `async-done` of a computation that is the collective;
- on TPUs as fusions: one that holds the collective and a custom call
  `AsyncCollectiveStart`, any number that hold the same collective (by its
  channel) beside computation, and one with `AsyncCollectiveDone`;
- between TPU slices as a `send` to the runtime, which sums, and a `recv`;
- not at all: an instruction, or a fusion around it, that ends when all have
  sent and received.

Programs are scheduled: instructions run in the order in which they stand, so
that what stands between start and end is what can hide a collective.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

from cmd_jax.compile_ahead import hlo

KINDS = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
  'collective-broadcast',
  'send',
)
_CHANNEL = re.compile(r'channel_id=(\d+)')
_PROMOTED = re.compile(r'to_apply=%?[\w.-]*promoted')
_START = 'custom_call_target="AsyncCollectiveStart"'
_DONE = 'custom_call_target="AsyncCollectiveDone"'
# Devices that communicate: {{0,1},{2,3}}, [2,2]<=[4], or axes of a mesh.
_LISTED = re.compile(r'replica_groups=\{\{([\d,]*)\}')
_TILED = re.compile(r'replica_groups=\[(\d+),(\d+)\]<=')
_MESH = re.compile(r'replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}')
_AXIS = re.compile(r"'([^']*)'=(\d+)")


class Collective(NamedTuple):
  """Communication of one device.

  Attributes:
    kind: one of `KINDS`.
    num_bytes: of the whole arrays: what a reduction or an exchange is given,
      what a gathering results in. Once.
    times: how often it is executed.
    is_promoted: whether XLA for CPU made it float32 from a smaller type, of
      which other devices would send fewer bytes.
    group: devices that take part; None where the program does not say, which
      is all of them, or a pair.
    between: what stands between its start and its end, in the unit of the
      function that weighed the instructions; None if it is not overlapped.
  """

  kind: str
  num_bytes: int
  times: float
  is_promoted: bool
  group: int | None = None
  between: float | None = None

  @property
  def is_overlapped(self) -> bool:
    """Whether it is started in one place and waited for in another."""
    return self.between is not None


class _Place(NamedTuple):
  """A collective within its computation.

  Attributes:
    kind: one of `KINDS`.
    instruction: the collective itself.
    siblings: instructions of its computation, by name.
    step: 'start', 'inside' or 'done' of a pair, or 'whole'.
    key: what start and end of a pair have in common.
  """

  kind: str
  instruction: hlo.Instruction
  siblings: dict[str, hlo.Instruction]
  step: str
  key: str


def group_size(attributes: str) -> int | None:
  """Devices of a group in the attributes of a collective; None if unsaid."""
  if found := _LISTED.search(attributes):
    return len(found.group(1).split(','))
  if found := _TILED.search(attributes):
    return int(found.group(2))
  if found := _MESH.search(attributes):
    sizes = dict(_AXIS.findall(found.group(1)))
    names = re.findall(r"'([^']*)'", found.group(2))
    return math.prod(int(sizes[name]) for name in names)
  return None


def _bytes(place: _Place) -> int:
  instruction, siblings = place.instruction, place.siblings
  size = hlo.num_bytes(instruction.shape)
  if instruction.opcode.startswith('all-reduce'):
    return size
  given = sum(hlo.num_bytes(siblings[x].shape) for x in instruction.operands)
  if place.kind == 'all-gather':
    # A start's result has the operand beside it.
    return size - given * instruction.opcode.endswith('-start')
  return given


def _within(program: hlo.Program, outer: hlo.Instruction) -> _Place | None:
  """The collective that a fusion or an `async-start` is about."""
  name = hlo.called_by(outer)
  siblings = program.computations.get(name, {}) if name else {}
  found = next((x for x in siblings.values() if x.opcode in KINDS), None)
  if found is None:
    return None
  kind = found.opcode
  # A TPU's reduce-scatter is a fusion of a sum and the slice that is kept.
  opcodes = {x.opcode for x in siblings.values()}
  if kind == 'all-reduce' and 'dynamic-slice' in opcodes:
    kind = 'reduce-scatter'
  if outer.opcode == 'async-start':
    return _Place(kind, found, siblings, 'start', outer.name)
  text = ' '.join(x.attributes for x in siblings.values())
  channel = _CHANNEL.search(found.attributes)
  step = 'start' if _START in text else 'done' if _DONE in text else 'inside'
  return _Place(
    kind, found, siblings, step, channel.group(1) if channel else ''
  )


def _place(
  program: hlo.Program,
  instruction: hlo.Instruction,
  siblings: dict[str, hlo.Instruction],
) -> _Place | None:
  """What an instruction has to do with a collective, if anything."""
  opcode = instruction.opcode
  kind = opcode.removesuffix('-start').removesuffix('-done')
  if kind in KINDS:
    if opcode.endswith('-done'):
      (start,) = instruction.operands
      return _Place(kind, instruction, siblings, 'done', start)
    starts = opcode.endswith('-start') or opcode == 'send'
    step = 'start' if starts else 'whole'
    return _Place(kind, instruction, siblings, step, instruction.name)
  if opcode == 'async-done':
    (start,) = instruction.operands
    return _Place('', instruction, siblings, 'done', start)
  if opcode in ('fusion', 'async-start'):
    return _within(program, instruction)
  return None


def _total(
  program: hlo.Program,
  weigh: Callable[[hlo.Instruction, dict[str, hlo.Instruction]], float],
) -> Callable[[hlo.Instruction, dict[str, hlo.Instruction]], float]:
  """Weighs instructions together with the computations that they run."""
  known: dict[str, float] = {}

  def of_computation(name):
    if name not in known:
      siblings = program.computations[name]
      known[name] = sum(total(x, siblings) for x in siblings.values())
    return known[name]

  def total(instruction, siblings):
    return weigh(instruction, siblings) + sum(
      times * of_computation(name)
      for name, times in hlo.followed(program, instruction)
    )

  return total


def read_collectives(
  program: hlo.Program,
  weigh: Callable[
    [hlo.Instruction, dict[str, hlo.Instruction]], float
  ] = lambda instruction, siblings: 0.0,
) -> list[Collective]:
  """All communication of a program, each pair once.

  Args:
    program: from `hlo.read_program`.
    weigh: (instruction, those of its computation by name) -> how long it
      takes, in any unit; loops are weighed by what is in them.
  """
  total = _total(program, weigh)
  starts = [
    (x, place.key)
    for siblings in program.computations.values()
    for x in siblings.values()
    if (place := _place(program, x, siblings)) and place.step == 'start'
  ]
  started = {key for _, key in starts}
  # An `async-start` runs a computation that has the collective once more.
  wrappers = {hlo.called_by(x) for x, _ in starts if x.opcode == 'async-start'}
  found = []
  for name, times in hlo.executions(program).items():
    if name in wrappers:
      continue
    siblings, clock, open_ = program.computations[name], 0.0, {}
    for instruction in siblings.values():
      place = _place(program, instruction, siblings)
      if place and place.step == 'start':
        # What is computed in the fusion that starts it is beside it, too.
        open_[place.key] = place, clock
      clock += total(instruction, siblings)
      if not place or place.step == 'start':
        continue
      if place.step == 'whole' or (
        place.step == 'inside' and place.key not in started
      ):
        found.append(_collective(place, times, None))
      elif place.step == 'done' and place.key in open_:
        start, since = open_.pop(place.key)
        found.append(_collective(start, times, clock - since))
    # What is not waited for within its computation is overlapped with the rest
    # of it.
    found += [
      _collective(start, times, clock - since)
      for start, since in open_.values()
    ]
  return found


def _collective(
  place: _Place, times: float, between: float | None
) -> Collective:
  attributes = place.instruction.attributes
  return Collective(
    place.kind,
    _bytes(place),
    times,
    _PROMOTED.search(attributes) is not None,
    group_size(attributes),
    between,
  )
