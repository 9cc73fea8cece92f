"""Disks that are full, read-only or gone: a line, and the last good state."""

import asyncio
import codecs
import errno
import functools
import gc
import logging
import os
import pathlib
import shutil
import subprocess
import sys
from typing import NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image

from cmd_jax.data.pipeline import lazy, stream
from cmd_jax.data.sources import base
from cmd_jax.devices import sharding
from cmd_jax.errors import UserError
from cmd_jax.files import disk_errors
from cmd_jax.rundir import checkpoint
from cmd_jax.rundir.checkpoint import Checkpoints, saved_steps
from cmd_jax.rundir.lock import Lock
from cmd_jax.training import metrics
from tests.reliability import runs

_REPO = pathlib.Path(__file__).resolve().parents[2]


class _State(NamedTuple):
  step: np.ndarray
  weights: np.ndarray


def _state(step, size=1000):
  rng = np.random.default_rng(step)
  return _State(np.int32(step), rng.normal(size=size).astype(np.float32))


def _weights_in(directory):
  """Those of the newest good checkpoint, read as a run does."""
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), _state(0)
  )
  return checkpoint.restore_newest(directory, like)[0].weights


def _raised(error, cause=None):
  try:
    raise error from cause
  except Exception as raised:
    return raised


@pytest.mark.parametrize(
  'error, words',
  [
    (OSError(errno.ENOSPC, 'x'), 'no space left on {root}: free some'),
    (OSError(errno.ENOSPC, 'x', '/a/b'), 'no space left on /a/b'),
    (OSError(errno.EDQUOT, 'x'), 'quota is used up at {root}'),
    (OSError(errno.EROFS, 'x', b'/a/b'), '/a/b is on a read-only file system'),
    (PermissionError(errno.EACCES, 'x', '/a'), '/a may not be read or written'),
    (OSError(errno.EIO, 'x'), 'the disk fails at {root}'),
    # As TensorStore says it.
    (
      ValueError('RESOURCE_EXHAUSTED: No space left on device [OS error 28]'),
      'no space left on {root}',
    ),
    (_raised(ValueError('x'), OSError(errno.ENOSPC, 'x')), 'no space left'),
  ],
)
def test_what_fails_is_told_with_its_place(tmp_path, error, words):
  message = disk_errors.explain(error, tmp_path)
  assert words.format(root=tmp_path) in message
  assert 'what was saved before is kept' in message
  with pytest.raises(UserError), disk_errors.explaining(tmp_path):
    raise error


def test_other_errors_are_left_as_they_are(tmp_path):
  for error in (ValueError('x'), FileNotFoundError(errno.ENOENT, 'x', 'y')):
    assert disk_errors.explain(error, tmp_path) is None
    with pytest.raises(type(error)), disk_errors.explaining(tmp_path):
      raise error
  with pytest.raises(UserError, match='mine'), disk_errors.explaining(tmp_path):
    raise UserError('mine')


def test_a_directory_that_went_is_told(tmp_path):
  error = FileNotFoundError(errno.ENOENT, 'x', 'y')
  message = disk_errors.explain(error, tmp_path / 'gone')
  assert f'{tmp_path / "gone"} has gone' in message


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_save_that_fails_leaves_the_one_before(
  tmp_path, monkeypatch, capfd, number
):
  checkpoints = Checkpoints(tmp_path, keep=1)
  checkpoints.save(_state(2), {})

  def fail(path):
    raise OSError(number, os.strerror(number), str(path))

  with monkeypatch.context() as patched:
    patched.setattr(checkpoint, 'write_manifest', fail)
    with pytest.raises(UserError, match='what was saved before is kept'):
      checkpoints.save(_state(4), {})
  assert [path.name for path in tmp_path.iterdir()] == ['2']
  np.testing.assert_array_equal(_weights_in(tmp_path), _state(2).weights)
  checkpoints.close()
  assert 'Traceback' not in capfd.readouterr().err

  # Room again: another session goes on.
  again = Checkpoints(tmp_path, keep=1)
  again.save(_state(4), {})
  again.close()
  assert saved_steps(tmp_path) == [4]


def test_a_directory_that_goes_between_two_saves_is_told(tmp_path):
  checkpoints = Checkpoints(tmp_path / 'run' / 'checkpoints', keep=1)
  checkpoints.save(_state(2), {})
  (tmp_path / 'run').rename(tmp_path / 'elsewhere')
  with pytest.raises(UserError, match='has gone while the program ran'):
    checkpoints.save(_state(4), {})
  assert not (tmp_path / 'run').exists()
  checkpoints.close()


@pytest.mark.parametrize('which', ['metrics.jsonl', 'tensorboard'])
def test_metrics_that_cannot_be_written_raise_at_once(
  tmp_path, monkeypatch, which
):
  if not pathlib.Path('/dev/full').exists():
    pytest.skip('this system has no /dev/full')
  monkeypatch.setattr(metrics, '_FLUSH_S', 0)
  writer = metrics.MetricWriter(
    tmp_path / 'metrics.jsonl', tmp_path / 'tensorboard', step=0
  )
  with open('/dev/full', 'wb', buffering=0) as full, monkeypatch.context() as m:
    if which == 'tensorboard':
      m.setattr(writer._events._py_recordio_writer, '_writer', full)
    else:
      text = codecs.getwriter('utf-8')(full)
      m.setattr(writer, '_file', text)
    with pytest.raises(OSError, match='No space left'):
      writer.write(2, {'loss': 1.0})
  writer.close()


def _load(folder, index):
  with Image.open(folder / f'{index}.png') as image:
    return base.Example(image.convert('RGB'))


@pytest.mark.parametrize(
  'num_workers', [0, pytest.param(1, marks=pytest.mark.slow)]
)
def test_photographs_that_go_while_they_stream_end_the_run(
  tmp_path, num_workers
):
  photos = tmp_path / 'photos'
  photos.mkdir()
  for index in range(12):
    Image.new('RGB', (9, 9), (index, 0, 0)).save(photos / f'{index}.png')
  birds = base.Source(
    name='birds/train',
    class_names=('wren',),
    file_names=tuple(f'{index}.png' for index in range(12)),
    labels=np.zeros(12, np.int32),
    load=functools.partial(_load, photos),
  )
  with stream.streamed_batches(
    lazy.lazy_canvases(birds, canvas_px=8),
    birds,
    batch_size=4,
    seed=0,
    mesh=sharding.make_mesh(1),
    num_workers=num_workers,
  ) as batches:
    batches(0)
    shutil.rmtree(photos)
    # What was read ahead is still given.
    with pytest.raises(UserError, match='birds/train: .*No such file'):
      for step in range(1, 100):
        batches(step)


_STATE_OF_64_MIB = """
import pathlib, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
import numpy as np
from cmd_jax.rundir.checkpoint import Checkpoints
from cmd_jax.errors import UserError
from tests.reliability.test_disk import _state
checkpoints = Checkpoints(pathlib.Path(sys.argv[1]), keep=1)
checkpoints.save(_state(2), {})
try:
  checkpoints.save(_state(4, 16 * 2**20), {})
except UserError as error:
  print(f'error: {error}')
checkpoints.close()
"""


def test_a_file_that_may_not_grow_ends_the_save(tmp_path):
  result = subprocess.run(
    [sys.executable, '-c', _STATE_OF_64_MIB, tmp_path],
    cwd=_REPO,
    env=dict(os.environ, JAX_PLATFORMS='cpu'),
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert result.returncode == 0, result.stderr
  assert 'reaches the limit on the size of a file' in result.stdout
  assert 'Traceback' not in result.stderr
  assert [path.name for path in tmp_path.iterdir()] == ['2']
  assert checkpoint.newest_good_step(tmp_path) == (2, [])


@pytest.mark.parametrize(
  'message, is_told', [('No space left on device', False), ('a bug', True)]
)
def test_tasks_that_fail_later_are_told_but_for_the_disk(
  tmp_path, monkeypatch, caplog, message, is_told
):
  tasks = []

  def save(*args, **kwargs):
    async def fail():
      raise ValueError(f'RESOURCE_EXHAUSTED: Error writing: {message}')

    loop = asyncio.new_event_loop()
    tasks.append(loop.create_task(fail()))
    loop.run_until_complete(asyncio.wait(tasks))
    loop.close()
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  checkpoints = Checkpoints(tmp_path / 'checkpoints', keep=1)
  monkeypatch.setattr(checkpoints._manager, 'save', save)
  with pytest.raises(UserError, match='no space left on'):
    checkpoints.save(_state(2), {})
  tasks.clear()
  gc.collect()
  assert ('was never retrieved' in caplog.text) == is_told
  monkeypatch.undo()
  # The next one succeeds.
  checkpoints.save(_state(4), {})
  checkpoints.close()
  assert not logging.getLogger('asyncio').filters


@pytest.fixture
def small_disk(tmp_path):
  """Folder of a file system of its own, and what mounts it again."""
  path = tmp_path / 'disk'
  path.mkdir()

  def mount(options):
    done = subprocess.run(
      ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', path],
      capture_output=True,
      text=True,
    )
    if done.returncode:
      pytest.skip(f'no file system may be mounted here: {done.stderr.strip()}')

  try:
    mount('size=1m')
  except FileNotFoundError:
    pytest.skip('this system has no mount')
  yield path, mount
  subprocess.run(['umount', path], check=True)


def test_a_read_only_directory_is_told(small_disk):
  path, mount = small_disk
  checkpoints = Checkpoints(path / 'checkpoints', keep=1)
  checkpoints.save(_state(2), {})
  mount('remount,ro')
  with pytest.raises(UserError, match='read-only'):
    checkpoints.save(_state(4), {})
  checkpoints.close()
  with pytest.raises(UserError, match='read-only'):
    Lock(path).take()
  # Reading needs no more.
  weights = _weights_in(path / 'checkpoints')
  np.testing.assert_array_equal(weights, _state(2).weights)
  mount('remount,rw')


@pytest.mark.slow
def test_a_run_on_a_full_disk_stops_and_goes_on(small_disk, tmp_path):
  path, mount = small_disk
  mount('remount,size=6m')
  launcher = runs.Launcher(tmp_path)
  arguments = ('--config.total_epochs=3', '--config.checkpoint.every_steps=5')
  [(code, _, messages)] = launcher.finish(
    launcher.start(path / 'run', *arguments)
  )
  assert code == 2, messages
  assert messages.splitlines()[-1].startswith('error: no space left on ')
  assert 'Traceback' not in messages
  saved = runs.newest_step(path / 'run')
  assert saved in (5, 10)
  assert runs.logged_step(path / 'run') <= saved + 5

  mount('remount,size=64m')
  [(_, messages)] = launcher.run(path / 'run', *arguments)
  assert f'resumed after step {saved}\n' in messages
  undisturbed = tmp_path / 'undisturbed'
  launcher.run(undisturbed, *arguments)
  arrays, other = runs.last_arrays(undisturbed), runs.last_arrays(path / 'run')
  assert arrays.keys() == other.keys()
  for name, value in arrays.items():
    np.testing.assert_array_equal(other[name], value, err_msg=name)
