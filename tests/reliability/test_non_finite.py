import dataclasses
import json

import jax
import numpy as np
import pytest

from cmd_jax.errors import UserError
from cmd_jax.optim import optimizers
from cmd_jax.rundir.workdir import Workdir
from cmd_jax.training import loop
from cmd_jax.training.non_finite import NonFiniteSteps
from tests import tiny
from tests.reliability import small_run

_HEALTHY = {
  'loss': 1.0,
  'loss/image': 1.0,
  'grad_norm': 2.0,
  'param_norm': 0.1,
}
_NAN, _INF = float('nan'), float('inf')


def _make_steps(tmp_path, **changes):
  fields = dict(
    allowed=0,
    skipped=0,
    batch_indices=lambda step: np.int32([step, step + 1]),
    file_names=[f'{i}.jpg' for i in range(20)],
  )
  return NonFiniteSteps(Workdir(str(tmp_path)), **fields | changes)


@pytest.mark.parametrize(
  'bad, named',
  [
    ({'loss': _NAN, 'loss/image': _NAN}, 'terms: image'),
    ({'grad_norm': _INF}, 'terms: none by itself, grad_norm'),
    ({'param_norm': _INF}, 'terms: none by itself, param_norm'),
  ],
)
def test_the_term_the_step_and_the_images_are_named(tmp_path, bad, named):
  steps = _make_steps(tmp_path)
  steps.look(6, _HEALTHY, 4)
  assert not (tmp_path / 'non_finite.json').exists()
  with pytest.raises(UserError, match=named) as caught:
    steps.look(7, _HEALTHY | bad, 4)
  message = str(caught.value)
  assert 'are not finite at step 7 (' in message
  assert 'the last checkpoint, of step 4, is from before' in message
  assert '--config.optim.skip_non_finite_steps=10' in message
  assert '\n' not in message
  (record,) = json.loads((tmp_path / 'non_finite.json').read_text())['steps']
  assert record['step'] == 7
  assert record['index'] == [6, 7]
  assert record['file_names'] == ['6.jpg', '7.jpg']
  for name, value in (_HEALTHY | bad).items():
    assert record['values'][name] == (str(value) if name in bad else value)


def test_no_more_steps_are_left_out_than_are_allowed(tmp_path):
  steps = _make_steps(tmp_path, allowed=3, skipped=1)
  for step in (5, 9):
    steps.look(step, _HEALTHY | {'loss': _NAN}, 0)
  assert steps.skipped == 3
  with pytest.raises(UserError, match='no checkpoint was saved') as caught:
    steps.look(11, _HEALTHY | {'loss': _NAN}, 0)
  assert 'skip_non_finite_steps=3 are left out already' in str(caught.value)
  # A resumed run comes by again, and each step is there once.
  resumed = _make_steps(tmp_path, allowed=9)
  resumed.look(9, _HEALTHY | {'loss': _NAN}, 0)
  records = json.loads((tmp_path / 'non_finite.json').read_text())['steps']
  assert [record['step'] for record in records] == [5, 9]


def _without_loss_in_step(number, method):
  def weight(step):
    return jax.numpy.where(step == number, _NAN, 1.0)

  distillation = tiny.inside(method)
  terms = {
    name: term._replace(weight=weight)
    for name, term in distillation.terms.items()
  }
  return dataclasses.replace(distillation, terms=terms).as_method()


def _too_fast_in_step(number):
  return optimizers.make_sgd(
    learning_rate=lambda step: jax.numpy.where(step == number, 1e30, 1e-2),
    weight_decay=lambda step: 0.0,
  )


@pytest.mark.parametrize(
  'options',
  [
    dict(num_devices=2, fsdp=True, grad_accum_steps=2),
    pytest.param(dict(num_devices=2, mode='pmap'), marks=pytest.mark.slow),
  ],
)
def test_steps_left_out_move_nothing_but_their_number(options, monkeypatch):
  make_method = tiny.make_tiny_method
  monkeypatch.setattr(
    tiny,
    'make_tiny_method',
    lambda *args, **kwargs: _without_loss_in_step(
      1, make_method(*args, **kwargs)
    ),
  )
  step, state = tiny.make_step(
    'dino',
    optimizer=_too_fast_in_step(2),
    skip_non_finite=True,
    **options,
  )
  states = [jax.device_get(state)]
  for number in range(4):
    state, metrics = step(state, tiny.make_batch(number), jax.random.key(1))
    states.append(jax.device_get(state))
    assert np.isfinite(metrics['loss']) == (number != 1)
    assert np.isfinite(metrics['grad_norm']) == (number != 1)
    assert np.isfinite(metrics['param_norm']) == (number in (0, 3))
  assert [int(x.step) for x in states] == [0, 1, 2, 3, 4]
  for left_out in states[2:4]:
    for before, after in zip(
      jax.tree.leaves(states[1]._replace(step=0)),
      jax.tree.leaves(left_out._replace(step=0)),
      strict=True,
    ):
      np.testing.assert_array_equal(before, after)
  # The centre and the teacher, too, move again with the next one.
  for name in ('params', 'teacher_params', 'opt_state', 'method_state'):
    before, after = (getattr(states[i], name) for i in (3, 4))
    moved = jax.tree.map(lambda x, y: np.any(x != y), before, after)
    assert any(jax.tree.leaves(moved)), name
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(states[4]))


def _poisoned(built, number):
  """The experiment, with a term that is not finite in step `number`."""
  compiled = built.compile_step()

  def step(state, batch, rng):
    bad = int(state.step) + 1 == number
    state, metrics = compiled(state, batch, rng)
    if bad:
      nan = jax.numpy.float32(_NAN)
      metrics = {**metrics, 'loss': nan, 'loss/image': nan}
    return state, metrics

  return built._replace(compile_step=lambda: step)


def _allowing_one(built):
  return built._replace(steps=built.steps._replace(non_finite_allowed=1))


@pytest.mark.usefixtures('unscored')
def test_a_run_stops_with_its_last_checkpoint_and_can_leave_the_step_out(
  tmp_path, photos
):
  workdir = Workdir(str(tmp_path / 'run'))
  config = small_run.make_config(photos)
  workdir.open(config.to_dict())
  built = small_run.build(config)
  # Of steps 2, 4 and 6, which are saved, only the first is from before.
  for _ in range(2):
    with pytest.raises(UserError, match='step 4 .*image.* step 2, is from'):
      loop.train(_poisoned(built, 4), workdir)
    names = [path.name for path in workdir.checkpoints.iterdir()]
    assert [name for name in names if name.isdigit()] == ['2']
  (record,) = json.loads(workdir.non_finite_file.read_text())['steps']
  assert record['values']['loss/image'] == 'nan'
  assert len(set(record['file_names'])) == 8

  config = small_run.make_config(photos, optim__skip_non_finite_steps=1)
  workdir.open(config.to_dict())
  results = loop.train(_allowing_one(_poisoned(built, 4)), workdir)
  assert (results['steps'], results['skipped_steps']) == (6, 1)
  counts = {
    x['step']: x.get('skipped_steps') for x in small_run.read_metrics(workdir)
  }
  assert counts == {1: None, 2: None, 3: 0, 4: 1, 5: 1, 6: 1}
  # The count goes on where it was.
  again = loop.train(_allowing_one(built), workdir)
  assert again['skipped_steps'] == 1
