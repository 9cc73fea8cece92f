import itertools
import math
import pathlib

import pytest

from cmd_jax import methods, models
from cmd_jax.config import builtin, fields, vocabulary
from cmd_jax.config.check import check_config
from cmd_jax.devices import sharding
from cmd_jax.errors import UserError
from cmd_jax.losses import cmd as cmd_losses
from cmd_jax.methods.centring import TEACHER_NORMALISATIONS
from cmd_jax.models.mlp_heads import INITIALISATIONS
from cmd_jax.training.recipe import OPTIMIZERS

_DOCS = pathlib.Path(__file__).resolve().parents[2] / 'docs'
_WORDS = [
  *(
    f'method={method},encoder={encoder}'
    for method, encoder in itertools.product(
      vocabulary.METHODS, vocabulary.ENCODERS
    )
  ),
  *(f'method=particle,parts={parts}' for parts in vocabulary.PARTS),
]


def _nested(path, value):
  for name in reversed(path.split('.')):
    value = {name: value}
  return value


@pytest.mark.parametrize('words', _WORDS)
def test_the_table_has_every_field_of_every_config(words):
  for name, make in builtin.BUILTIN.items():
    for more in ('', ',quicktest'):
      config = make(words + more).to_dict()
      for path, _ in fields.leaves(config):
        assert fields.field_of(path) is not None, f'{name}: {path}'
      fields.check_fields(config)


def test_every_field_of_the_table_is_of_some_config():
  there = {
    path
    for make in builtin.BUILTIN.values()
    for words in _WORDS
    for path, _ in fields.leaves(make(words).to_dict())
  }
  parents = {f'{path.rpartition(".")[0]}.*' for path in there}
  assert fields.FIELDS.keys() <= there | parents


@pytest.mark.parametrize(
  'path, value, reason',
  [
    ('batch_size', 0, 'batch_size is 0: it must be at least 1'),
    ('batch_size', 2.5, 'of kind int'),
    ('batch_size', True, 'of kind int'),
    ('head.use_bn', 1, 'of kind bool'),
    ('augment.flip_prob', 1.5, 'at most 1'),
    ('augment.num_local', -1, 'at least 0'),
    ('parallel.mode', 'ddp', "mode is 'ddp': choose one of jit, pmap"),
    ('teacher.temperature', -1.0, 'above 0'),
    ('student_temperature', 0.0, 'above 0'),
    ('optim.base_learning_rate', math.nan, 'finite number'),
    ('optim.base_learning_rate', math.inf, 'finite number'),
    ('method.weights.region', -1.0, 'at least 0'),
    ('method.weights.anything', math.nan, 'finite number'),
    ('optim.train_last_blocks', -2, 'at least -1'),
    ('eval.protocols', 'knn/20', 'of kind tuple'),
    ('lora.rank', -1, 'at least 0'),
  ],
)
def test_what_cannot_be_is_refused(path, value, reason):
  with pytest.raises(UserError, match=reason) as caught:
    fields.check_fields(_nested(path, value))
  assert str(caught.value).startswith(f'config.{path} is ')


@pytest.mark.parametrize(
  'path, value',
  [
    ('optim.base_learning_rate', 0),
    ('eval.protocols', []),
    ('model.num_heads', (1, 2)),
    ('of.somebody', math.nan),
  ],
)
def test_what_can_be_is_not(path, value):
  fields.check_fields(_nested(path, value))


@pytest.mark.parametrize('path', fields.FIELDS)
def test_a_number_at_its_bound_is_taken_and_beyond_it_is_not(path):
  field = fields.FIELDS[path]
  path = path.replace('*', 'x')
  for bound, way in ((field.least, -1), (field.most, 1)):
    if bound is not None:
      fields.check_fields(_nested(path, field.kind(bound)))
      with pytest.raises(UserError):
        fields.check_fields(_nested(path, field.kind(bound + way)))


def test_choices_are_those_of_the_factories():
  def choices(path):
    return set(fields.FIELDS[path].choices)

  assert choices('teacher.normalisation') == set(TEACHER_NORMALISATIONS)
  assert choices('optim.name') == set(OPTIMIZERS)
  assert choices('parallel.mode') == set(sharding.MODES)
  assert choices('parallel.state') == set(sharding.STATES)
  assert choices('method.pooling') == set(cmd_losses.POOLINGS)
  assert choices('method.kl_direction') == set(cmd_losses.KL_DIRECTIONS)
  assert choices('method.projector.initialisation') == set(INITIALISATIONS)
  assert choices('parts.source') == set(vocabulary.PARTS)
  assert choices('model.name') == set(vocabulary.ENCODERS)
  for name in choices('method.name'):
    with pytest.raises((UserError, TypeError), match='lacks|has no|missing'):
      methods.make_method(name)
  with pytest.raises(UserError):
    models.make_encoder('no encoder')


def test_sizes_fit_the_patches():
  config = builtin.folder('start=scratch').unlock()
  config.augment.global_px = 60
  with pytest.raises(UserError, match='global_px is 60.*multiple of'):
    check_config(config)


def test_the_page_of_the_documentation_is_that_of_the_table():
  page = (_DOCS / 'config.md').read_text()
  again = 'python -m cmd_jax.config.fields > docs/config.md'
  assert page == fields.document() + '\n', again


def test_a_config_is_described_with_its_values():
  text = fields.describe_config(builtin.folder('method=dino').to_dict())
  assert '--config.batch_size=32\n      Images of a step' in text
  assert 'Allowed: jit, pmap.' in text
