"""Encoders as folders of transformers, loaded by the real library."""

import json
import warnings

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

import cmd_jax
from cmd_jax.api import Encoder, Preprocessing
from cmd_jax.cli import program
from cmd_jax.data.augment.multi_crop import make_eval_view
from cmd_jax.errors import UserError
from cmd_jax.evaluators.classifier import Classifier
from cmd_jax.export import model, transformers
from cmd_jax.models import make_encoder
from tests import saved_runs, tiny

_FILES = ['cmd_jax.json', 'config.json', 'model.safetensors']
_FILES += ['preprocessor_config.json']
_SMALL = dict(
  variant='Mu', width=16, depth=2, num_heads=2, image_px=16, patch_px=4
)
_SWIGLU = dict(ffn='swiglu', layer_scale=0.5, norm_epsilon=1e-3)
_ROTARY = dict(positions='rotary', num_registers=2, layer_scale=0.5)
# Encoder, side of the view, and the class of transformers.
_ENCODERS = {
  'vit': (dict(_SMALL, pool='cls'), 16, 'ViTModel'),
  'vit on another grid': (dict(_SMALL, pool='mean'), 24, 'ViTModel'),
  'tanh': (dict(_SMALL, gelu='tanh'), 16, 'ViTModel'),
  'layer scale': (dict(_SMALL, layer_scale=0.1), 20, 'Dinov2Model'),
  'swiglu': (dict(_SMALL, **_SWIGLU), 16, 'Dinov2Model'),
  'registers': (
    dict(_SMALL, num_registers=3, interpolation='antialias'),
    20,
    'Dinov2WithRegistersModel',
  ),
  'rotary': (dict(_SMALL, **_ROTARY, pool='mean'), 20, 'DINOv3ViTModel'),
  'rotary swiglu': (_SMALL | _ROTARY | _SWIGLU, 16, 'DINOv3ViTModel'),
  'resnet': (dict(variant='Mu', width_ratio=0.5), 32, 'ResNetModel'),
  'bottleneck': (dict(variant='50', width_ratio=0.0625), 32, 'ResNetModel'),
}


def _variables(module, images):
  shapes = jax.eval_shape(module.init, jax.random.key(0), images)
  return tiny.draw_like(shapes)


def _draw(name, *, crop_fraction=None, classifier=None):
  """An encoder of random weights, and the side of its view."""
  fields, side, _ = _ENCODERS[name]
  family = 'resnet' if 'width_ratio' in fields else 'vit'
  module = make_encoder(family, **fields)
  images = np.zeros((1, 16, 16, 3), np.float32)
  encoder = Encoder(
    module,
    _variables(module, images),
    Preprocessing(side, side, crop_fraction),
    source=name,
    classifier=classifier,
    batch_size=8,
  )
  return encoder, side


def _images(side, count=2):
  rng = np.random.default_rng(0)
  return rng.normal(size=(count, side, side, 3)).astype(np.float32)


def _write(path, name, **kwargs):
  encoder, side = _draw(name, **kwargs)
  return encoder, side, model._write_folder(path, encoder)


@pytest.fixture(name='library', scope='module')
def _library():
  pytest.importorskip('torch', reason='PyTorch is not installed')
  with warnings.catch_warnings(action='ignore'):
    return pytest.importorskip(
      'transformers', reason='transformers is not installed'
    )


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', _ENCODERS)
def test_the_library_computes_what_the_encoder_computes(
  tmp_path, library, name
):
  import torch

  encoder, side, _ = _write(tmp_path, name)
  loaded, report = library.AutoModel.from_pretrained(
    tmp_path, output_loading_info=True
  )
  assert not any(report[x] for x in ('missing_keys', 'unexpected_keys'))
  assert type(loaded).__name__ == _ENCODERS[name][2]
  images = _images(side)
  with torch.no_grad():
    output = loaded.eval()(torch.tensor(images.transpose(0, 3, 1, 2)))
  told = json.loads((tmp_path / 'cmd_jax.json').read_text())
  got = eval(told['embedding'], {'output': output}).numpy()
  want = jax.jit(encoder.module.apply)(encoder.variables, images)
  np.testing.assert_allclose(got, want.image, atol=1e-4)
  tokens = output.last_hidden_state.numpy()
  if name in ('resnet', 'bottleneck'):
    tokens = tokens.transpose(0, 2, 3, 1).reshape(*want.tokens.shape)
  else:
    tokens = tokens[:, encoder.module.num_prefix :]
    if not encoder.module.pool == 'mean':
      np.testing.assert_allclose(output.pooler_output, want.image, atol=1e-4)
  np.testing.assert_allclose(tokens, want.tokens, atol=1e-4)


def _classifier(width):
  rng = np.random.default_rng(1)
  kernel, bias = rng.normal(size=(width, 3)), rng.normal(size=3)
  names = ('a', 'b c', 'd')
  return Classifier(*map(np.float32, (kernel, bias)), names, temperature=1.7)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', _ENCODERS)
def test_classifiers_come_calibrated(tmp_path, library, name):
  import torch

  encoder, side = _draw(name)
  images = _images(side)
  like = jax.eval_shape(encoder.module.apply, encoder.variables, images)
  classifier = _classifier(like.image.shape[1])
  encoder, side, printed = _write(tmp_path, name, classifier=classifier)
  if name.startswith('rotary'):
    assert 'the classifier is left out' in printed
    return
  loaded, report = library.AutoModelForImageClassification.from_pretrained(
    tmp_path, output_loading_info=True
  )
  assert not any(report[x] for x in ('missing_keys', 'unexpected_keys'))
  assert loaded.config.id2label == {0: 'a', 1: 'b c', 2: 'd'}
  with torch.no_grad():
    output = loaded.eval()(torch.tensor(images.transpose(0, 3, 1, 2)))
  got = torch.softmax(output.logits, -1).numpy()
  want = jax.jit(encoder.module.apply)(encoder.variables, images)
  want = classifier.probabilities(np.asarray(want.image))
  np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('crop_fraction', [None, 0.875])
def test_the_library_prepares_images_alike(tmp_path, library, crop_fraction):
  encoder, side, _ = _write(tmp_path, 'vit', crop_fraction=crop_fraction)
  processor = library.AutoImageProcessor.from_pretrained(tmp_path)
  coarse = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
  image = Image.fromarray(coarse).resize((50, 40), Image.Resampling.BICUBIC)
  got = np.asarray(processor(image, return_tensors='np')['pixel_values'])
  canvas, size = encoder.make_canvas(image)
  make_view = make_eval_view(view_px=side, crop_fraction=crop_fraction)
  want = make_view(canvas[None], np.int32([size]))
  assert got.shape == (1, 3, side, side)
  difference = np.abs(got.transpose(0, 2, 3, 1) - want)
  assert difference.mean() < 0.1


def test_the_folder_of_a_run(tmp_path, capsys):
  run = tmp_path / 'run'
  saved_runs.make_run(run, 'dino')
  flags = ['export', f'--workdir={run}', '--format=transformers']
  for _ in range(2):
    # The second time over the files of the first.
    assert not program.run(flags)
  folder = run / 'encoder.transformers'
  assert sorted(path.name for path in folder.iterdir()) == _FILES
  assert 'the embedding is output.last_hidden_state[:, 0]' in (
    capsys.readouterr().out
  )
  config = json.loads((folder / 'config.json').read_text())
  assert config['architectures'] == ['ViTModel']
  told = json.loads((folder / 'cmd_jax.json').read_text())
  assert told['encoder_sha256'] == cmd_jax.load(run).hash
  tensors = load_file(folder / 'model.safetensors')
  assert {x.dtype for x in tensors.values()} == {np.dtype(np.float32)}
  # Read back, it is the same encoder.
  again = cmd_jax.load(folder, num_heads=2, norm_epsilon=1e-6)
  images = _images(16)
  want, got = (
    x.module.apply(x.variables, images).image
    for x in (cmd_jax.load(run), again)
  )
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_what_cannot_be_is_refused(tmp_path):
  def message(encoder, **fields):
    module = encoder.module.clone(**fields)
    view = Preprocessing(16, fields.pop('view_px', 16), None)
    changed = Encoder(
      module, encoder.variables, view, source='run', batch_size=8
    )
    with pytest.raises(UserError) as caught:
      transformers.convert(changed)
    assert '\n' not in str(caught.value)
    return str(caught.value)

  vit, _ = _draw('vit')
  assert 'overlapping patches' in message(vit, patch_stride_px=2)
  assert 'no class token' in message(vit, class_token=False)
  layer_scale, _ = _draw('layer scale')
  assert 'hidden dimension of 17' in message(layer_scale, hidden_dim=17)
  assert 'stride 1' in message(_draw('resnet')[0], last_stride=1)
  swin = tiny.make_tiny_encoder('swin')
  variables = _variables(swin, np.zeros((1, 16, 16, 3), np.float32))
  other = Encoder(
    swin, variables, Preprocessing(16, 16, None), source='s', batch_size=8
  )
  assert 'is of the architecture swin: use' in message(other)


def test_outputs_that_would_mix_with_other_files_are_refused(tmp_path):
  run = tmp_path / 'run'
  saved_runs.make_run(run, 'dino')

  def message(**fields):
    with pytest.raises(UserError) as caught:
      model.export_model(model.Request(str(run), **fields))
    assert '\n' not in str(caught.value)
    return str(caught.value)

  assert 'has other files, such as checkpoints: give --output' in message(
    format='transformers', output=str(run)
  )
  config = str(run / 'config.json')
  assert 'is a file' in message(format='transformers', output=config)
  assert '--attention is of' in message(format='transformers', attention=True)
  assert '--dtype=float16 is of --format=onnx' in message(
    format='transformers', dtype='float16'
  )
