"""A run that is killed at any moment goes on as if it had not been."""

import json
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from cmd_jax.rundir import checkpoint
from tests.reliability import runs

_REPO = pathlib.Path(__file__).resolve().parents[2]
_TIMEOUT_S = 300
_KILLS, _EVERY = 50, 5
_ARGUMENTS = (
  '--config.total_epochs=75',
  f'--config.checkpoint.every_steps={_EVERY}',
)

_SAVER = """
import sys
import types
import numpy as np
from cmd_jax.rundir.checkpoint import Checkpoints, saved_steps
import pathlib
import jax
from typing import NamedTuple
class State(NamedTuple):
  step: np.ndarray
  weights: np.ndarray
directory = pathlib.Path(sys.argv[1])
step = next(iter(saved_steps(directory)), 0)
checkpoints = Checkpoints(directory, keep=3)
while True:
  step += 1
  weights = np.full((256, 1024), step, np.float32)
  checkpoints.save(State(np.int32(step), weights), {'step': step})
"""


def _is_saving(directory):
  return any('orbax-checkpoint-tmp' in x.name for x in directory.glob('*'))


def _wait(process, condition):
  deadline = time.monotonic() + _TIMEOUT_S
  while process.poll() is None and time.monotonic() < deadline:
    if condition():
      return
    time.sleep(0.0005)
  assert process.poll() is None, process.communicate()
  raise AssertionError('nothing happened')


def test_a_save_that_is_killed_leaves_the_one_before(tmp_path):
  directory = tmp_path / 'checkpoints'
  for _ in range(2):
    before = next(iter(checkpoint.saved_steps(directory)), 0)
    process = subprocess.Popen(
      [sys.executable, '-c', _SAVER, directory],
      cwd=_REPO,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
    )
    _wait(
      process,
      lambda before=before: (
        next(iter(checkpoint.saved_steps(directory)), 0) > before
        and _is_saving(directory)
      ),
    )
    process.kill()
    process.communicate()
    step, damaged = checkpoint.newest_good_step(directory)
    assert step > before
    assert not damaged
    assert (directory / str(step) / checkpoint.MANIFEST).exists()


def _kill_once(launcher, workdir, chance):
  """Kills a run at some moment; whether it was inside a save, and its step."""
  checkpoints, start = workdir / 'checkpoints', runs.logged_step(workdir)
  [process] = launcher.start(workdir, *_ARGUMENTS)
  inside = chance.random() < 0.5
  # A resumed run first drops the lines after its checkpoint.
  resumed = runs.newest_step(workdir)
  after = resumed + chance.randint(1, 2 * _EVERY)
  try:
    if start:
      _wait(process, lambda: runs.logged_step(workdir) == resumed)
    _wait(
      process,
      lambda: (
        runs.logged_step(workdir) >= after
        and (not inside or _is_saving(checkpoints))
      ),
    )
    if not inside:
      time.sleep(chance.random() * 0.2)
  finally:
    process.kill()
    _, messages = process.communicate()
  assert process.returncode == -signal.SIGKILL, messages
  return _is_saving(checkpoints)


@pytest.mark.slow
def test_fifty_kills_change_nothing(tmp_path, record_property):
  launcher = runs.Launcher(tmp_path)
  undisturbed, workdir = tmp_path / 'undisturbed', tmp_path / 'run'
  launcher.run(undisturbed, *_ARGUMENTS)
  chance = random.Random(0)
  inside, unreadable, lost = 0, 0, []
  for _ in range(_KILLS):
    inside += _kill_once(launcher, workdir, chance)
    saved = runs.newest_step(workdir)
    lost.append(runs.logged_step(workdir) - saved)
    json.loads((workdir / 'config.json').read_text())
    json.loads((workdir / 'results.json').read_text())
    if saved:
      _, damaged = checkpoint.newest_good_step(workdir / 'checkpoints')
      unreadable += bool(damaged)
  launcher.run(workdir, *_ARGUMENTS)
  record_property(
    'counted',
    f'kills survived: {len(lost)}, of them inside a save: {inside}; steps '
    f'lost: {max(lost)} at most, {np.mean(lost):.1f} on average, of '
    f'{_EVERY} between checkpoints; unreadable work directories: {unreadable}',
  )
  assert max(lost) <= _EVERY
  assert inside > 5
  assert not unreadable
  arrays, other = runs.last_arrays(undisturbed), runs.last_arrays(workdir)
  assert len(arrays) > 50
  assert arrays.keys() == other.keys()
  for name, value in arrays.items():
    np.testing.assert_array_equal(other[name], value, err_msg=name)
  assert runs.logged_step(workdir) == runs.logged_step(undisturbed)
