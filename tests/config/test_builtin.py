import importlib
import pathlib

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from cmd_jax.config import builtin, choices, vocabulary
from cmd_jax.data import canvas
from cmd_jax.data.pipeline import load
from cmd_jax.data.sources.base import Source
from cmd_jax.training import experiment, functions
from tests import tiny

_REPO = pathlib.Path(__file__).resolve().parents[2]
_CONFIGS = sorted(
  path
  for path in (_REPO / 'configs').glob('*.py')
  if path.stem not in ('__init__', 'common', 'small')
)


def _load(path, argument=''):
  module = importlib.import_module(f'configs.{path.stem}')
  return module.get_config(argument or None)


def _synthetic(num_examples, canvas_px):
  """Canvases of two classes in turn, with no file behind them."""
  rng = np.random.default_rng(0)
  shape = (num_examples, canvas_px, canvas_px, 3)
  return canvas.Canvases(
    name='synthetic',
    images=rng.integers(0, 256, shape, np.uint8),
    sizes=np.full((num_examples, 2), canvas_px, np.int32),
    labels=np.arange(num_examples, dtype=np.int32) % 2,
    file_names=tuple(f'{i}.png' for i in range(num_examples)),
    class_names=('robin', 'wren'),
    part_ids=rng.integers(0, 4, shape[:3], np.uint8),
    boxes=None,
    skipped=(),
  )


@pytest.fixture
def without_data(monkeypatch):
  """Lets an experiment be built of every config, its data made up."""

  names = tuple(f'{i}.png' for i in range(4))
  labels = np.arange(4) % 2
  source = Source('synthetic', ('robin', 'wren'), names, labels, None)
  monkeypatch.setattr(load, 'load_source', lambda *_, **__: source)
  monkeypatch.setattr(
    load,
    'make_canvases',
    lambda source, canvas_px: _synthetic(64, canvas_px),
  )
  # The published weights are in a package of their own.
  monkeypatch.setattr(
    functions, 'load_teacher', lambda **fields: tiny.make_tiny_teacher()
  )


@pytest.mark.parametrize(
  'make, word',
  [
    (choices.method_fields, 'method=mine'),
    (choices.model_fields, 'encoder=mine'),
    (choices.part_fields, 'parts=mine'),
  ],
)
def test_a_word_without_fields_is_no_other_word(make, word):
  with pytest.raises(
    ValueError, match=f'{word} has no fields in {make.__name__}'
  ):
    make('mine')


@pytest.mark.parametrize('config', ['folder', 'particle_toybirds'])
@pytest.mark.parametrize('method', ['cmd', 'dino', 'simclr'])
def test_parts_are_refused_to_methods_without(config, method):
  with pytest.raises(ValueError, match=f'parts=grid is .* method is {method}'):
    builtin.get_config(f'{config}:method={method},parts=grid')


def test_there_are_configs():
  assert {'toybirds', 'folder'} <= {path.stem for path in _CONFIGS}


@pytest.mark.parametrize(
  'method, quicktest',
  [*((method, True) for method in vocabulary.METHODS), ('cmd', False)],
)
@pytest.mark.parametrize('path', _CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds_with_every_method(
  without_data, path, method, quicktest
):
  config = _load(path, f'method={method}' + ',quicktest' * quicktest)
  assert config.is_locked
  assert config.method.name == method.removesuffix('_released')
  if config.dataset.source == 'folder':
    assert config.dataset.path == ''
  config.batch_size = 8
  if quicktest:
    # One block is as good as another: each is traced twice.
    config.model.depth = 1
  built = experiment.build(config)
  assert built.method_name == method
  assert (built.parts is None) == (method not in ('particle', 'detcon'))
  assert built.steps.round_ends[-1] == built.steps.total
  terms = set(getattr(tiny.inside(built.method), 'terms', ()))
  weights = config.method.get('weights', {})
  assert terms == {name for name, w in weights.items() if w}
  state = built.state_like
  assert state.step.shape == ()
  assert 'encoder' in state.params
  same = jax.tree.map(
    lambda s, t: s.shape == t.shape, state.params, state.teacher_params
  )
  assert all(jax.tree.leaves(same))
  per_epoch = built.steps.per_epoch
  assert not built.steps.total % per_epoch
  least = max(config.total_epochs * per_epoch, config.min_steps)
  assert least <= built.steps.total < least + per_epoch


@pytest.mark.parametrize('path', _CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize('encoder', ['swin', 'resnet', 'efficientnet'])
def test_every_config_builds_with_every_encoder(without_data, path, encoder):
  config = _load(path, f'encoder={encoder},quicktest')
  assert config.model.name == encoder
  config.batch_size = 8
  built = experiment.build(config)
  has_stats = 'student_stats' in built.state_like.method_state
  assert has_stats == (encoder != 'swin' or config.head.use_bn)


@pytest.mark.slow
@pytest.mark.parametrize(
  'name, encoder',
  [
    ('toybirds', 'vit'),
    ('toybirds', 'resnet'),
    ('folder', 'vit'),
    ('folder', 'resnet'),
    ('folder', 'efficientnet'),
  ],
)
def test_the_step_of_a_quicktest_runs(without_data, name, encoder):
  words = f'encoder={encoder},quicktest'
  config = _load(_REPO / 'configs' / f'{name}.py', words)
  config.batch_size = 8
  if encoder == 'vit':
    config.model.depth = 1
  config.augment.num_local = 1
  built = experiment.build(config)
  step = built.compile_step()
  with built.data.make_batches(None) as batches:
    batch = batches(0)
  state, metrics = step(built.init_state(), batch, built.rng)
  assert jax.tree.structure(state) == jax.tree.structure(built.state_like)
  shapes = jax.tree.map(
    lambda a, b: a.shape == b.shape, state, built.state_like
  )
  assert all(jax.tree.leaves(shapes))
  terms = {name for name in metrics if name.startswith('loss/')}
  assert terms == {f'loss/{name}' for name in tiny.inside(built.method).terms}


@pytest.mark.parametrize('path', _CONFIGS, ids=lambda path: path.stem)
def test_quicktest_shrinks_and_changes_no_structure(path):
  full = _load(path, 'start=scratch')
  quick = _load(path, 'start=scratch,quicktest')

  def fields(config, prefix=''):
    for key, value in config.items():
      yield prefix + key
      if isinstance(value, ConfigDict):
        yield from fields(value, f'{prefix}{key}.')

  assert set(fields(full)) == set(fields(quick))
  assert quick.total_epochs < full.total_epochs
  assert quick.model.image_px <= full.model.image_px
  of_parts = path.stem == 'particle_toybirds'
  assert full.method.name == ('particle' if of_parts else 'cmd')
  assert full.model.image_px % full.model.patch_px == 0


@pytest.mark.parametrize(
  'argument', ['fast', 'method=byol', 'quicktest=1', 'cmd', 'quicktest,x']
)
def test_an_unknown_argument_lists_the_choices(argument):
  with pytest.raises(ValueError, match='unknown config argument') as error:
    vocabulary.parse_argument(argument)
  for choice in ('quicktest', 'method=cmd_released', 'encoder=resnet'):
    assert choice in str(error.value)


def test_arguments_are_read_in_any_order():
  usual = vocabulary.Argument()
  assert usual == ('cmd', 'vit', '', '', False)
  assert (
    vocabulary.parse_argument(None) == vocabulary.parse_argument('') == usual
  )
  assert vocabulary.parse_argument('quicktest') == usual._replace(
    quicktest=True
  )
  expected = vocabulary.Argument('dino', 'swin', quicktest=True)
  for words in (
    'method=dino,encoder=swin,quicktest',
    'quicktest,encoder=swin,method=dino',
  ):
    assert vocabulary.parse_argument(words) == expected


def test_a_locked_config_takes_no_new_field():
  config = _load(_CONFIGS[0])
  with pytest.raises((AttributeError, KeyError)):
    config.optim.learning_rate = 1.0
