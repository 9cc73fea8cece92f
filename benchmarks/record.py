"""What every benchmark shares: its options, its table and its record.

A record says what was measured together with all that the numbers depend on:
the command, the date, the commit, the machine and the versions. Records are
kept in `benchmarks/results/<name>.json`, a list to which each run adds one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import psutil

from cmd_jax.errors import UserError
from cmd_jax.files.atomic import write_atomically

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / 'benchmarks' / 'results'
PACKAGES = ('cmd_jax', 'jax', 'jaxlib', 'flax', 'optax', 'numpy')
# Beyond so many columns a table is read better with a line a quantity.
MAX_COLUMNS = 8


class Run(NamedTuple):
  """A benchmark under way.

  Attributes:
    name: of the benchmark and of its file of records.
    options: what the command line says.
    load_before: load average of a minute when it started.
  """

  name: str
  options: argparse.Namespace
  load_before: float


def make_parser(doc: str) -> argparse.ArgumentParser:
  """A parser with the options that all benchmarks have.

  Args:
    doc: the benchmark's module docstring.
  """
  parser = argparse.ArgumentParser(
    description=doc,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    '--results',
    type=pathlib.Path,
    default=RESULTS,
    help='folder of the JSON files to which records are added',
  )
  return parser


def begin(
  name: str,
  parser: argparse.ArgumentParser,
  arguments: Sequence[str] | None = None,
) -> Run:
  """Reads the command line.

  Args:
    name: of the benchmark.
    parser: from `make_parser`, with the benchmark's own options.
    arguments: in place of the process's.
  """
  # What lacks one of the packages must not find out when all is measured.
  versions()
  return Run(name, parser.parse_args(arguments), os.getloadavg()[0])


def begin_with_others(
  name: str, parser: argparse.ArgumentParser
) -> tuple[Run, list[str]]:
  """Like `begin`; what the parser does not know is another program's."""
  options, others = parser.parse_known_args()
  return Run(name, options, os.getloadavg()[0]), others


def peak_memory_mib() -> int:
  """Largest resident set of this process so far, in MiB."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # Linux counts kibibytes, macOS bytes.
  return round(peak / (2**20 if sys.platform == 'darwin' else 2**10))


def _processor() -> str:
  lines = []
  if pathlib.Path('/proc/cpuinfo').exists():
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  names = (x.partition(':')[2] for x in lines if x.startswith('model name'))
  return next(names, platform.processor() or platform.machine()).strip()


def describe_machine() -> dict[str, Any]:
  """The processor, the cores this process may use, memory and JAX's devices.

  The devices are those of a JAX that runs already: asking would start one.
  """
  affinity = getattr(os, 'sched_getaffinity', None)
  machine = {
    'system': f'{platform.system()} {platform.machine()}',
    'processor': _processor(),
    'cores': len(affinity(0)) if affinity else os.cpu_count(),
    'memory_gib': round(psutil.virtual_memory().total / 2**30),
  }
  if 'jax' in sys.modules:
    import jax

    devices = jax.devices()
    machine['devices'] = f'{len(devices)} x {devices[0].device_kind}'
    machine['xla_flags'] = os.environ.get('XLA_FLAGS', '')
  return machine


def versions() -> dict[str, str]:
  """Versions of Python and of what the numbers depend on."""
  return {
    'python': platform.python_version(),
    **{name: metadata.version(name) for name in PACKAGES},
  }


def commit() -> str:
  """The commit, with `+` if files differ from it; empty outside of git."""
  git = ['git', '--no-optional-locks', '-C', str(REPOSITORY)]
  try:
    head = subprocess.run(
      [*git, 'rev-parse', '--short', 'HEAD'],
      capture_output=True,
      check=True,
      text=True,
    ).stdout.strip()
    changed = subprocess.run(
      [*git, 'status', '--porcelain', '--untracked-files=no', '--', '*.py'],
      capture_output=True,
      check=True,
      text=True,
    ).stdout
  except (OSError, subprocess.CalledProcessError):
    return ''
  return head + ('+' if changed else '')


def command_line(name: str, arguments: Sequence[str]) -> str:
  """The command; of paths only the last part, which says enough elsewhere.

  Args:
    name: of the benchmark.
    arguments: as given.
  """
  said = [
    re.sub(r'(^|=)/(?:[^/]+/)*', r'\1', argument.rstrip('/'))
    for argument in arguments
    if not argument.startswith('--results')
  ]
  return ' '.join(['python -m', f'benchmarks.{name}', *map(shlex.quote, said)])


def _cell(value: Any) -> str:
  if isinstance(value, bool) or not isinstance(value, float):
    return '' if value is None else str(value)
  if value and not 1e-3 <= abs(value) < 1e6:
    return f'{value:.2e}'
  return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.3g}'


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """A Markdown table; what is nested within a row is left to the record.

  Args:
    rows: what was measured; the first value of each names it. With more than
      `MAX_COLUMNS` values the table has a line for each instead.
  """
  names = dict.fromkeys(
    name
    for row in rows
    for name, value in row.items()
    if not isinstance(value, (Mapping, list, tuple))
  )
  lines = [[*names], *([_cell(row.get(n)) for n in names] for row in rows)]
  if len(names) > MAX_COLUMNS:
    lines = [list(line) for line in zip(*lines)]
  widths = [max(map(len, column)) for column in zip(*lines)]
  lines.insert(1, ['-' * width for width in widths])
  return '\n'.join(
    '| ' + ' | '.join(x.ljust(w) for x, w in zip(line, widths)) + ' |'
    for line in lines
  )


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The records of a file, none if it is not there.

  Raises:
    UserError: the file is no list of records.
  """
  if not path.exists():
    return []
  try:
    records = json.loads(path.read_text())
  except ValueError as error:
    raise UserError(f'{path} is not JSON ({error}): move it away') from error
  if not isinstance(records, list):
    raise UserError(f'{path} is no list of records: move it away')
  return records


def finish(
  run: Run,
  rows: Sequence[Mapping[str, Any]],
  *,
  show: bool = True,
  **facts: Any,
) -> dict[str, Any]:
  """Prints the table and adds the record to the benchmark's file.

  Args:
    run: from `begin`.
    rows: what was measured, JSON values.
    show: whether to print them; some benchmarks have tables of their own.
    **facts: what else belongs to the record.

  Returns:
    The record.
  """
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
  record = {
    'date': now,
    'commit': commit(),
    'command': command_line(run.name, sys.argv[1:]),
    'machine': describe_machine(),
    'versions': versions(),
    'load_average': [
      round(load, 1) for load in (run.load_before, os.getloadavg()[0])
    ],
    'peak_memory_mib': peak_memory_mib(),
    **facts,
    'rows': list(rows),
  }
  run.options.results.mkdir(parents=True, exist_ok=True)
  path = run.options.results / f'{run.name}.json'
  records = [*read(path), record]
  write_atomically(path, json.dumps(records, indent=2) + '\n')
  if show:
    print(table(rows))
  print(f'added to {path}', file=sys.stderr)
  return record


def run_main(main: Callable[[], None]) -> None:
  """Calls a benchmark's main; a mistake of the user is one line."""
  try:
    main()
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
