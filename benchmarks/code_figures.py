"""How the code is laid out, in figures: `python -m benchmarks.code_figures`.

Counts over tracked Python files, and the frames of this project between the
start of the program and the built method, and between the train step and CMD's
region loss.
"""

from __future__ import annotations

import ast
import pathlib
import statistics
import subprocess
import tempfile
import tokenize
import traceback
from collections.abc import Callable, Sequence
from unittest import mock

import numpy as np
from PIL import Image

from benchmarks import record

_MANY_LINES = 400


def _tracked(*folders: str) -> list[pathlib.Path]:
  """Tracked Python files below folders."""
  listed = subprocess.run(
    ['git', 'ls-files', '--', *(f'{folder}/*.py' for folder in folders)],
    cwd=record.REPOSITORY,
    capture_output=True,
    text=True,
    check=True,
  )
  return [record.REPOSITORY / name for name in listed.stdout.splitlines()]


def _num_lines(paths: Sequence[pathlib.Path]) -> int:
  return sum(len(path.read_text().splitlines()) for path in paths)


def _function_lengths(paths: Sequence[pathlib.Path]) -> list[int]:
  kinds = ast.FunctionDef | ast.AsyncFunctionDef
  return [
    node.end_lineno - node.lineno + 1
    for path in paths
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, kinds)
  ]


def _num_comments(paths: Sequence[pathlib.Path]) -> int:
  count = 0
  for path in paths:
    with path.open('rb') as file:
      tokens = tokenize.tokenize(file.readline)
      count += sum(token.type == tokenize.COMMENT for token in tokens)
  return count


def _frames(begin: str) -> int:
  """Frames of this project from the function `begin` to the caller's."""
  ours = [
    frame.name
    for frame in traceback.extract_stack()
    if frame.filename.startswith(str(record.REPOSITORY / 'cmd_jax'))
  ]
  return len(ours) - ours.index(begin)


class _Reached(Exception):
  """What was looked for was called."""


def _frames_to(target: str, begin: str, call: Callable[[], object]) -> int:
  """Frames from the function `begin` to `target`, which `call` calls."""
  found = []

  def reached(*args, **kwargs):
    del args, kwargs
    found.append(_frames(begin))
    raise _Reached

  with mock.patch(target, reached):
    try:
      call()
    except _Reached:
      pass
  return found[0]


def _measure_frames() -> dict[str, int]:
  from cmd_jax.cli import options, program
  from cmd_jax.training import experiment

  with tempfile.TemporaryDirectory() as folder:
    photographs = pathlib.Path(folder) / 'photographs'
    photographs.mkdir()
    for number in range(10):
      pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3))
      image = Image.fromarray(pixels.astype(np.uint8))
      image.save(photographs / f'{number}.png')
    argv = [
      '--config=folder:quicktest',
      f'--config.dataset.path={photographs}',
      '--config.batch_size=8',
      '--config.parallel.num_devices=1',
      f'--workdir={folder}/run',
    ]
    config = options.parse(argv, ('workdir',), with_config=True).config
    return {
      'frames, start of the program to the built method': _frames_to(
        'cmd_jax.methods.cmd.make_cmd',
        'run',
        lambda: program.run(['train', *argv]),
      ),
      "frames, step to CMD's region loss": _frames_to(
        'cmd_jax.losses.esvit.region_loss',
        'step',
        lambda: experiment.build(config).compile_step(),
      ),
    }


def measure() -> dict[str, object]:
  """The figures by name."""
  package = _tracked('cmd_jax')
  code = _tracked('cmd_jax', 'configs', 'tfds_builders')
  root = record.REPOSITORY / 'cmd_jax'
  lengths = _function_lengths(package)
  lines = _num_lines(package)
  long_files = [
    f'{path.relative_to(record.REPOSITORY)} {_num_lines([path])}'
    for path in code
    if _num_lines([path]) > _MANY_LINES
  ]
  return {
    'modules at the top of cmd_jax': sum(x.parent == root for x in package),
    'packages in cmd_jax': len(
      {x.relative_to(root).parts[0] for x in package if x.parent != root}
    ),
    f'files over {_MANY_LINES} lines': '; '.join(long_files) or 'none',
    'function length, median': statistics.median(lengths),
    'function length, 90th percentile': int(np.quantile(lengths, 0.9)),
    'comments in 100 lines': round(100 * _num_comments(package) / lines, 1),
    'lines of cmd_jax': lines,
    'lines of configs and tfds_builders': _num_lines(code) - lines,
    'lines of tests': _num_lines(_tracked('tests')),
    'lines of benchmarks': _num_lines(_tracked('benchmarks')),
    'lines of main.py': _num_lines([record.REPOSITORY / 'main.py']),
    **_measure_frames(),
  }


def main() -> None:
  """Prints the figures, a line each."""
  figures = measure()
  width = max(map(len, figures))
  for name, value in figures.items():
    print(f'{name:{width}}  {value}')


if __name__ == '__main__':
  record.run_main(main)
