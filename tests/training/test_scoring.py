import types

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from cmd_jax import evaluators
from cmd_jax.convert.load import report_of_lost
from cmd_jax.data.augment.multi_crop import make_eval_view
from cmd_jax.errors import UserError
from cmd_jax.evaluators import frozen_network
from cmd_jax.rundir.workdir import Workdir
from cmd_jax.training import run, scoring
from tests import scored_runs
from tests.scored_runs import PX, make_state, make_workdir

PROTOCOLS = ('knn/20', 'retrieval/test-vs-train')


def _experiment(**changes):
  return scored_runs.make_experiment(protocols=PROTOCOLS, **changes)


def _expected(params, tiny):
  """The scores of features computed in one pass."""
  view = make_eval_view(view_px=PX, crop_fraction=None)

  @jax.jit
  def encode(images, sizes):
    variables = {'params': params['encoder']}
    return tiny.encoder.apply(variables, view(images, sizes)).image

  network = types.SimpleNamespace(
    embeddings=lambda split: evaluators.Features(
      np.asarray(encode(split.images, split.sizes)),
      split.labels,
      split.class_names,
      split.file_names,
    )
  )
  return evaluators.evaluate(tiny.evaluation.evaluators, network, tiny.splits)


@pytest.mark.parametrize('network', ['teacher', 'student'])
def test_scores_are_those_of_the_chosen_network(tmp_path, network):
  tiny, state = _experiment(network=network), make_state(3)
  params = {'teacher': state.teacher_params, 'student': state.params}
  frozen = scoring.network_of(tiny, state, Workdir(str(tmp_path)))
  scores = scoring.score(tiny, frozen)
  assert scores == pytest.approx(_expected(params[network], tiny))
  assert 'knn/20/top1' in scores
  other = params['student' if network == 'teacher' else 'teacher']
  assert scores != pytest.approx(_expected(other, tiny))


@pytest.mark.parametrize(
  'changes, split',
  [({'labelled': False}, 'training'), ({'test': False}, 'test')],
)
def test_data_without_labels_are_not_scored_and_the_reason_is_told(
  tmp_path, changes, split
):
  tiny = _experiment(**changes)
  with pytest.raises(UserError, match=f'no labelled {split} .* labels.csv'):
    scoring.evaluate_run(tiny, Workdir(str(tmp_path)))


def test_a_run_is_scored_before_and_at_its_last_checkpoint(tmp_path):
  tiny = _experiment()
  states = [make_state(step, step) for step in (5, 9)]
  workdir = make_workdir(tmp_path, *states, seconds=3)
  results = scoring.evaluate_run(tiny, workdir)
  assert results == workdir.results()
  assert results['seconds'] == 3
  assert results['steps'] == 9
  assert results['protocols'] == list(PROTOCOLS)
  for when, state in (('init', make_state(0)), ('final', states[1])):
    expected = _expected(state.teacher_params, tiny)
    assert results[when] == pytest.approx(expected)


@pytest.mark.parametrize('make_directory', [False, True])
def test_a_run_without_checkpoint_is_refused(tmp_path, make_directory):
  workdir = Workdir(str(tmp_path / 'run'))
  if make_directory:
    workdir.checkpoints.mkdir(parents=True)
  with pytest.raises(UserError, match='no checkpoint in .*: train first'):
    scoring.evaluate_run(_experiment(), workdir)
  assert workdir.path.exists() == make_directory
  assert not workdir.results_file.exists()


def test_the_table_is_in_per_cent_with_gains_in_points():
  table = scoring.results_table(
    {'knn/20/top1': 0.125, 'linear/logreg/top1': 1.0},
    {'knn/20/top1': 0.5, 'linear/logreg/top1': 0.9, 'new/rank1': 0.3333},
  )
  assert table.split('\n') == [
    'protocol/metric       initial  trained    gain',
    'knn/20/top1              12.5     50.0   +37.5',
    'linear/logreg/top1      100.0     90.0   -10.0',
    'new/rank1                   -     33.3       -',
  ]
  table = scoring.results_table({'knn/20/top1': 0.125}, {})
  assert table.split('\n') == [
    'protocol/metric    initial',
    'knn/20/top1           12.5',
  ]


def test_the_table_says_what_its_protocols_score():
  scores = {'knn/20/top1': 0.125, 'knn/20/top5': 0.5, 'new/rank1': 0.3}
  table, words = scoring.explained_table(scores, {}).split('\n\n')
  assert table == scoring.results_table(scores, {})
  assert words == 'knn/20: the 20 nearest training images vote for the class'


def test_weights_of_others_are_scored_without_training(tmp_path):
  tiny, workdir = _experiment(), Workdir(str(tmp_path))
  tiny.imported = types.SimpleNamespace(
    path='x.pth', sha256='of x', family='ViT', resized=()
  )
  results = scoring.evaluate_run(tiny, workdir)
  assert results == workdir.results()
  expected = _expected(make_state(0).teacher_params, tiny)
  assert results['init'] == pytest.approx(expected)
  assert 'final' not in results and 'steps' not in results
  assert results['init_from']['sha256'] == 'of x'


def test_features_are_computed_once(tmp_path, monkeypatch):
  tiny, workdir = _experiment(), Workdir(str(tmp_path))
  calls = []

  def extract(*args, **kwargs):
    calls.append(1)
    return frozen_network_extract(*args, **kwargs)

  frozen_network_extract = frozen_network.extract
  monkeypatch.setattr(frozen_network, 'extract', extract)
  tiny.imported = types.SimpleNamespace(
    path='x.pth', sha256='of x', family='ViT', resized=()
  )
  results = scoring.evaluate_run(tiny, workdir)
  assert len(calls) == 2
  assert scoring.evaluate_run(tiny, workdir) == results
  assert len(calls) == 2
  tiny.data.pretrain.images[:] = 255 - tiny.data.pretrain.images
  assert scoring.evaluate_run(tiny, workdir) != results
  assert len(calls) == 3


@pytest.mark.parametrize(
  'before, words',
  [
    ({'data_sha256': '1' * 64}, 'trained on other images'),
    (
      {'init_from': {'sha256': 'y'}},
      'started from other weights than x.pth',
    ),
  ],
)
def test_runs_of_other_data_or_weights_are_refused(tmp_path, before, words):
  tiny, workdir = _experiment(), make_workdir(tmp_path, make_state(5, 5))
  tiny.imported = types.SimpleNamespace(path='x.pth', sha256='of x')
  workdir.update_results(**before)
  with pytest.raises(UserError, match=words):
    scoring.evaluate_run(tiny, workdir)


_START = {'path': 'x.pth', 'sha256': 'of x', 'family': 'ViT', 'resized': []}


def _lost(experiment):
  experiment.imported = report_of_lost(_START)
  experiment.start_is_lost = True
  experiment.init_state = None
  return experiment


def test_a_lost_start_keeps_its_scores(tmp_path, capsys):
  workdir = make_workdir(tmp_path, make_state(5, 5))
  tiny = _lost(_experiment())
  settings = tiny.evaluation.settings
  init = {'knn/20/top1': 0.25}
  workdir.update_results(init=init, init_from=_START, eval=settings)
  results = scoring.evaluate_run(tiny, workdir)
  assert results['init'] == init
  assert scoring.describe_start(tiny) == results['init_from'] == _START
  assert 'knn/20/top1' in results['final']
  assert 'not there any more' not in capsys.readouterr().err

  # Scores of other settings are no start to compare with.
  workdir.update_results(eval=settings | {'view_px': 99})
  results = scoring.evaluate_run(tiny, workdir)
  assert results['init'] == {}
  assert 'x.pth is not there any more' in capsys.readouterr().err


def test_which_starts_are_lost(tmp_path, monkeypatch):
  path = tmp_path / 'x.pth'
  config = ConfigDict({'init': {'path': str(path)}})
  start = _START | {'path': str(path)}
  empty = Workdir(str(tmp_path / 'empty'))
  assert run._lost_start(empty, config) is None
  workdir = make_workdir(tmp_path / 'run', make_state(5, 5))
  # What the run started from is not known.
  assert run._lost_start(workdir, config) is None
  workdir.update_results(init_from=start)
  assert run._lost_start(workdir, config) == start
  assert run._lost_start(workdir, ConfigDict({'init': {'path': ''}})) is None
  path.write_bytes(b'x')
  assert run._lost_start(workdir, config) is None

  def resolve(name):
    raise UserError(f'{name} is not installed any more')

  monkeypatch.setattr(run.pretrained, 'resolve', resolve)
  named = ConfigDict({'init': {'path': 'efficientnet_lite2'}})
  assert run._lost_start(workdir, named) == start
