"""Trains a config with several seeds and prints mean and range of the gain.

  python -m benchmarks.seeds --config=configs/toybirds.py --workdir=runs/seeds \
    --seeds=0,1,2 [--config.field=value ...]

Every other argument goes to main.py. Runs that are finished are not repeated.
"""

from __future__ import annotations

import json
import pathlib
import resource
import subprocess
import sys

import numpy as np

from benchmarks import record

MAIN = pathlib.Path(__file__).parent.parent / 'main.py'


def summarise(results: list[dict]) -> list[dict]:
  """A row for each metric, in per cent, from the results of all seeds."""
  rows = []
  for name in results[0]['final']:
    init, final = (
      np.array([100 * result[when][name] for result in results])
      for when in ('init', 'final')
    )
    rows.append(
      {
        'per cent': name,
        'untrained': ' '.join(f'{x:.1f}' for x in init),
        'trained': ' '.join(f'{x:.1f}' for x in final),
        'gain, mean': float(np.mean(final - init)),
        'gain, least': float(np.min(final - init)),
      }
    )
  return rows


def main() -> None:
  """Runs the seeds one after another, prints and writes."""
  parser = record.make_parser(__doc__)
  parser.add_argument('--workdir', required=True, type=pathlib.Path)
  parser.add_argument('--seeds', default='0,1,2')
  run, others = record.begin_with_others('seeds', parser)
  options = run.options
  results = []
  for seed in options.seeds.split(','):
    workdir = options.workdir / f'seed{seed}'
    command = [sys.executable, MAIN, f'--workdir={workdir}', *others]
    subprocess.run([*command, f'--config.seed={seed}'], check=True)
    results.append(json.loads((workdir / 'results.json').read_text()))
  peak_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
  record.finish(
    run,
    summarise(results),
    seconds=[result['seconds'] for result in results],
    images_per_second=[r.get('images_per_second') for r in results],
    peak_memory_mib_of_runs=round(peak_kib / 1024),
  )


if __name__ == '__main__':
  record.run_main(main)
