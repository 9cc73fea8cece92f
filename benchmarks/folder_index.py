"""Listing a folder of a million images: at the first start and later ones.

  python -m benchmarks.folder_index --scratch=FOLDER [--images=1000000]

Makes empty files in class folders below a scratch folder, lists them as the
program does (both splits, each in a process of its own so that memory is its
own), again with the index that was kept, and deletes them. `os.scandir` alone
over the same folders is the bound of the file system.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from benchmarks import record

PER_FOLDER = 1000
# Times and the largest resident set size of one start.
START = """
import json, resource, sys, time
from cmd_jax.data.sources.folder import folder_source
def memory():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, start = memory(), time.perf_counter()
sizes = [
  len(folder_source(sys.argv[1], split, index_file=sys.argv[2]).file_names)
  for split in ('pretrain', 'test')
]
print(json.dumps({
  'seconds': time.perf_counter() - start,
  'memory_mib': memory(),
  'memory_before_mib': before,
  'images': sizes,
}))
"""


def make_files(root: pathlib.Path, count: int) -> None:
  """Empty files in folders of a thousand."""
  for first in range(0, count, PER_FOLDER):
    folder = root / f'class_{first // PER_FOLDER:05d}'
    folder.mkdir(parents=True)
    for number in range(first, min(first + PER_FOLDER, count)):
      os.close(os.open(folder / f'image_{number:08d}.jpg', os.O_CREAT))
    # As if it were there for long: an index is kept of what is at rest.
    os.utime(folder, (0, 0))
  os.utime(root, (0, 0))


def scan(root: pathlib.Path) -> float:
  """Seconds that reading the folders takes."""
  start = time.perf_counter()
  for folder in os.scandir(root):
    with os.scandir(folder) as entries:
      for entry in entries:
        entry.is_file()
  return time.perf_counter() - start


def start(root: pathlib.Path, index: pathlib.Path) -> dict:
  """What one start measures, in a process of its own."""
  command = [sys.executable, '-c', START, str(root), str(index)]
  return json.loads(subprocess.run(command, check=True, stdout=-1).stdout)


def main() -> None:
  """Measures, prints and writes."""
  parser = record.make_parser(__doc__)
  parser.add_argument('--scratch', required=True)
  parser.add_argument('--images', type=int, default=1_000_000)
  run = record.begin('folder_index', parser)
  arguments = run.options
  folder = pathlib.Path(tempfile.mkdtemp(dir=arguments.scratch))
  try:
    root, index = folder / 'images', folder / 'index.npz'
    make_files(root, arguments.images)
    rows = [
      {'what': 'os.scandir alone, warm', 'seconds': scan(root)},
      {'what': 'first listing', **start(root, index)},
      *({'what': 'later start', **start(root, index)} for _ in range(3)),
    ]
    # Of a small folder none is kept.
    index_mib = index.stat().st_size / 2**20 if index.exists() else 0.0
  finally:
    shutil.rmtree(folder)
  record.finish(run, rows, images=arguments.images, index_mib=index_mib)


if __name__ == '__main__':
  record.run_main(main)
