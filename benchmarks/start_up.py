"""Seconds from the command to the first step, with and without a warm cache.

  python -m benchmarks.start_up [--against=CHECKOUT] [--repeats=1]
    [-- FLAGS OF main.py]

Starts `python main.py --config=configs/toybirds.py` in fresh processes, first
with an empty compilation cache, then with the one that this left, and ends it
after its first step. The moments are those at which the program and JAX's own
log say so, beside the processor seconds spent until then: on a machine that
does other work the latter tell more. The first step is reported two steps late,
as in every run. The data set is drawn beforehand. With --against another
checkout takes turns with this one.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO

import psutil

from benchmarks import record
from cmd_jax.errors import UserError

# What a line of the log tells, in the usual order.
MARKS = {
  'data ready': re.compile(r' training and \d+ test images'),
  'initial state compiled': re.compile(r'XLA compilation of jit\(init\)'),
  'step compiled': re.compile(r'XLA compilation of jit\(step\)'),
  'batches compiled': re.compile(r'XLA compilation of jit\(draw\)'),
  'first step': re.compile(r'^step 1 '),
}
DEADLINE_SECONDS = 600


def _prepare(config: str) -> float:
  """Draws the data set where that has not been done; returns the seconds."""
  start = time.perf_counter()
  command = [sys.executable, 'main.py', '--mode=prepare', f'--config={config}']
  subprocess.run(
    command, cwd=record.REPOSITORY, check=True, stdout=subprocess.DEVNULL
  )
  return time.perf_counter() - start


def _watch(
  process: psutil.Popen, lines: IO[str], start: float
) -> dict[str, tuple[float, float]]:
  """Wall and processor seconds at each of the marks, till the last."""
  found, said = {}, []
  for line in lines:
    said.append(line)
    for name, pattern in MARKS.items():
      if name not in found and pattern.search(line):
        times = process.cpu_times()
        found[name] = time.perf_counter() - start, times.user + times.system
    if 'first step' in found or time.perf_counter() - start > DEADLINE_SECONDS:
      break
  if 'first step' not in found:
    raise UserError(f'no first step: {"".join(said[-5:])}')
  return found


def _start(
  checkout: pathlib.Path,
  config: str,
  cache: pathlib.Path,
  extra: Sequence[str],
) -> dict[str, tuple[float, float]]:
  """One start in a new work directory; what `_watch` saw of it."""
  with tempfile.TemporaryDirectory() as workdir:
    command = [
      sys.executable,
      'main.py',
      f'--config={config}',
      f'--workdir={workdir}/run',
      f'--compilation_cache={cache}',
      '--config.log.every_steps=1',
      *extra,
    ]
    start = time.perf_counter()
    process = psutil.Popen(
      command,
      cwd=checkout,
      env={**os.environ, 'JAX_LOG_COMPILES': '1'},
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      # Progress bars end their lines with carriage returns.
      universal_newlines=True,
    )
    try:
      return _watch(process, process.stderr, start)
    finally:
      process.kill()
      process.communicate()


def _row(
  name: str, found: dict[str, tuple[float, float]]
) -> dict[str, str | float]:
  """A row of the table: wall seconds, and at the end processor seconds."""
  row = {'start': name}
  row |= {mark: round(found[mark][0], 2) for mark in MARKS if mark in found}
  row['processor, first step'] = round(found['first step'][1], 2)
  return row


def main() -> None:
  """Measures, prints and writes."""
  parser = record.make_parser(__doc__)
  parser.add_argument('--config', default='configs/toybirds.py')
  parser.add_argument('--repeats', type=int, default=1)
  parser.add_argument('--against', type=pathlib.Path)
  parser.add_argument('flags', nargs='*', help='flags of main.py, after --')
  run = record.begin('start_up', parser)
  options = run.options
  drawn = _prepare(options.config)
  checkouts = {'': record.REPOSITORY}
  if options.against:
    checkouts = {'against ': options.against.resolve(), **checkouts}
  rows = []
  for _ in range(options.repeats):
    for name, checkout in checkouts.items():
      with tempfile.TemporaryDirectory() as cache:
        for state in ('cold', 'warm'):
          found = _start(
            checkout, options.config, pathlib.Path(cache), options.flags
          )
          rows.append(_row(f'{name}{state}', found))
  record.finish(run, rows, seconds_to_prepare_data=round(drawn, 2))


if __name__ == '__main__':
  record.run_main(main)
