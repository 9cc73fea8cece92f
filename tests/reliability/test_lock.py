"""The second run in one directory is refused, a dead one is no hindrance."""

import errno
import fcntl
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from cmd_jax.errors import UserError
from cmd_jax.rundir import lock
from cmd_jax.rundir.lock import FILE, Lock
from tests.reliability import runs

_REPO = pathlib.Path(__file__).resolve().parents[2]
_HOLDER = """
import pathlib, sys, time
from cmd_jax.rundir.lock import Lock
Lock(pathlib.Path(sys.argv[1])).take()
print('taken', flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
  """Another process that holds the lock of tmp_path/run."""
  process = subprocess.Popen(
    [sys.executable, '-c', _HOLDER, tmp_path / 'run'],
    cwd=_REPO,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'taken\n'
  yield process
  process.kill()
  process.communicate()


@pytest.mark.parametrize('place', ['/proc/nope', '/dev/null/run'])
def test_a_directory_that_cannot_be_made(place):
  with pytest.raises(UserError, match=f'{place} cannot be made') as error:
    Lock(pathlib.Path(place)).take()
  assert 'has gone' not in str(error.value)


def test_the_second_is_refused_and_told_who_and_since_when(holder, tmp_path):
  with pytest.raises(UserError) as error:
    Lock(tmp_path / 'run').take()
  message = str(error.value)
  assert '\n' not in message
  for words in (
    str(tmp_path / 'run'),
    f'process {holder.pid} on ',
    'since 2',
    'ago',
    'last sign of life',
    'another --workdir',
  ):
    assert words in message
  owner = json.loads((tmp_path / 'run' / FILE).read_text())
  assert owner['pid'] == holder.pid


def test_the_lock_of_a_killed_process_is_taken_at_once(
  holder, tmp_path, capsys, monkeypatch
):
  holder.kill()
  holder.wait()
  assert (tmp_path / 'run' / FILE).exists()
  # It is on this machine: nothing to wait for.
  monkeypatch.setattr(time, 'sleep', lambda _: pytest.fail('waits'))
  with Lock(tmp_path / 'run') as mine:
    mine.take()
    owner = json.loads((tmp_path / 'run' / FILE).read_text())
    assert owner['pid'] == os.getpid()
  message = capsys.readouterr().err
  assert f'took over the lock of process {holder.pid} on ' in message
  assert 'ended without giving it back' in message


def test_a_lock_is_given_back_and_taken_again(tmp_path, capsys):
  for _ in range(2):
    with Lock(tmp_path / 'new' / 'run') as mine:
      mine.take()
      mine.take()
      with pytest.raises(UserError, match='is in use'):
        Lock(tmp_path / 'new' / 'run').take()
    assert not list((tmp_path / 'new' / 'run').iterdir())
  assert not capsys.readouterr().err


def test_a_lock_that_is_not_taken_touches_nothing(tmp_path):
  with Lock(tmp_path / 'run'):
    pass
  assert not (tmp_path / 'run').exists()


def _leave_lock_of_another_host(directory):
  directory.mkdir()
  owner = dict(host='far', machine='far', pid=7, started=1e9, beat=1e9)
  (directory / FILE).write_text(json.dumps(owner))
  return owner


def test_another_hosts_lock_is_taken_once_it_is_silent(
  tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(lock, '_SILENT_S', 0.2)
  _leave_lock_of_another_host(tmp_path / 'run')
  with Lock(tmp_path / 'run') as mine:
    mine.take()
  message = capsys.readouterr().err
  assert 'was in use by process 7 on far (since 2001-09-0' in message
  assert 'took over' in message


def test_another_hosts_sign_of_life_refuses(tmp_path, monkeypatch):
  owner = _leave_lock_of_another_host(tmp_path / 'run')
  file = tmp_path / 'run' / FILE

  def beat(_):
    file.write_text(json.dumps({**owner, 'beat': 1e9 + 10}))

  monkeypatch.setattr(time, 'sleep', beat)
  with pytest.raises(UserError, match='in use by process 7 on far'):
    Lock(tmp_path / 'run').take()
  assert json.loads(file.read_text())['pid'] == 7


def test_the_heart_beats_until_the_lock_is_given_back(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, '_BEAT_S', 0.01)
  with Lock(tmp_path) as mine:
    mine.take()
    file = tmp_path / FILE
    first = json.loads(file.read_text())['beat']
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
      beat = lock._read(mine._descriptor).get('beat', first)
      if beat > first:
        break
    assert beat > first
  assert not file.exists()


@pytest.mark.parametrize('content', ['', '{"pid": ', '[]', '\x00' * 9, '{}'])
def test_a_lock_file_without_an_owner_is_nobodys(tmp_path, content):
  (tmp_path / FILE).write_text(content)
  with Lock(tmp_path) as mine:
    mine.take()
  assert not (tmp_path / FILE).exists()


def test_owners_that_make_no_sense_are_described(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(lock, '_SILENT_S', 0.0)
  (tmp_path / FILE).write_text('{"started": "x", "beat": 1e300}')
  with Lock(tmp_path) as mine:
    mine.take()
  assert 'process unknown on unknown' in capsys.readouterr().err


def _content(workdir):
  """Every file of a directory; the lock's owner alone, which renews it."""
  content = {p.name: p.read_bytes() for p in workdir.iterdir()}
  content['lock.json'] = json.loads(content['lock.json']) | {'beat': None}
  return content


def test_the_program_refuses_a_directory_in_use(tmp_path):
  workdir, launcher = tmp_path / 'run', runs.Launcher(tmp_path)
  with Lock(workdir) as mine:
    mine.take()
    before = _content(workdir)
    [(code, _, messages)] = launcher.finish(launcher.start(workdir))
    assert code == 2, messages
    last = messages.splitlines()[-1]
    assert last.startswith(
      f'error: {workdir} is in use by process {os.getpid()}'
    )
    assert _content(workdir) == before


def _has_no_locks(descriptor, operation):
  raise OSError(errno.ENOLCK, 'no locks available')


@pytest.mark.parametrize('is_late', [False, True])
def test_of_two_that_come_at_once_one_wins_without_locks(
  tmp_path, monkeypatch, is_late
):
  """The second has seen no name; `is_late` if the first has won meanwhile."""
  beat, both_look, first_won = (
    Lock._beat,
    threading.Barrier(2),
    threading.Event(),
  )
  won, lost = [], []

  def slow_beat(self, descriptor):
    if self._descriptor is None:
      both_look.wait(60)
      if is_late and self is second:
        first_won.wait(60)
    beat(self, descriptor)

  monkeypatch.setattr(fcntl, 'flock', _has_no_locks)
  monkeypatch.setattr(Lock, '_beat', slow_beat)
  monkeypatch.setattr(lock, '_SETTLE_S', 0.5)
  monkeypatch.setattr(lock, '_BEAT_S', 1.0 if is_late else 0.05)

  def take(mine):
    try:
      mine.take()
      won.append(mine)
      first_won.set()
    except UserError as error:
      lost.append(str(error))

  first, second = Lock(tmp_path), Lock(tmp_path)
  threads = [threading.Thread(target=take, args=[x]) for x in (first, second)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  for mine in won:
    mine.release()
  assert len(won) == len(lost) == 1
  assert 'is in use by process' in lost[0]


def test_a_shorter_name_leaves_nothing_of_a_longer_one(tmp_path, monkeypatch):
  descriptor = os.open(tmp_path / FILE, os.O_RDWR | os.O_CREAT)
  longer, shorter = Lock(tmp_path), Lock(tmp_path)
  longer._started, shorter._started = 1.23456, 1.5
  write = os.pwrite

  def write_before_the_other(*arguments):
    write(*arguments)
    # The other comes before anything else that the first does.
    monkeypatch.setattr(os, 'pwrite', write)
    shorter._beat(descriptor)

  monkeypatch.setattr(os, 'pwrite', write_before_the_other)
  monkeypatch.setattr(time, 'time', lambda: 2.5)
  longer._beat(descriptor)
  assert lock._read(descriptor)['started'] == 1.5
  os.close(descriptor)
