"""Starts the program as several processes that meet over loopback."""

import contextlib
import io
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

from cmd_jax.cli.program import run_mode

_REPO = pathlib.Path(__file__).resolve().parents[2]
_TIMEOUT_S = 300
_USUAL = (
  '--config=configs/toybirds.py:method=dino,quicktest',
  '--config.model.depth=1',
)
_TINY = (
  '--config.dataset.builder_config=quicktest',
  '--config.total_epochs=1',
  '--config.augment.num_local=0',
  '--config.batch_size=8',
  '--config.log.every_steps=1',
  '--config.checkpoint.every_steps=100',
  "--config.eval.protocols=('knn/20',)",
)


def _free_port():
  with socket.socket() as listening:
    listening.bind(('localhost', 0))
    return listening.getsockname()[1]


class Launcher:
  """Starts runs that share a compilation cache and a data set."""

  def __init__(self, root):
    self._root = root

  def _command(self, workdir, cache, arguments):
    given = [x for x in arguments if x.startswith('--config=')]
    return [
      f'--compilation_cache={cache}',
      f'--workdir={workdir}',
      '--meeting_timeout_s=120',
      # Overrides follow the config that they are of.
      *(given or _USUAL),
      *_TINY,
      f'--config.dataset.data_dir={self._root / "tfds"}',
      *(x for x in arguments if x not in given),
    ]

  def start(self, workdir, *arguments, count=1, num_devices=1, of_process=()):
    """The processes of a run.

    Args:
      workdir: of the run.
      *arguments: of all processes; a --config= replaces the usual one.
      count: number of processes.
      num_devices: CPU devices of each.
      of_process: {number of a process: further arguments of it alone}.
    """
    environment = dict(
      os.environ,
      JAX_PLATFORMS='cpu',
      JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0',
      XLA_FLAGS=os.environ.get('XLA_FLAGS', '')
      + f' --xla_force_host_platform_device_count={num_devices}',
    )
    command = [
      sys.executable,
      'main.py',
      *self._command(workdir, self._root / 'compilation', arguments),
    ]
    port = _free_port()
    processes = []
    for index in range(count):
      meeting = [
        f'--coordinator_address=localhost:{port}',
        f'--num_processes={count}',
        f'--process_id={index}',
      ]
      processes.append(
        subprocess.Popen(
          [
            *command,
            *(meeting if count > 1 else []),
            *dict(of_process).get(index, ()),
          ],
          cwd=_REPO,
          env=environment,
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
          text=True,
        )
      )
    return processes

  def finish(self, processes):
    """[(exit code, stdout, stderr)]; none outlives the test."""
    deadline = time.monotonic() + _TIMEOUT_S
    try:
      ended = []
      for process in processes:
        output = process.communicate(timeout=deadline - time.monotonic())
        ended.append((process.returncode, *output))
      return ended
    finally:
      for process in processes:
        process.kill()

  def run_here(self, workdir, *arguments):
    """Stderr of a run that succeeds on one device of this process."""
    one = '--config.parallel.num_devices=1'
    errors = io.StringIO()
    with (
      contextlib.chdir(_REPO),
      contextlib.redirect_stdout(io.StringIO()),
      contextlib.redirect_stderr(errors),
    ):
      # The cache of the tests is used.
      code = run_mode(self._command(workdir, '', (*arguments, one)))
    assert code == 0, errors.getvalue()
    return errors.getvalue()

  def run(self, workdir, *arguments, **options):
    """Stdout and stderr of the processes of a run that succeeds."""
    ended = self.finish(self.start(workdir, *arguments, **options))
    for code, _, errors in ended:
      assert code == 0, errors
    return [(output, errors) for _, output, errors in ended]


def read_metrics(workdir):
  """The lines of metrics.jsonl that are complete."""
  path = workdir / 'metrics.jsonl'
  if not path.exists():
    return []
  return [json.loads(x) for x in path.read_text().split('\n')[:-1]]


def read_results(workdir):
  return json.loads((workdir / 'results.json').read_text())


def wait_for_step(workdir, step, processes):
  """Returns once the step is logged, or a process has ended."""
  deadline = time.monotonic() + _TIMEOUT_S
  while time.monotonic() < deadline:
    lines = read_metrics(workdir)
    if lines and lines[-1]['step'] >= step:
      return
    if any(process.poll() is not None for process in processes):
      return
    time.sleep(0.02)
