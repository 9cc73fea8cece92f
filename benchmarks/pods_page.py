"""The tables of docs/scaling_on_paper.md, from records of benchmarks.pods."""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import record, scaling
from benchmarks.step import make_config, make_step
from cmd_jax.devices import sharding
from cmd_jax.errors import UserError
from cmd_jax.files.atomic import write_atomically

# A table of the page stands between these two lines.
_BEGIN = '<!-- made by benchmarks.pods: {} -->'
_END = '<!-- end of {} -->'
_STATES = {'replicated': 'whole', 'fsdp': 'FSDP'}

Record = Mapping[str, Any]


def _name(one: Record) -> str:
  program = one['program']
  slices = f'{program["slices"]} x ' if program['slices'] > 1 else ''
  overlap = ', sums overlapped' if program['overlap'] else ''
  return (
    f'{program["variant"]}, {_STATES[program["state"]]}, '
    f'{slices}{program["topology"]}{overlap}'
  )


def _num_chips(one: Record) -> int:
  sides = one['program']['topology'].partition(':')[2].split('x')
  return one['program']['slices'] * math.prod(map(int, sides))


def _compiled(records: Sequence[Record]) -> list[Record]:
  """Those of programs of which the compiler said everything."""
  return [x for x in records if 'memory_bytes' in x['found']]


def _gib(number: float | None) -> float | None:
  return number and number / 2**30


def memory_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
  """What a chip keeps, and whether it fits, a row for each program."""
  rows = []
  for one in records:
    found = one['found']
    memory = found.get('memory_bytes', {})
    rows.append(
      {
        'program': _name(one),
        'images a chip': one['program']['per_chip'],
        'remat': one['program']['remat'],
        'arguments, GiB': _gib(memory.get('arguments')),
        'temporaries, GiB': _gib(memory.get('temporaries')),
        'together, GiB': _gib(found.get('needed_bytes')),
        'outcome': ': '.join(
          x for x in (found['outcome'], found.get('why')) if x
        ),
      }
    )
  return rows


def time_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
  """Milliseconds by part as the compiler estimates them, a row a program."""
  rows = []
  for one in _compiled(records):
    time = one['found']['time']
    if time is None:
      continue
    parts = {
      part: 1e3 * seconds for part, seconds in time['seconds_by_part'].items()
    }
    flops = one['found']['flops_by_hand']
    rows.append(
      {
        'ms': _name(one),
        **parts,
        'kernels': 1e3 * time['kernels']['seconds'],
        '**computation**': 1e3 * time['seconds'],
        'TFLOP by hand': flops and sum(flops.values()) / 1e12,
        'ms at the peak': flops and 1e3 * one['found']['seconds_at_peak'],
      }
    )
  return rows


def collective_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
  """What is sent, a row for each program and kind."""
  rows = []
  for one in _compiled(records):
    if _num_chips(one) == 1:
      continue
    for kind in one['found']['collectives']:
      rows.append(
        {
          'program': _name(one),
          'collective': kind['kind'],
          'times': f'{kind["times"]:g}',
          'MB': kind['bytes'] / 1e6,
          'overlapped': f'{kind["overlapped"]:g}',
          'MB of these': kind['overlapped_bytes'] / 1e6,
          'ms by hand': 1e3 * kind['seconds'],
          'not hidden': 1e3 * kind['seconds_exposed'],
        }
      )
  return rows


def step_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
  """The step with what it waits for, a row for each program."""
  rows = []
  for one in _compiled(records):
    time, sent = one['found']['time'], one['found']['collectives']
    if time is None or _num_chips(one) == 1:
      continue
    computation = time['seconds']
    waits = {
      name: sum(x[name] for x in sent)
      for name in ('seconds', 'seconds_exposed')
    }
    step = computation + waits['seconds_exposed']
    rows.append(
      {
        'program': _name(one),
        'chips': str(_num_chips(one)),
        'computation, ms': 1e3 * computation,
        'sent, ms': 1e3 * waits['seconds'],
        'not hidden, ms': 1e3 * waits['seconds_exposed'],
        'efficiency, %': f'{100 * computation / step:.1f}',
        'if all were waited for': (
          f'{100 * computation / (computation + waits["seconds"]):.1f}'
        ),
        'images/s': one['found']['batch_size'] / step,
      }
    )
  return rows


def _traffic(one: Record) -> scaling.Traffic:
  """What `scaling` predicts from, of a program with data parallelism."""
  program = one['program']
  config = make_config(
    method='cmd',
    batch_size=1,
    num_prototypes=program['num_prototypes'],
    overrides=[f'model.variant={program["variant"]}'],
  )
  params = make_step(config, sharding.make_mesh(1)).state_like.params
  sums = [x for x in one['found']['collectives'] if x['kind'] == 'all-reduce']
  others = [x for x in one['found']['collectives'] if x not in sums]
  shapes = scaling.read_traffic([], params, program['per_chip'])
  return shapes._replace(
    sum_bytes=sum(x['bytes'] for x in sums),
    num_sums=round(sum(x['times'] for x in sums)),
    exchange_bytes=sum(x['bytes'] for x in others) / program['per_chip'],
    num_exchanges=round(sum(x['times'] for x in others)),
  )


def hand_tables(records: Sequence[Record]) -> dict[str, str]:
  """What other chips should do with the same bytes, by name of the table."""
  largest: dict[str, Record] = {}
  for one in _compiled(records):
    program = one['program']
    plain = program['state'] == 'replicated' and not program['overlap']
    if plain and program['slices'] == 1 and _num_chips(one) > 1:
      largest[program['variant']] = one
  efficiency, limits, assumed = [], [], []
  for variant, one in largest.items():
    program = one['program']
    config = make_config(
      method='cmd',
      batch_size=1,
      num_prototypes=program['num_prototypes'],
      overrides=[f'model.variant={variant}'],
    )
    traffic, per_chip = _traffic(one), program['per_chip']
    title = f'ViT-{variant}/16, {per_chip} images a chip'
    rows = scaling.efficiency_rows(traffic, config, per_chip)
    efficiency.append(f'{title}:\n\n{record.table(rows)}')
    rows = scaling.limit_rows(traffic, config, 256, per_chip)
    limits.append(f'{title}, 256 chips, ms:\n\n{record.table(rows)}')
    rows = scaling.utilisation_rows(traffic, config, 256, per_chip)
    assumed.append(f'{title}, 256 chips:\n\n{record.table(rows)}')
  return {
    'efficiency of other chips': '\n\n'.join(efficiency),
    'limits of other chips': '\n\n'.join(limits),
    'efficiency by utilisation': '\n\n'.join(assumed),
  }


def _origin(records: Sequence[Record]) -> str:
  """By what the programs were compiled."""
  said = sorted(
    {
      f'commit {x["commit"]}, JAX {x["versions"]["jax"]}, '
      f'libtpu {x["compiler"] or "unknown"}'
      for x in _compiled(records)
    }
  )
  return 'Compiled by: ' + '; '.join(said) + '.'


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
  return record.table(rows) if rows else 'No such program was compiled.'


def make_tables(records: Sequence[Record]) -> dict[str, str]:
  """The tables of the page in Markdown, by name.

  Args:
    records: of `benchmarks.pods`, one for each program.
  """
  return {
    'origin': _origin(records),
    'memory': _table(memory_rows(records)),
    'time by part': _table(time_rows(records)),
    'collectives': _table(collective_rows(records)),
    'step': _table(step_rows(records)),
    **{k: x or _table([]) for k, x in hand_tables(records).items()},
  }


def put_tables(page: str, tables: Mapping[str, str]) -> str:
  """A page with tables in place of those that it had.

  Args:
    page: Markdown, where each table stands between two comments with its name.
    tables: by name; one that the page has no place for is added at its end.

  Raises:
    UserError: a table begins and does not end.
  """
  for name, table in tables.items():
    begin, end = _BEGIN.format(name), _END.format(name)
    block = f'{begin}\n{table}\n{end}'
    if begin not in page:
      page = f'{page.rstrip()}\n\n## {name.capitalize()}\n{block}\n'
    elif end not in page:
      raise UserError(f'the page has {begin!r} but no {end!r}: add it below')
    else:
      pattern = re.escape(begin) + '.*?' + re.escape(end)
      page = re.sub(pattern, lambda _, b=block: b, page, flags=re.DOTALL)
  return page


def write_page(path: pathlib.Path, tables: Mapping[str, str]) -> None:
  """Makes the tables of a page anew, or a page of nothing but them."""
  old = path.read_text() if path.exists() else '# Scaling on paper\n'
  write_atomically(path, put_tables(old, tables))
