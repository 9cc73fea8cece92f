import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax import evaluators
from cmd_jax.data import canvas
from cmd_jax.devices import sharding
from cmd_jax.errors import UserError
from cmd_jax.methods.base import Encoded
from cmd_jax.rundir.checkpoint import Checkpoints
from cmd_jax.rundir.workdir import Workdir
from cmd_jax.training import experiment, scoring
from cmd_jax.training.state import TrainState

PX, DIM = 4, 5
PROTOCOLS = ('knn/20', 'retrieval/test-vs-train')


def _canvases(split, num_examples, seed, labelled=True):
  rng = np.random.default_rng(seed)
  labels = np.arange(num_examples) % 3 if labelled else -np.ones(num_examples)
  return canvas.Canvases(
    name=f'birds/{split}',
    images=rng.integers(0, 256, (num_examples, PX, PX, 3), np.uint8),
    sizes=np.full((num_examples, 2), PX, np.int32),
    labels=labels.astype(np.int32),
    file_names=tuple(f'{i}.png' for i in range(num_examples)),
    class_names=('robin', 'tit', 'wren') if labelled else (),
    part_ids=None,
    boxes=None,
    skipped=(),
  )


def _state(seed, step=0):
  student, teacher = np.random.default_rng(seed).normal(
    size=(2, PX * PX * 3, DIM)
  )
  return TrainState(
    step=jnp.int32(step),
    params=jnp.float32(student),
    teacher_params=jnp.float32(teacher),
    opt_state=(),
    method_state={},
  )


def _view(images, sizes):
  del sizes
  return images.astype(jnp.float32) / 255


def _encode(params, stats, images):
  assert stats == {}
  image = images.reshape(len(images), -1) @ params
  return Encoded(image, tokens=images, attention=images)


_SETTINGS = dict(
  view_px=PX,
  crop_fraction=0.0,
  parts_hit=dict(part_ids=[], keypoints=''),
)


def _experiment(*, labelled=True, test=True, network='teacher'):
  """What evaluation needs of an `Experiment`, with a matrix for an encoder."""
  return types.SimpleNamespace(
    name='birds/train',
    pretrain=_canvases('train', 31, 0, labelled),
    test=_canvases('test', 13, 1, labelled) if test else None,
    method=types.SimpleNamespace(
      encode=_encode, encoder_variables=lambda params, stats: {'params': params}
    ),
    encoder='a matrix',
    mesh=sharding.make_mesh(8),
    imported=None,
    data_sha256='of the data',
    evaluation=experiment.Evaluation(PROTOCOLS, _view, 8, network, _SETTINGS),
    init_state=lambda: _state(0),
    state_like=jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      _state(0),
    ),
    open_checkpoints=lambda w: Checkpoints(w.checkpoints, keep=2),
  )


def _expected(params, tiny):
  """The scores with features computed by numpy."""

  def features(canvases):
    pixels = canvases.images.reshape(len(canvases.images), -1) / 255
    return evaluators.Features(
      (pixels @ np.asarray(params, np.float64)).astype(np.float32),
      canvases.labels,
      canvases.class_names,
      canvases.file_names,
    )

  return evaluators.evaluate(
    PROTOCOLS, features(tiny.pretrain), features(tiny.test)
  )


@pytest.mark.parametrize('network', ['teacher', 'student'])
def test_scores_are_those_of_the_chosen_network(network):
  tiny, state = _experiment(network=network), _state(3)
  params = {'teacher': state.teacher_params, 'student': state.params}
  scores = scoring.score(tiny, scoring.encode(tiny, state))
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
  reason = scoring.why_not_scored(tiny)
  assert f'no labelled {split} images in birds/train' in reason
  assert scoring.score(tiny, scoring.encode(tiny, _state(0))) == {}
  with pytest.raises(UserError, match=f'no labelled {split} .* labels.csv'):
    scoring.evaluate_run(tiny, Workdir(str(tmp_path)))
  assert scoring.why_not_scored(_experiment()) is None


def test_a_run_is_scored_before_and_at_its_last_checkpoint(tmp_path):
  tiny, workdir = _experiment(), Workdir(str(tmp_path))
  workdir.update_results(seconds=3, data_sha256='of the data')
  checkpoints = tiny.open_checkpoints(workdir)
  for step in (5, 9):
    checkpoints.save(_state(step, step), {})
  checkpoints.close()
  results = scoring.evaluate_run(tiny, workdir)
  assert results == workdir.results()
  assert results['seconds'] == 3
  assert results['steps'] == 9
  assert results['protocols'] == list(PROTOCOLS)
  for when, state in (('init', _state(0)), ('final', _state(9))):
    expected = _expected(state.teacher_params, tiny)
    assert results[when] == pytest.approx(expected)


@pytest.mark.parametrize('make_directory', [False, True])
def test_a_run_without_checkpoint_is_refused(tmp_path, make_directory):
  workdir = Workdir(str(tmp_path / 'run'))
  if make_directory:
    workdir.checkpoints.mkdir(parents=True)
  with pytest.raises(UserError, match='no checkpoint in .*: train first'):
    scoring.evaluate_run(_experiment(), workdir)
  assert pathlib.Path(workdir.path).exists() == make_directory
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


def test_weights_of_others_are_scored_without_training(tmp_path):
  tiny, workdir = _experiment(), Workdir(str(tmp_path))
  tiny.imported = types.SimpleNamespace(
    path='x.pth', sha256='of x', family='ViT', resized=()
  )
  results = scoring.evaluate_run(tiny, workdir)
  assert results == workdir.results()
  expected = _expected(_state(0).teacher_params, tiny)
  assert results['init'] == pytest.approx(expected)
  assert 'final' not in results and 'steps' not in results
  assert results['init_from']['sha256'] == 'of x'


def test_features_are_computed_once(tmp_path):
  tiny, workdir = _experiment(), Workdir(str(tmp_path))
  calls = []

  def encode(*arguments):
    calls.append(1)
    return _encode(*arguments)

  tiny.method.encode = encode
  tiny.imported = types.SimpleNamespace(
    path='x.pth', sha256='of x', family='ViT', resized=()
  )
  results = scoring.evaluate_run(tiny, workdir)
  assert calls
  calls.clear()
  assert scoring.evaluate_run(tiny, workdir) == results
  assert not calls
  tiny.pretrain.images[:] = 255 - tiny.pretrain.images
  assert scoring.evaluate_run(tiny, workdir) != results
  assert len(calls) == 1


def test_what_needs_no_label_is_scored_without():
  tiny = _experiment(labelled=False)
  boxes = np.tile(np.float32([0, 0, 0.5, 1]), (13, 1))
  tiny.test = tiny.test._replace(boxes=boxes)
  tiny.evaluation = tiny.evaluation._replace(protocols=('knn/20', 'parts/hit'))
  attention = np.tile(np.float32([0.5, 0.1, 0.2, 0.2]), (13, 1))
  encoded = scoring.Encoded(None, None, attention={'mil': attention})
  assert scoring.score(tiny, encoded) == pytest.approx(
    {
      'parts/hit/box/mil_mass': 0.6,
      'parts/hit/box/mil_peak': 1,
      'parts/hit/box/uniform': 0.5,
    }
  )


@pytest.mark.parametrize(
  'before, words',
  [
    ({'data_sha256': 'other'}, 'trained on other images'),
    (
      {'data_sha256': 'of the data', 'init_from': {'sha256': 'y'}},
      'started from other weights than x.pth',
    ),
  ],
)
def test_runs_of_other_data_or_weights_are_refused(tmp_path, before, words):
  tiny, workdir = _experiment(), Workdir(str(tmp_path))
  tiny.imported = types.SimpleNamespace(path='x.pth', sha256='of x')
  workdir.update_results(**before)
  checkpoints = tiny.open_checkpoints(workdir)
  checkpoints.save(_state(5, 5), {})
  checkpoints.close()
  with pytest.raises(UserError, match=words):
    scoring.evaluate_run(tiny, workdir)
