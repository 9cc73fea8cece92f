"""By which views and pooling folders are searched."""

import json

import numpy as np
import pytest

import cmd_jax
from cmd_jax.convert import pretrained
from cmd_jax.convert.save import save_encoder
from cmd_jax.errors import UserError
from cmd_jax.export.search_encoder import load_for_search
from tests import saved_runs

_NAME = 'efficientnet_lite0'


@pytest.fixture
def asked(monkeypatch):
  """What `cmd_jax.load` is asked for, in place of an encoder."""
  monkeypatch.setattr(cmd_jax, 'load', lambda source, **asked: asked)


def test_published_weights_bring_the_view_they_are_best_at(asked):
  usual = pretrained.WEIGHTS[_NAME].search
  assert usual == {'view_px': 320, 'pooling': 'strength'}
  assert load_for_search(_NAME) == {'newest': False, **usual}
  chosen = load_for_search(_NAME, view_px=224, pooling='encoder', newest=True)
  assert chosen == {'newest': True, 'view_px': 224, 'pooling': 'encoder'}


def test_a_file_of_their_name_is_another_matter(asked, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / _NAME).write_bytes(b'')
  asked_for = load_for_search(_NAME)
  assert (asked_for['view_px'], asked_for['pooling']) == (0, 'encoder')


def test_a_run_says_how_it_is_searched(tmp_path):
  saved_runs.make_run(tmp_path / 'run')
  names = ['a.png', 'b.png']
  saved_runs.write_images(tmp_path, names)
  paths = [tmp_path / name for name in names]
  scored = cmd_jax.load(tmp_path / 'run')
  as_scored = load_for_search(str(tmp_path / 'run'))
  assert as_scored.preprocessing == scored.preprocessing
  file = tmp_path / 'run' / 'config.json'
  config = json.loads(file.read_text())
  config['eval']['search'] = {'view_px': 20, 'pooling': 'encoder'}
  file.write_text(json.dumps(config))
  searched = load_for_search(str(tmp_path / 'run'))
  assert searched.preprocessing['view_px'] == 20
  assert scored.preprocessing['view_px'] == 16
  larger = searched.embed(paths)
  np.testing.assert_allclose(
    larger, cmd_jax.load(tmp_path / 'run', view_px=20).embed(paths), atol=1e-6
  )
  assert np.abs(larger - scored.embed(paths)).max() > 1e-3


def test_views_and_pooling_of_weights(draw_encoder, tmp_path):
  encoder, *_ = draw_encoder('efficientnet')
  save_encoder(tmp_path / 'x.safetensors', encoder.module, encoder.variables)
  path = str(tmp_path / 'x.safetensors')
  usual = cmd_jax.load(path)
  assert usual.preprocessing['view_px'] == 224
  assert 'pooling' not in usual.preprocessing
  other = cmd_jax.load(path, view_px=64, pooling='gem')
  assert other.preprocessing['pooling'] == 'gem'
  # Not blurred first, and no larger than needed.
  assert other.preprocessing['view_px'] == 64
  assert cmd_jax.load(path, view_px=320).preprocessing['canvas_px'] == 366
  image = np.random.default_rng(0).integers(0, 255, (70, 90, 3), np.uint8)
  by_mean = cmd_jax.load(path, view_px=64).embed(image)
  by_gem = other.embed(image)
  # The mean of powers is above the power of the mean, but for rounding.
  assert (by_gem >= by_mean - 1e-6).all() and (by_gem > 1.001 * by_mean).any()
  with pytest.raises(UserError, match="^pooling is 'max': choose one of"):
    cmd_jax.load(path, pooling='max')
