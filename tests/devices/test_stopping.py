"""Signals reach the program at every moment, in processes of their own."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from cmd_jax.cli import program
from cmd_jax.devices import stopping

_REPO = pathlib.Path(__file__).resolve().parents[2]
_TIMEOUT_S = 300
_SCORING = 'the scoring of the trained encoder'


def _start(workdir, *arguments):
  return subprocess.Popen(
    [
      sys.executable,
      'main.py',
      '--compilation_cache=',
      '--config=configs/toybirds.py:method=dino,quicktest',
      f'--workdir={workdir}',
      '--config.dataset.builder_config=quicktest',
      f'--config.dataset.data_dir={workdir.parent / "tfds"}',
      '--config.total_epochs=1',
      '--config.augment.num_local=0',
      '--config.model.depth=1',
      '--config.parallel.num_devices=1',
      "--config.eval.protocols=('knn/20',)",
      *arguments,
    ],
    cwd=_REPO,
    # A process that is killed while it writes must not spoil the shared cache.
    env=dict(
      os.environ, JAX_PLATFORMS='cpu', JAX_ENABLE_COMPILATION_CACHE='false'
    ),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    # As in a terminal, Ctrl-C reaches what the program has started too.
    start_new_session=True,
  )


def _send(process, number):
  send = os.killpg if number == signal.SIGINT else os.kill
  send(process.pid, number)


def _answers(process):
  """Whether the process has a handler of SIGTERM."""
  status = pathlib.Path(f'/proc/{process.pid}/status').read_text()
  (caught,) = (x for x in status.splitlines() if x.startswith('SigCgt'))
  return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def _wait_until(process, condition):
  deadline = time.monotonic() + _TIMEOUT_S
  while process.poll() is None and time.monotonic() < deadline:
    if condition():
      return
    time.sleep(0.001)
  pytest.fail(f'not reached: {process.communicate()}')


def _assert_stopped(process, number):
  output, messages = process.communicate(timeout=_TIMEOUT_S)
  return _check_told(process.returncode, output, messages, number)


def _check_told(code, output, messages, number):
  """Returns the one line that says so."""
  assert code == 128 + number, (number, messages)
  assert not output
  lines = messages.splitlines()
  told = [line for line in lines if 'stopped by' in line]
  assert told == lines[-1:], messages
  assert f'stopped by {number.name} ' in told[0]
  assert 'the same command' in told[0]
  for word in ('Traceback', 'terminate called', 'Exception ignored'):
    assert word not in messages, messages
  return told[0]


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_the_first_moment(tmp_path, number):
  process = _start(tmp_path / 'run')
  _wait_until(process, lambda: _answers(process))
  _send(process, number)
  assert 'during start-up' in _assert_stopped(process, number)
  assert not list(tmp_path.iterdir())


def test_ctrl_c_while_the_step_compiles(tmp_path):
  workdir = tmp_path / 'run'
  process = _start(workdir, '--config.placement=stream')
  _wait_until(process, (workdir / 'data_report.txt').exists)
  _send(process, signal.SIGINT)
  assert 'during start-up' in _assert_stopped(process, signal.SIGINT)
  # The lock is given back.
  assert not (workdir / 'lock.json').exists()


def test_ctrl_c_in_a_program_of_others_is_told(monkeypatch, capsys):
  def interrupt(values):
    with stopping.during(_SCORING):
      raise KeyboardInterrupt

  command = program.COMMANDS['weights']._replace(run=interrupt)
  monkeypatch.setitem(program.COMMANDS, 'weights', command)
  monkeypatch.setattr(stopping, '_phase', 'start-up')
  assert program.run(['weights']) == 128 + signal.SIGINT
  (line,) = capsys.readouterr().err.splitlines()
  assert (
    line == f'stopped by SIGINT during {_SCORING}; the same command goes on'
  )


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_is_ignored_stays_so(number):
  # As a shell has its jobs in the background ignore Ctrl-C.
  before = signal.signal(number, signal.SIG_IGN)
  try:
    with stopping.Remembered() as signals:
      signal.raise_signal(number)
      assert signals.received is None
    assert signal.getsignal(number) is signal.SIG_IGN
  finally:
    signal.signal(number, before)


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_every_moment_from_start_up_to_scoring(tmp_path, number):
  workdir = tmp_path / 'run'
  whole = _start(workdir, '--config.placement=stream')
  begin = time.monotonic()
  _, messages = whole.communicate(timeout=_TIMEOUT_S)
  assert whole.returncode == 0, messages
  seconds, told = time.monotonic() - begin, []
  for i in range(24):
    fresh = tmp_path / f'run_{i // 6}'
    process = _start(fresh, '--config.placement=stream')
    _wait_until(process, lambda p=process: _answers(p))
    # The next goes on where the one before it was stopped.
    time.sleep(seconds * (i + random.random()) / 24)
    if process.poll() is None:
      _send(process, number)
    output, messages = process.communicate(timeout=_TIMEOUT_S)
    if 'knn/20/top1' in output:
      # It had ended, or was ending, with all that it had to say.
      assert process.returncode in (0, 128 + number), messages
    else:
      told.append(_check_told(process.returncode, output, messages, number))
  assert len(told) > 12, told
  for i in range(4):
    process = _start(tmp_path / f'run_{i}', '--config.placement=stream')
    output, messages = process.communicate(timeout=_TIMEOUT_S)
    assert process.returncode == 0, messages
    assert 'knn/20/top1' in output


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_scoring_says_so(tmp_path, number):
  workdir = tmp_path / 'run'
  process = _start(workdir)
  _wait_until(process, (workdir / 'neighbours.png').exists)
  _send(process, number)
  assert f'during {_SCORING};' in _assert_stopped(process, number)
