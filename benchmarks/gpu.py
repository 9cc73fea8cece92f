"""All that needs a GPU, in one call of less than ten minutes.

  python -m benchmarks.gpu [--seconds=570]

Runs the attention over prototypes by kernels and by XLA's tiles, the train
step with each of them (ViT-S/16, K = 65,536, bfloat16, 64 images; 128 with the
tiles), augmentation and k-means, each in a process of its own, and prints one
table.
What does not fit into the time or fails is a row that says so.
"""

from __future__ import annotations

import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from benchmarks import record
from cmd_jax.errors import UserError

STEP = (
  '--variant=S',
  '--dtype=bfloat16',
  '--num_prototypes=65536',
  '--steps=10',
  '--parts',
)
STEPS = (
  ('--batch_size=64',),
  ('--batch_size=64', '--set=parallel.kernels=pallas'),
  ('--batch_size=128',),
)
ASK = 'import jax; d = jax.devices()[0]; print(d.platform, d.device_kind)'
COLUMNS = (
  'ms, best',
  'gradients apart',
  'values apart',
  'images_per_second',
  'share_of_matmul_ceiling',
  'share_of_attainable',
  'share_of_matmul_ceiling_encoder',
  'share_augmentation',
  'share_waiting_for_host',
  'device_peak_mib',
)


def jobs() -> list[tuple[str, tuple[str, ...]]]:
  """(benchmark, its options) in the order of their worth."""
  return [
    ('prototype_kernels', ()),
    *(('train_step', (*STEP, *options)) for options in STEPS),
    ('augmentation', ('--images=128', '--no-pillow')),
    ('kmeans', ('--images=16', '--rounds=2')),
  ]


def find_gpu() -> str:
  """Name of the GPU; asked in another process, as JAX would keep its memory.

  Raises:
    UserError: there is none.
  """
  asked = subprocess.run(
    [sys.executable, '-c', ASK], capture_output=True, text=True, check=False
  )
  platform, _, kind = asked.stdout.strip().partition(' ')
  if platform != 'gpu':
    raise UserError(
      f'JAX sees no GPU but {platform or "nothing"}: install the extra '
      "'cuda' (pip install 'cmd_jax[cuda]') on a machine that has one"
    )
  return kind


def run_job(
  name: str, options: Sequence[str], results: pathlib.Path, seconds: float
) -> list[dict[str, Any]]:
  """Rows of a benchmark run in a process of its own.

  Args:
    name: of the benchmark.
    options: of it.
    results: folder of the records.
    seconds: after which it is given up.
  """
  label = ' '.join([name, *(x for x in options if x not in STEP)])
  command = [sys.executable, '-m', f'benchmarks.{name}', *options]
  try:
    done = subprocess.run(
      [*command, f'--results={results}'],
      cwd=record.REPOSITORY,
      capture_output=True,
      text=True,
      timeout=max(seconds, 1),
      check=False,
    )
  except subprocess.TimeoutExpired:
    return [{'run': label, 'failed': 'no time left'}]
  if done.returncode:
    reason = (done.stderr.strip().splitlines() or ['no reason given'])[-1]
    return [{'run': label, 'failed': reason[:200]}]
  rows = record.read(results / f'{name}.json')
  return [
    {'run': label, 'of': next(iter(row.values())), **_shown(row)}
    for row in rows[-1]['rows']
  ]


def _shown(row: dict[str, Any]) -> dict[str, Any]:
  return {name: row[name] for name in COLUMNS if name in row}


def main() -> None:
  """Runs everything, prints and writes."""
  parser = record.make_parser(__doc__)
  parser.add_argument('--seconds', type=float, default=570.0)
  run = record.begin('gpu', parser)
  kind, start, rows = find_gpu(), time.monotonic(), []
  for name, options in tqdm(jobs(), unit='run'):
    left = run.options.seconds - (time.monotonic() - start)
    rows += run_job(name, options, run.options.results.resolve(), left)
  record.finish(run, rows, gpu=kind)


if __name__ == '__main__':
  record.run_main(main)
