"""Trains a config with several seeds and prints mean and range of the gain.

  python benchmarks/seeds.py --config=configs/toybirds.py --workdir=runs/seeds \
    --seeds=0,1,2 [--config.field=value ...]

Every other argument goes to main.py. Runs that are finished are not repeated.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys

import numpy as np

MAIN = pathlib.Path(__file__).parent.parent / 'main.py'


def main() -> None:
  """Runs the seeds one after another and prints JSON."""
  parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
  parser.add_argument('--workdir', required=True, type=pathlib.Path)
  parser.add_argument('--seeds', default='0,1,2')
  arguments, others = parser.parse_known_args()
  results = []
  for seed in arguments.seeds.split(','):
    workdir = arguments.workdir / f'seed{seed}'
    command = [sys.executable, MAIN, f'--workdir={workdir}', *others]
    subprocess.run([*command, f'--config.seed={seed}'], check=True)
    results.append(json.loads((workdir / 'results.json').read_text()))
  summary = {}
  for name in results[0]['final']:
    init, final = (
      np.array([100 * result[when][name] for result in results])
      for when in ('init', 'final')
    )
    summary[name] = {
      'init': [round(x, 1) for x in init.tolist()],
      'final': [round(x, 1) for x in final.tolist()],
      'mean_gain': round(float(np.mean(final - init)), 1),
      'least_gain': round(float(np.min(final - init)), 1),
    }
  summary['seconds'] = [result['seconds'] for result in results]
  summary['images_per_second'] = [r['images_per_second'] for r in results]
  peak_kb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
  summary['peak_memory_mb'] = round(peak_kb / 1024)
  print(json.dumps(summary, indent=2))


if __name__ == '__main__':
  main()
