import json
import shutil

import jax
import numpy as np
import pytest

from cmd_jax.devices import sharding
from cmd_jax.errors import UserError
from cmd_jax.rundir import checkpoint, saved_run
from cmd_jax.rundir.checkpoint import Checkpoints, saved_steps
from cmd_jax.rundir.workdir import Workdir
from cmd_jax.training.state import init_train_state
from tests import saved_runs, tiny


@pytest.fixture(scope='module')
def state():
  """A state whose moments, centres and counts are not zero either."""
  rng = np.random.default_rng(0)

  def fill(x):
    return np.asarray(rng.normal(size=x.shape) * 100).astype(x.dtype)

  shapes = jax.eval_shape(
    lambda: init_train_state(
      tiny.make_tiny_method('cmd'), tiny.make_optimizer(), jax.random.key(0)
    )
  )
  return _at_step(jax.tree.map(fill, shapes), 2)


def _like(state, num_devices=1):
  """Shapes and shardings, as `Experiment.state_like` has them."""
  whole = sharding.replicated(sharding.make_mesh(num_devices))
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), state
  )


def _at_step(state, step):
  return state._replace(step=np.int32(step))


def _save(directory, state, *steps, keep=3, meta=None):
  checkpoints = Checkpoints(directory, keep=keep)
  for step in steps:
    checkpoints.save(_at_step(state, step), meta or {'step': step})
  checkpoints.close()


def _restore(directory, like):
  checkpoints = Checkpoints(directory, keep=3)
  try:
    return checkpoints.restore(like)
  finally:
    checkpoints.close()


def _assert_same(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(b), np.asarray(a))


@pytest.mark.parametrize('num_devices', [1, 8])
def test_state_and_meta_come_back_to_the_bit(tmp_path, state, num_devices):
  meta = {'train_seconds': 1.25, 'note': 'a'}
  _save(tmp_path, state, 2, meta=meta)
  restored, restored_meta = _restore(tmp_path, _like(state, num_devices))
  _assert_same(state, restored)
  assert restored_meta == meta
  assert any(np.any(x) for x in jax.tree.leaves(restored.opt_state))
  for leaf in jax.tree.leaves(restored):
    assert len(leaf.sharding.device_set) == num_devices
    assert leaf.sharding.is_fully_replicated


def test_only_the_newest_are_kept_and_the_last_is_restored(tmp_path, state):
  _save(tmp_path, state, 3, 6, 9, 12, keep=2)
  kept = {int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()}
  assert kept == {9, 12}
  restored, meta = _restore(tmp_path, _like(state))
  assert int(restored.step) == meta['step'] == 12


def test_the_best_is_kept_however_old_it_is(tmp_path, state):
  checkpoints = Checkpoints(tmp_path, keep=1)
  for step, best in ((1, None), (2, 2), (3, 2), (4, 2)):
    checkpoints.save(_at_step(state, step), {}, best=best)
  assert saved_steps(tmp_path) == [4, 2]
  checkpoints.close()
  # Another program's process knows of it as well.
  checkpoints = Checkpoints(tmp_path, keep=1)
  checkpoints.save(_at_step(state, 5), {}, best=2)
  assert saved_steps(tmp_path) == [5, 2]
  checkpoints.save(_at_step(state, 6), {}, best=6)
  assert saved_steps(tmp_path) == [6]
  checkpoints.close()


def test_a_step_that_is_saved_already_is_left_alone(tmp_path, state):
  _save(tmp_path, state, 5, meta={'first': True})
  _save(tmp_path, state, 5, meta={'first': False})
  assert _restore(tmp_path, _like(state))[1] == {'first': True}


def test_an_unfinished_save_is_ignored(tmp_path, state):
  _save(tmp_path, state, 4)
  (tmp_path / '8.orbax-checkpoint-tmp').mkdir()
  assert int(_restore(tmp_path, _like(state))[0].step) == 4


def _assert_one_line(error, *words):
  message = str(error.value)
  assert '\n' not in message
  for word in words:
    assert word in message


def test_an_empty_directory_is_told(tmp_path, state):
  with pytest.raises(UserError) as error:
    _restore(tmp_path, _like(state))
  _assert_one_line(error, f'no checkpoint in {tmp_path}', 'train first')


def test_a_state_of_another_structure_or_shape_is_told(tmp_path, state):
  _save(tmp_path, state, 2)
  fewer, name = dict(state.params), sorted(state.params)[0]
  fewer.pop(name)
  with pytest.raises(UserError) as error:
    _restore(tmp_path, _like(state._replace(params=fewer)))
  _assert_one_line(
    error, str(tmp_path / '2'), 'another model', f'params.{name}', 'missing'
  )
  longer = jax.tree.map(lambda x: np.stack([x, x]), state.method_state)
  with pytest.raises(UserError) as error:
    _restore(tmp_path, _like(state._replace(method_state=longer)))
  _assert_one_line(error, 'method_state.', 'there and (2, ', 'config')
  assert saved_steps(tmp_path) == [2]


def _flip(content):
  middle = len(content) // 2
  flipped = bytes([content[middle] ^ 1])
  return content[:middle] + flipped + content[middle + 1 :]


def _truncate(content):
  return content[: len(content) // 2]


def _files(path):
  return {p: p.read_bytes() for p in sorted(path.rglob('*')) if p.is_file()}


@pytest.mark.parametrize('spoil', [_flip, _truncate])
def test_every_damaged_byte_is_found(tmp_path, state, spoil):
  _save(tmp_path, state, 2, 4)
  files = _files(tmp_path / '4')
  assert len(files) > 5
  for path, content in files.items():
    path.write_bytes(spoil(content))
    harmless = path.name in ('_CHECKPOINT_METADATA', 'commit_success.txt')
    found = checkpoint.damage(tmp_path / '4')
    if harmless and path.parent == tmp_path / '4':
      assert found is None
    elif path.name == 'manifest.json':
      # Of which a digit may say of another file what is not so.
      assert found
    else:
      assert path.name in found
    path.write_bytes(content)
  assert checkpoint.damage(tmp_path / '4') is None


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(
  tmp_path, state, capfd
):
  _save(tmp_path, state, 2, 4)
  largest = max(_files(tmp_path / '4').items(), key=lambda item: len(item[1]))
  largest[0].write_bytes(_flip(largest[1]))
  damaged = {p.name: x for p, x in _files(tmp_path / '4').items()}

  # Who only reads leaves everything as it is.
  restored, _ = checkpoint.restore_newest(tmp_path, _like(state))
  assert int(restored.step) == 2
  assert saved_steps(tmp_path) == [4, 2]

  checkpoints = Checkpoints(tmp_path, keep=3)
  restored, meta = checkpoints.restore(_like(state))
  assert int(restored.step) == meta['step'] == 2
  assert checkpoints.latest_step() == 2
  messages = capfd.readouterr().err
  assert f'checkpoint {tmp_path / "4"} is damaged: ' in messages
  assert largest[0].name in messages
  checkpoints.save(_at_step(state, 4), {'step': 'again'})
  checkpoints.close()
  assert _restore(tmp_path, _like(state))[1] == {'step': 'again'}
  kept = {p.name: x for p, x in _files(tmp_path / 'damaged_4').items()}
  assert kept == damaged


def test_where_all_are_damaged_nothing_is_touched(tmp_path, state):
  _save(tmp_path, state, 2, 4)
  (tmp_path / '2' / 'meta' / 'metadata').unlink()
  (tmp_path / '4' / 'state').rename(tmp_path / 'elsewhere')
  for _ in range(2):
    with pytest.raises(UserError) as error:
      _restore(tmp_path, _like(state))
    _assert_one_line(error, str(tmp_path), 'damaged', 'is missing', '--workdir')
  assert saved_steps(tmp_path) == [4, 2]


def test_a_checkpoint_from_before_manifests_is_read(tmp_path, state):
  _save(tmp_path, state, 2)
  (tmp_path / '2' / checkpoint.MANIFEST).unlink()
  _assert_same(state, _restore(tmp_path, _like(state))[0])
  (tmp_path / '2' / 'meta' / 'metadata').write_text('{')
  with pytest.raises(UserError) as error:
    _restore(tmp_path, _like(state))
  _assert_one_line(error, str(tmp_path / '2'), 'cannot be read', 'no digests')


def test_a_checkpoint_of_a_newer_program_is_told(tmp_path, state):
  _save(tmp_path, state, 2)
  file = tmp_path / '2' / checkpoint.MANIFEST
  manifest = json.loads(file.read_text())
  file.write_text(json.dumps({**manifest, 'format_version': 99}))
  with pytest.raises(UserError) as error:
    _restore(tmp_path, _like(state))
  _assert_one_line(error, str(file), 'newer cmd_jax', '99')


def test_what_a_killed_save_has_left_is_cleared(tmp_path, state):
  _save(tmp_path, state, 2)
  left = tmp_path / '4.orbax-checkpoint-tmp'
  left.mkdir()
  (left / 'part').write_text('x')
  _save(tmp_path, state, 6)
  assert not left.exists()
  assert saved_steps(tmp_path) == [6, 2]


def test_a_saved_network_is_that_of_the_newest_good_checkpoint(tmp_path, capfd):
  saved_runs.make_run(tmp_path / 'run', 'dino')
  workdir = Workdir(str(tmp_path / 'run'))
  first = workdir.checkpoints / str(saved_runs.STEP)
  shutil.copytree(first, workdir.checkpoints / '7')
  assert saved_run.read_network(workdir, 'teacher').step == 7

  manifest = json.loads((first / checkpoint.MANIFEST).read_text())
  name = next(x for x in manifest['files'] if '/d/' in x)
  path = workdir.checkpoints / '7' / name
  path.write_bytes(_flip(path.read_bytes()))
  found = saved_run.read_network(workdir, 'teacher')
  assert found.step == saved_runs.STEP
  assert f'{name} is not what was written' in capfd.readouterr().err
