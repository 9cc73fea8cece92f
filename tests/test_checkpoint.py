import jax
import numpy as np
import pytest

from cmd_jax import parallel
from cmd_jax.checkpoint import Checkpoints
from cmd_jax.errors import UserError
from cmd_jax.train_state import init_train_state
from tests import tiny


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
  whole = parallel.replicated(parallel.make_mesh(num_devices))
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


def test_a_state_of_another_structure_is_told(tmp_path, state):
  _save(tmp_path, state, 2)
  fewer = dict(state.params)
  fewer.pop(sorted(fewer)[0])
  with pytest.raises(UserError) as error:
    _restore(tmp_path, _like(state._replace(params=fewer)))
  _assert_one_line(error, 'checkpoint 2', str(tmp_path), 'structures')


def test_a_checkpoint_without_its_state_is_told(tmp_path, state):
  _save(tmp_path, state, 2)
  (tmp_path / '2' / 'state').rename(tmp_path / 'elsewhere')
  with pytest.raises(UserError) as error:
    _restore(tmp_path, _like(state))
  _assert_one_line(error, 'checkpoint 2', str(tmp_path), 'delete that folder')
