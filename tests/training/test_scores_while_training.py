"""Runs that are scored while they train."""

import json
import shutil
import time

import jax
import jax.numpy as jnp
import pytest

from cmd_jax.data.batch import MultiStepBatch
from cmd_jax.errors import UserError
from cmd_jax.rundir.best import choose_step
from cmd_jax.rundir.checkpoint import saved_steps
from cmd_jax.rundir.workdir import Workdir
from cmd_jax.training import loop, validation
from cmd_jax.training.step import WATCHED
from tests import saved_runs
from tests.reliability import small_run

_CLASSES = 'robin', 'wren'
# Two steps an epoch, six epochs; scored after 0, 4, 8 and 12 steps.
_FIELDS = dict(eval__every_epochs=2.0, total_epochs=6)


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  path = tmp_path_factory.mktemp('photos')
  names = [
    f'{split}/{name}/{i}.png'
    for split, count in (('train', 8), ('test', 3))
    for name in _CLASSES
    for i in range(count)
  ]
  saved_runs.write_images(path, names)
  return path


def _build(photos, **changes):
  return small_run.build(small_run.make_config(photos, **_FIELDS | changes))


def _train(experiment, path, monkeypatch):
  small_run.leave_out_scores(monkeypatch)
  workdir = Workdir(str(path))
  workdir.open({})
  return loop.train(experiment, workdir), workdir


def _scored(workdir):
  """{step: scores}, each line once."""
  found = {}
  for line in small_run.read_metrics(workdir):
    scores = {k: v for k, v in line.items() if k.startswith('eval/')}
    if scores:
      assert line['step'] not in found
      found[line['step']] = scores
  return found


def _build_idle(photos, **changes):
  """An experiment whose steps do nothing but count: nothing is compiled."""

  def step(state, batch, rng):
    del rng
    several = isinstance(batch, MultiStepBatch)
    count = batch.count if several else 1
    shape = (len(batch.batch.index),) if several else ()
    metrics = dict.fromkeys(WATCHED, jnp.ones(shape))
    return state._replace(step=state.step + count), metrics

  return _build(photos, **changes)._replace(compile_step=lambda: step)


def _fake_scores(monkeypatch, by_step, seconds=0):
  """In place of the scores of each step; the network is not looked at."""

  def score(self, experiment, state):
    time.sleep(seconds)
    return {'rank1': by_step[int(state.step)]}, [1, 0]

  monkeypatch.setattr(validation.Validation, '_score', score)


def test_scores_begin_with_the_start_and_are_logged(
  photos, tmp_path, monkeypatch
):
  experiment = _build_idle(photos)
  results, workdir = _train(experiment, tmp_path, monkeypatch)
  scored = _scored(workdir)
  assert list(scored) == [0, 4, 8, 12]
  assert scored[0].keys() == {'eval/knn', 'eval/rank1', 'eval/rankme'}
  for scores in list(scored.values())[1:]:
    # Nothing moves, and so does no neighbour.
    assert scores == pytest.approx(scored[0] | {'eval/stable_neighbours': 1})
  # Of the start: made again from its seed.
  again = validation.Validation(experiment, None, [])
  start = again.evaluate(experiment, experiment.init_state())
  assert start == pytest.approx(scored[0])
  assert 'best' not in results and results['scored_step'] == 12
  # Steps are logged as before, and the test images were not touched.
  steps = [x['step'] for x in small_run.read_metrics(workdir) if 'loss' in x]
  assert steps == list(range(1, 13))


def test_training_images_ask_each_other_or_a_validation_split_asks_them(
  photos, monkeypatch
):
  experiment, seen = _build(photos), []
  monkeypatch.setattr(
    validation.validation,
    'score_labelled',
    lambda train, queries: seen.append((train, queries)) or {},
  )
  data = experiment.data
  watch = validation.Validation(experiment, None, [])
  watch.evaluate(experiment._replace(data=data), experiment.init_state())
  [(train, queries)] = seen
  assert set(train.file_names) == set(data.pretrain.file_names)
  assert queries is None

  data = data._replace(validation=data.test)
  watch.evaluate(experiment._replace(data=data), experiment.init_state())
  train, queries = seen[1]
  assert set(train.file_names) == set(data.pretrain.file_names)
  assert set(queries.file_names) == set(data.test.file_names)


def test_steps_of_the_same_score_are_told_apart_by_more_neighbours(
  photos, monkeypatch
):
  told = [(0.5, 0.9), (0.6, 0.3), (0.6, 0.5), (0.6, 0.5), (0.6, 0.4)]
  experiment = _build(photos, checkpoint__keep_best='rank1')
  watch = validation.Validation(experiment, None, [])
  for step, (rank1, knn) in enumerate(told):
    scores = {'rank1': rank1, 'knn': knn}
    monkeypatch.setattr(watch, '_score', lambda *_, x=scores: (x, None))
    watch.evaluate(experiment, experiment.init_state()._replace(step=step))
  assert watch.best['step'] == 2


def test_the_best_checkpoint_is_kept_and_scored(
  photos, tmp_path, monkeypatch, capfd
):
  fields = dict(
    checkpoint__keep_best='rank1',
    checkpoint__keep=1,
    parallel__steps_per_dispatch=8,
    placement='device',
  )
  _fake_scores(monkeypatch, {0: 0.2, 4: 0.6, 8: 0.5, 12: 0.6})
  experiment = _build_idle(photos, **fields)
  results, workdir = _train(experiment, tmp_path / 'run', monkeypatch)
  assert results['best'] == {'score': 'rank1', 'step': 4, 'value': 0.6}
  assert (results['steps'], results['scored_step']) == (12, 4)
  assert saved_steps(workdir.checkpoints) == [12, 4]
  assert list(_scored(workdir)) == [0, 4, 8, 12]
  assert 'step 4 is used, the best by rank1 (0.6)' in capfd.readouterr().err

  assert choose_step(workdir.checkpoints).step == 4
  newest = choose_step(workdir.checkpoints, newest=True)
  assert (newest.step, newest.best) == (12, None)

  # What is gone is not the best any more.
  shutil.rmtree(workdir.checkpoints / '4')
  assert choose_step(workdir.checkpoints).step == 12
  assert 'it is missing' in capfd.readouterr().err


class _Killed(Exception):
  pass


@pytest.mark.parametrize('moment', ['before it is saved', 'after'])
def test_a_run_killed_at_an_evaluation_is_not_scored_twice(
  photos, tmp_path, monkeypatch, moment
):
  """The best step is 8, where the run is killed."""
  _fake_scores(monkeypatch, {0: 0.2, 4: 0.3, 8: 0.6, 12: 0.5})
  experiment = _build_idle(
    photos,
    checkpoint__keep_best='rank1',
    checkpoint__every_steps=3,
    checkpoint__keep=1,
  )
  save = loop.Checkpoints.save

  def die(self, state, meta, **options):
    if int(state.step) == 8 and moment != 'after':
      raise _Killed
    save(self, state, meta, **options)
    if int(state.step) == 8:
      raise _Killed

  with monkeypatch.context() as patched:
    patched.setattr(loop.Checkpoints, 'save', die)
    with pytest.raises(_Killed):
      _train(experiment, tmp_path, patched)
  workdir = Workdir(str(tmp_path))
  expected = [6, 4] if moment != 'after' else [8]
  assert saved_steps(workdir.checkpoints) == expected
  assert choose_step(workdir.checkpoints).step == expected[-1]

  results, workdir = _train(experiment, tmp_path, monkeypatch)
  assert list(_scored(workdir)) == [0, 4, 8, 12]
  assert results['best']['step'] == results['scored_step'] == 8
  assert saved_steps(workdir.checkpoints) == [12, 8]


def test_a_run_killed_before_its_first_checkpoint_begins_again(
  photos, tmp_path, monkeypatch
):
  _fake_scores(monkeypatch, dict.fromkeys((0, 4, 8, 12), 0.5), seconds=0.7)
  experiment = _build_idle(photos, checkpoint__every_steps=100)
  workdir = Workdir(str(tmp_path))
  workdir.open({})
  workdir.metrics_file.write_text(json.dumps({'step': 0, 'eval/rank1': 0.1}))
  results, workdir = _train(experiment, tmp_path, monkeypatch)
  assert _scored(workdir)[0] == {'eval/rank1': 0.5}
  # The 1.4 s of the scores after 4 and 8 steps are no time of training.
  assert results['images_per_second'] > 11 * 8 / 1.4


@pytest.mark.parametrize(
  'changes, words',
  [
    (
      {'checkpoint__keep_best': 'mAP'},
      "choose one of '', auto, knn",
    ),
    (
      {'checkpoint__keep_best': 'knn', 'eval__every_epochs': 0.0},
      "keep_best is 'knn', .*every_epochs is 0: set that to 1",
    ),
    ({'eval__every_epochs': -1.0}, 'every_epochs is -1.0: it must be at least'),
  ],
)
def test_what_cannot_choose_is_told_at_the_start(photos, changes, words):
  with pytest.raises(UserError, match=words):
    _build(photos, **changes)


def test_a_score_of_labels_needs_labels(tmp_path):
  small_run.write_photos(tmp_path)
  with pytest.raises(UserError, match="'rank1', which needs labels, .*'rankme"):
    _build(tmp_path, checkpoint__keep_best='rank1')
  assert _build(tmp_path, checkpoint__keep_best='rankme').steps.keep_best
  assert _build(tmp_path, checkpoint__keep_best='auto').steps.keep_best == ''


def test_where_there_are_labels_they_choose_by_themselves(photos):
  built = _build(photos, checkpoint__keep_best='auto')
  assert built.steps.keep_best == 'rank1'


@pytest.mark.parametrize(
  'epochs, every, expected', [(6, 50, 1), (30, 50, 3), (30, 2, 2)]
)
def test_a_short_run_logs_twenty_times(photos, epochs, every, expected):
  experiment = _build(photos, total_epochs=epochs, log__every_steps=every)
  assert experiment.steps.total == 2 * epochs
  assert experiment.steps.log_every == expected


def test_features_that_are_not_finite_are_not_scored(photos):
  experiment = _build(photos)
  state = experiment.init_state()
  broken = state._replace(
    teacher_params=jax.tree.map(
      lambda x: x * float('nan'), state.teacher_params
    )
  )
  watch = validation.Validation(experiment, None, [])
  assert watch.evaluate(experiment, broken) == {}
  assert watch.best is None


def test_settings_of_the_scores_before_and_after_stay_the_same(photos):
  """Else old runs would lose the scores of their start."""
  assert 'every_epochs' not in _build(photos).evaluation.settings


def test_a_folder_with_three_splits_is_validated_on_the_second(tmp_path):
  names = [f'train/{name}/{i}.png' for name in _CLASSES for i in range(4)]
  names += ['val/wren/8.png', 'test/wren/9.png', 'test/robin/9.png']
  saved_runs.write_images(tmp_path, names)
  data = _build(tmp_path, checkpoint__keep_best='knn').data
  assert data.validation.file_names == ('val/wren/8.png',)
  assert len(data.pretrain.file_names) == 8
  assert len(data.test.file_names) == 2
  assert _build(tmp_path, eval__every_epochs=0.0).data.validation is None
