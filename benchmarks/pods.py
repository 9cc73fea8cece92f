"""The train step compiled for TPU pods that are not here, and what it sends.

  pip install -c constraints.txt '.[tpu]'
  python -m benchmarks.pods --output=docs/scaling_on_paper.md

Compiles the step of a run (config `cub`, CMD, 2 x 224 and 8 x 96 views,
bfloat16) by the chips' own compiler for each combination of --topologies,
--variants and --states, and reads from the program: memory, the compiler's
estimate of the time by part, and what the chips send each other, with what is
computed meanwhile (cmd_jax/compile_ahead). Each program is compiled in a
process of its own, takes minutes, and is a record in
benchmarks/results/pods.json: the same command again goes on where it was
stopped. A program whose compiler was killed or took longer than --limit_s is a
record that says so, and is tried again.

Then the tables of --output are made from the records (benchmarks/pods_page.py).
Nothing in them is measured: no program ran.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import math
import multiprocessing
import pathlib
import sys
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from benchmarks import interconnects, pods_page, record
from benchmarks.interconnects import collective_seconds
from cmd_jax.cli.option_table import default_cache
from cmd_jax.compile_ahead import report, targets
from cmd_jax.compile_ahead.compiled import Compiled, compile_for, showing_time
from cmd_jax.compile_ahead.step import lower_step
from cmd_jax.config import builtin
from cmd_jax.devices import sharding
from cmd_jax.errors import UserError

# Activations of a ViT-L take several times a chip's memory.
REMAT = {'L': 'full'}
# By itself a TPU's compiler joins the sums of all gradients into one, which can
# begin only when the last gradient is there. Smaller ones can be under way
# beside the computation, if it is asked for.
OVERLAP = {
  'xla_enable_async_all_reduce': True,
  'xla_tpu_enable_async_collective_fusion_fuse_all_reduce': True,
  'xla_jf_crs_combiner_threshold_in_bytes': 4_000_000,
}


class Program(NamedTuple):
  """What is compiled.

  Attributes:
    topology: see `targets.find_target`.
    variant: of the ViT.
    state: config.parallel.state.
    remat: config.model.remat.
    per_chip: images of a chip.
    num_prototypes: K.
    overlap: whether the compiler is given `OVERLAP`.
    slices: config.parallel.num_slices.
    words: of the config, after `cub:`.
  """

  topology: str
  variant: str
  state: str
  remat: str
  per_chip: int
  num_prototypes: int
  overlap: bool = False
  slices: int = 1
  words: str = ''

  @property
  def sides(self) -> tuple[int, ...]:
    """Chips along each axis of a slice."""
    return tuple(map(int, self.topology.partition(':')[2].split('x')))

  @property
  def num_chips(self) -> int:
    """Chips of all slices."""
    return self.slices * math.prod(self.sides)

  def __str__(self) -> str:
    slices = f'{self.slices} x ' if self.slices > 1 else ''
    overlap = ', sums overlapped' * self.overlap
    return f'ViT-{self.variant}, {self.state}{overlap}, {slices}{self.topology}'


def make_config(program: Program) -> ConfigDict:
  """The config of the run whose step is compiled."""
  config = builtin.cub(program.words).unlock()
  config.model.variant = program.variant
  config.model.remat = program.remat
  config.head.num_prototypes = program.num_prototypes
  config.batch_size = program.per_chip * program.num_chips
  config.parallel.state = program.state
  config.parallel.num_slices = program.slices
  return config.lock()


def add_waiting(
  sent: list[dict[str, Any]], chip: interconnects.Chip, sides: tuple[int, ...]
) -> list[dict[str, Any]]:
  """What is sent, by kind, with the time that it takes and that is waited for.

  Args:
    sent: as in `report.gather`.
    chip: with published figures.
    sides: of the slice.

  Returns:
    For each kind its count, bytes, and seconds by hand; what of them is
    overlapped; and the seconds that nothing hides: all of a collective that is
    not overlapped, of another one what is longer than the computation between
    its start and its end. Collectives that are under way at once are taken as
    if each had the links for itself.
  """
  found: dict[str, dict[str, Any]] = {}
  for one in sent:
    kind = found.setdefault(
      one['kind'],
      {
        'kind': one['kind'],
        'times': 0.0,
        'bytes': 0.0,
        'overlapped': 0.0,
        'overlapped_bytes': 0.0,
        'seconds': 0.0,
        'seconds_exposed': 0.0,
      },
    )
    seconds = collective_seconds(
      one['kind'], one['bytes'], one['group'], chip, sides
    )
    between = one['seconds_between']
    kind['times'] += one['times']
    kind['bytes'] += one['times'] * one['bytes']
    kind['seconds'] += one['times'] * seconds
    kind['seconds_exposed'] += one['times'] * max(seconds - (between or 0), 0)
    if between is not None:
      kind['overlapped'] += one['times']
      kind['overlapped_bytes'] += one['times'] * one['bytes']
  return sorted(found.values(), key=lambda x: -x['bytes'])


def _network(kind: str) -> interconnects.Chip:
  """The published figures of a kind of TPU."""
  return next(x for x in interconnects.CHIPS if x.name == f'TPU {kind}')


def _largest(sent: list[dict[str, Any]], count: int = 12) -> list[dict]:
  """The collectives that send most."""
  ordered = sorted(sent, key=lambda x: -x['times'] * x['bytes'])
  return ordered[:count]


def gather(program: Program, target: targets.Target, compiled: Compiled):
  """What is recorded of a program.

  Args:
    program: that was compiled.
    target: its chips.
    compiled: what the compiler said.
  """
  if not compiled.text:
    return {'outcome': 'does not fit', 'needed_bytes': compiled.needed}
  facts = report.gather(
    make_config(program), target, program.num_chips, compiled, None
  )
  sent = facts.pop('sent')
  facts['collectives'] = add_waiting(
    sent, _network(target.chip.name), program.sides
  )
  facts['largest'] = _largest(sent)
  fits = 'fits' if facts['fits'] else 'does not fit'
  return {'outcome': fits, 'needed_bytes': compiled.needed, **facts}


def compile_program(program: Program, cache: str | None) -> dict[str, Any]:
  """Compiles a step and says what it takes.

  Args:
    program: what is compiled.
    cache: folder in which the compiler's answers are kept; None keeps none.

  Raises:
    UserError: no such topology, no compiler, or one that refuses the step.
  """
  targets.prepare_process()
  target = targets.find_target(program.topology, program.slices)
  if program.overlap:
    target = target._replace(compiler_options=OVERLAP)
  mesh = sharding.make_mesh(0, target.devices, program.slices)
  with showing_time(f'{program}: tracing'):
    lowered = lower_step(make_config(program), mesh)
  with showing_time(f'{program}: compiling'):
    compiled = compile_for(lowered, target, cache)
  return gather(program, target, compiled)


def _answer(connection, program: Program, cache: str | None) -> None:
  try:
    connection.send(compile_program(program, cache))
  except UserError as error:
    connection.send({'outcome': 'not compiled', 'why': str(error)})


def compile_apart(
  program: Program, cache: str | None, limit_s: float, target=_answer
) -> dict[str, Any]:
  """Like `compile_program`, in a process of its own.

  Its memory is given back, and a compiler that is killed for want of memory
  takes no other program with it.

  Args:
    program: what is compiled.
    cache: see `compile_program`.
    limit_s: seconds after which it is given up.
    target: what the process runs.
  """
  context = multiprocessing.get_context('spawn')
  mine, its = context.Pipe(duplex=False)
  process = context.Process(
    target=target, args=(its, program, cache), daemon=True
  )
  process.start()
  its.close()
  found = None
  with contextlib.suppress(EOFError):
    found = mine.recv() if mine.poll(limit_s) else {}
  if found == {}:
    process.kill()
    process.join()
    why = f'given up after {limit_s:,.0f} s'
    return {'outcome': 'not compiled', 'why': why}
  process.join()
  if found is None:
    code = process.exitcode
    why = f'its process ended with exit code {code}'
    if code == -9:
      why = 'its process was killed, as for want of memory'
    return {'outcome': 'not compiled', 'why': why}
  return found


def compiler_version() -> str:
  """The version of the TPU's compiler; empty if it is not installed."""
  with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    return importlib.metadata.version('libtpu')
  return ''


def find_record(
  records: list[dict[str, Any]], program: Program
) -> dict[str, Any] | None:
  """The newest record of a program by the versions of now, if it was compiled.

  Where there is no compiler the version of the record's is not asked for.

  Args:
    records: as `record.read` has them.
    program: that is looked for.
  """
  version = compiler_version()
  for one in reversed(records):
    if (
      one['program'] == {**program._asdict()}
      and one['versions']['jax'] == jax.__version__
      and version in (one['compiler'], '')
      and one['found']['outcome'] != 'not compiled'
    ):
      return one
  return None


def plan(options: argparse.Namespace) -> list[Program]:
  """The programs that the options name, in their order.

  Data parallelism over the last topology is compiled with `OVERLAP`, too: its
  sums are the ones that the compiler does not overlap by itself.
  """
  programs = [
    Program(
      topology,
      variant,
      state,
      REMAT.get(variant, 'none'),
      options.per_chip,
      options.num_prototypes,
      slices=int(slices),
    )
    for slices in options.slices.split(',')
    for topology in options.topologies.split(',')
    for variant in options.variants.split(',')
    for state in options.states.split(',')
  ]
  if not options.overlap:
    return programs
  last = programs[-1].topology
  return programs + [
    x._replace(overlap=True)
    for x in programs
    if x.topology == last and x.state == 'replicated' and x.slices == 1
  ]


def make_record(run: record.Run, program: Program) -> dict[str, Any]:
  """Compiles a program and adds its record."""
  found = compile_apart(program, run.options.cache, run.options.limit_s)
  return record.finish(
    run,
    pods_page.memory_rows([{'program': program._asdict(), 'found': found}]),
    program=program._asdict(),
    compiler=compiler_version(),
    found=found,
  )


def main() -> None:
  """Compiles what has no record, then makes the tables."""
  parser = record.make_parser(__doc__)
  parser.add_argument('--topologies', default='v5e:2x4,v5e:16x16')
  parser.add_argument('--variants', default='S,L')
  parser.add_argument('--states', default='replicated,fsdp')
  parser.add_argument('--slices', default='1')
  parser.add_argument(
    '--overlap', action=argparse.BooleanOptionalAction, default=True
  )
  parser.add_argument('--per_chip', type=int, default=32)
  parser.add_argument('--num_prototypes', type=int, default=65536)
  parser.add_argument('--limit_s', type=float, default=3600)
  parser.add_argument(
    '--cache',
    default=default_cache(),
    help="folder in which the compiler's answers are kept; empty for none",
  )
  parser.add_argument(
    '--again', action='store_true', help='compile what has a record, too'
  )
  parser.add_argument(
    '--compile',
    action=argparse.BooleanOptionalAction,
    default=True,
    help='with --no-compile the tables are made from the records there are',
  )
  parser.add_argument(
    '--output', type=pathlib.Path, help='Markdown page whose tables are made'
  )
  run = record.begin('pods', parser)
  path, records = run.options.results / 'pods.json', []
  programs = plan(run.options)
  for program in programs:
    kind, _ = targets.parse_name(program.topology)
    if kind not in targets.TPUS:
      raise UserError(
        f'--topologies={program.topology} is of no TPU: choose one of '
        f'{", ".join(targets.TPUS)}, as in v5e:16x16'
      )
    if program.slices > 1 and not _network(kind).network:
      raise UserError(
        f'--slices={program.slices}: what connects slices of {kind} is not '
        'known: leave it at 1'
      )
  for number, program in enumerate(programs, 1):
    print(f'{number} of {len(programs)}: {program}', file=sys.stderr)
    known = find_record(record.read(path), program)
    if known and not run.options.again:
      print('has a record', file=sys.stderr)
    elif run.options.compile:
      known = make_record(run, program)
    else:
      found = {'outcome': 'not compiled', 'why': 'not tried'}
      known = {'program': program._asdict(), 'found': found}
    records.append(known)
  tables = pods_page.make_tables(records)
  if run.options.output:
    pods_page.write_page(run.options.output, tables)
  else:
    print('\n\n'.join(tables.values()))


if __name__ == '__main__':
  record.run_main(main)
