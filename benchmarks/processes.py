"""Several processes against one, each with as many cores: images/s of training.

  python -m benchmarks.processes [--num_processes=2] [--batch_size=32]
    [--rounds=10] [--steps=8]

Both train the CMD method on toy birds (configs/toybirds.py, small ViT) with the
same global batch, on the same cores: one process with a thread for every core,
and several that are bound to a core each and exchange gradients over loopback
(gloo). Both stay started and take turns of a few steps, so that what else the
machine does meets both; the ratio is that of each round.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from tqdm import tqdm

from benchmarks import record
from cmd_jax.devices import launchers, processes
from cmd_jax.errors import UserError

_ONE, _DONE = '1 process', 'done'


class Team:
  """Processes that train one model, a few steps whenever they are asked."""

  def __init__(self, cores: Sequence[Sequence[int]], batch_size: int):
    """Starts a process for each group of cores."""
    with socket.socket() as listening:
      listening.bind(('localhost', 0))
      port = listening.getsockname()[1]
    self._processes = [
      subprocess.Popen(
        [
          sys.executable,
          '-m',
          'benchmarks.processes',
          f'--worker={index}/{len(cores)}/localhost:{port}',
          f'--cores={",".join(map(str, group))}',
          f'--batch_size={batch_size}',
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=record.REPOSITORY,
      )
      for index, group in enumerate(cores)
    ]

  def seconds(self, num_steps: int) -> float:
    """Wall time of so many steps, until all processes are done.

    Raises:
      UserError: a process has died.
    """
    start = time.perf_counter()
    for process in self._processes:
      print(num_steps, file=process.stdin, flush=True)
    for process in self._processes:
      line = ''
      while line.strip() != _DONE:
        line = process.stdout.readline()
        if not line:
          raise UserError('a process has died: what it says stands above')
    return time.perf_counter() - start

  def close(self) -> None:
    """Ends the processes."""
    for process in self._processes:
      process.stdin.close()
    for process in self._processes:
      process.wait()


def work(options: argparse.Namespace) -> None:
  """What each process does: trains as many steps as it is told.

  Args:
    options: of the command line; `worker` is number/count/host:port.
  """
  index, count, coordinator = options.worker.split('/')
  # Before JAX starts its threads.
  os.sched_setaffinity(0, map(int, options.cores.split(',')))
  address = launchers.Address(coordinator, int(count), int(index))
  processes.start(address, timeout_s=120)
  import jax

  from cmd_jax.training import experiment
  from configs import toybirds

  config = toybirds.get_config()
  config.dataset.builder_config = 'quicktest'
  config.batch_size = options.batch_size
  with processes.failing_together():
    built = experiment.build(config)
    state, train_step = built.init_state(), built.compile_step()
    step = 0
    with built.data.make_batches(None) as batches:
      for line in sys.stdin:
        for _ in range(int(line)):
          state, metrics = train_step(state, batches(step), built.rng)
          step += 1
        jax.block_until_ready((state, metrics))
        print(_DONE, flush=True)


def measure(teams: dict[str, Team], options: argparse.Namespace) -> list[dict]:
  """Lets the teams take turns; a row for each."""
  seconds = {name: [] for name in teams}
  for number in tqdm(range(options.rounds + 1), unit='round'):
    # In turns each goes first, and the first round only warms up.
    for name in sorted(teams, reverse=bool(number % 2)):
      taken = teams[name].seconds(options.steps)
      if number:
        seconds[name].append(taken)
  alone = seconds[_ONE]
  images = options.steps * options.batch_size
  return [
    {
      'processes': name,
      'images/s': images / statistics.median(values),
      'of one process': statistics.median(
        one / value for one, value in zip(alone, values)
      ),
      'seconds': values,
    }
    for name, values in seconds.items()
  ]


def main() -> None:
  """Measures, prints and writes."""
  parser = record.make_parser(__doc__)
  parser.add_argument('--num_processes', type=int, default=2)
  parser.add_argument('--batch_size', type=int, default=32, help='of them all')
  parser.add_argument('--rounds', type=int, default=10)
  parser.add_argument('--steps', type=int, default=8, help='of a turn')
  parser.add_argument('--worker', help=argparse.SUPPRESS)
  parser.add_argument('--cores', help=argparse.SUPPRESS)
  run = record.begin('processes', parser)
  options = run.options
  if options.worker:
    work(options)
    return
  cores = sorted(os.sched_getaffinity(0))[: options.num_processes]
  if len(cores) < options.num_processes:
    raise UserError(
      f'--num_processes is {options.num_processes}, but this process may use '
      f'{len(cores)} core(s): give at most that many'
    )
  groups = {_ONE: [cores], f'{len(cores)} processes': [[x] for x in cores]}
  teams = {
    name: Team(group, options.batch_size) for name, group in groups.items()
  }
  try:
    rows = measure(teams, options)
  finally:
    for team in teams.values():
      team.close()
  record.finish(run, rows)


if __name__ == '__main__':
  record.run_main(main)
