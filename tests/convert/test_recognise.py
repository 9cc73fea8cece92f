"""Encoders that a weight file alone describes."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from cmd_jax.convert.recognise import recognise_encoder
from cmd_jax.convert.save import save_encoder
from cmd_jax.errors import UserError
from tests import tiny
from tests.convert import family_fixtures as fixtures

# How the programs of weights resize learned positions; the others are 'dino'.
_INTERPOLATIONS = {
  'timm_vit': 'dinov2',
  'timm_registers': 'antialias',
  'timm_registers_with_positions': 'antialias',
  'timm_swiglu': 'antialias',
  'deit_distilled': 'antialias',
}


@pytest.mark.parametrize('name', fixtures.ENCODERS)
def test_the_tensors_of_every_family_tell_the_encoder(tmp_path, name):
  interpolation = _INTERPOLATIONS.get(name)
  want = fixtures.encoder_of(
    name, **({'interpolation': interpolation} if interpolation else {})
  )
  path = fixtures.write(tmp_path / 'x.safetensors', fixtures.weights(name))
  # What no file tells: heads, a Swin's epsilon, the image of what has no grid.
  fields = fixtures.ENCODERS[name]
  changes = {}
  if fields['name'] == 'vit':
    changes['num_heads'] = fields['num_heads']
  if fields['name'] == 'swin':
    changes['norm_epsilon'] = fields['norm_epsilon']
  if fields['name'] == 'swin' or fields.get('positions') == 'rotary':
    changes['image_px'] = fields['image_px']
  got = recognise_encoder(path, **changes)
  assert got.encoder == want
  assert not got.imported.report.missing and not got.imported.report.resized


@pytest.mark.parametrize('name', ['timm_registers', 'timm_swin'])
def test_our_own_files_tell_everything(tmp_path, name):
  encoder = fixtures.encoder_of(name, drop_path_rate=0.3)
  images = np.zeros((1, encoder.image_px, encoder.image_px, 3))
  variables = tiny.draw_like(
    jax.eval_shape(encoder.init, jax.random.key(0), images)
  )
  path = tmp_path / 'x.safetensors'
  save_encoder(path, encoder, variables, {'steps': '7'})
  got = recognise_encoder(path)
  assert got.encoder == encoder
  assert got.metadata['steps'] == '7'


@pytest.mark.parametrize('description', ['{', '[]', '{"name": "mlp"}', '{}'])
def test_a_description_that_is_none_is_passed_over(tmp_path, description):
  weights = fixtures.weights('timm_vit')
  path = tmp_path / 'x.safetensors'
  save_file(weights, path, {'architecture': description})
  assert recognise_encoder(path).encoder.width == 16


def test_what_holds_no_encoder_is_told(tmp_path):
  path = fixtures.write(tmp_path / 'x.safetensors', {'a': np.zeros(3)})
  with pytest.raises(UserError, match='x.safetensors'):
    recognise_encoder(path)
  path.write_text(json.dumps({}))
  with pytest.raises(UserError, match='x.safetensors'):
    recognise_encoder(path)
