"""`cmd_jax.load`: runs and weight files as encoders."""

import doctest
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import cmd_jax
from cmd_jax.convert.save import save_encoder
from cmd_jax.data.augment.multi_crop import make_eval_view
from cmd_jax.data.canvas import make_canvas
from cmd_jax.errors import UserError
from cmd_jax.parts.store import hash_variables
from tests import saved_runs, tiny

_DOCS = pathlib.Path(__file__).resolve().parents[1] / 'docs' / 'api.md'


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A CMD run, its method, its teacher, and photographs."""
  root = tmp_path_factory.mktemp('api')
  method, params, stats = saved_runs.make_run(root / 'run')
  names = [f'{number}.png' for number in range(5)]
  images = saved_runs.write_images(root / 'photos', names)
  paths = [root / 'photos' / name for name in names]
  return root / 'run', method, (params, stats), images, paths


@pytest.fixture(scope='module')
def encoder(run):
  return cmd_jax.load(run[0], batch_size=8)


def _view(images):
  canvases = np.stack([make_canvas(Image.fromarray(x), 16) for x in images])
  sizes = np.array([x.shape[:2] for x in images])
  view = jax.jit(make_eval_view(view_px=16, crop_fraction=None))
  return view(canvases, sizes)


def _by_method(method, variables, images):
  """Embeddings and attention as training's evaluation computes them."""
  view = _view(images)
  mil = tiny.inside(method).networks.mil

  def encode(params, stats):
    encoded = tiny.encode(method, params, stats, view)
    if mil is None:
      own = encoded.attention
      return encoded.image, None if own is None else own.mean(1)
    attention = mil.apply({'params': params['mil']}, encoded.tokens)
    return encoded.image, attention

  return jax.jit(encode)(*variables)


def test_a_run_gives_what_its_method_gives(run, encoder):
  path, method, variables, images, _ = run
  outputs = encoder(images)
  image, attention = _by_method(method, variables, images)
  np.testing.assert_allclose(outputs.image, image, atol=1e-5)
  np.testing.assert_allclose(outputs.attention, attention, atol=1e-6)
  assert outputs.tokens.shape == (5, 16, 16)
  assert outputs.grid == (4, 4)
  np.testing.assert_allclose(outputs.attention.sum(1), 1, atol=1e-6)
  np.testing.assert_allclose(encoder.embed(images), outputs.image, atol=1e-6)
  assert encoder.hash == hash_variables(method.encoder_variables(*variables))
  assert encoder.source == f'teacher of {path} after step 3'
  assert encoder.preprocessing['canvas_px'] == 16
  assert json.loads(json.dumps(encoder.preprocessing))['view_px'] == 16


def test_images_come_in_any_form_and_number(run, encoder):
  _, _, _, images, paths = run
  want = encoder(images).image
  for given in (
    paths,
    [str(path) for path in paths],
    list(images),
    [Image.open(path) for path in paths],
    (path for path in paths),
    [paths[0], images[1], Image.fromarray(images[2]), *paths[3:]],
  ):
    np.testing.assert_allclose(encoder(given).image, want, atol=1e-5)
  for single in (paths[0], images[0], Image.open(paths[0])):
    np.testing.assert_allclose(encoder(single).image, want[:1], atol=1e-5)
  # More than a batch, of different sizes.
  many = [*images, *images, images[0][:9], *images]
  got = encoder(many).image
  assert got.shape == (16, 16)
  np.testing.assert_allclose(got[5:10], want, atol=1e-5)
  np.testing.assert_allclose(got[11:], want, atol=1e-5)


def test_the_student_is_another_network(run, encoder):
  path, method, (_, stats), images, _ = run
  student = cmd_jax.load(path, network='student')
  assert student.hash != encoder.hash
  assert student.source.startswith('student of')


@pytest.mark.parametrize(
  'name, lora', [('resnet', tiny.NO_LORA), ('vit', saved_runs.LORA)]
)
def test_statistics_and_adapters_are_taken_along(tmp_path, name, lora):
  method, *variables = saved_runs.make_run(tmp_path / 'run', 'dino', name, lora)
  images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
  outputs = cmd_jax.load(tmp_path / 'run')(images)
  image, attention = _by_method(method, variables, images)
  np.testing.assert_allclose(outputs.image, image, atol=1e-4)
  if name == 'resnet':
    assert outputs.attention is None
  else:
    np.testing.assert_allclose(outputs.attention, attention, atol=1e-5)


@pytest.mark.parametrize('name', ['vit', 'swin', 'resnet'])
def test_a_weight_file_tells_its_encoder(tmp_path, name):
  module = tiny.make_tiny_encoder(name)
  images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
  variables = tiny.draw_like(
    jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 16, 16, 3)))
  )
  path = tmp_path / 'encoder.safetensors'
  preprocessing = dict(canvas_px=16, view_px=16, crop_fraction=None)
  save_encoder(
    path, module, variables, {'preprocessing': json.dumps(preprocessing)}
  )
  encoder = cmd_jax.load(path)
  want = jax.jit(module.apply)(variables, _view(images))
  outputs = encoder(images)
  close = dict(rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(outputs.image, want.image, **close)
  np.testing.assert_allclose(outputs.tokens, want.tokens, **close)
  if name == 'vit':
    # The shapes alone tell as much, but for the heads.
    other = cmd_jax.load(path, num_heads=2)
    assert other.hash == encoder.hash
    # And for the rule of positions, which only our own files tell.
    assert other.module == encoder.module.clone(
      drop_path_rate=0.0, interpolation='dinov2'
    )


def test_what_cannot_be_loaded_is_one_line(run, tmp_path):
  path = run[0]
  empty = tmp_path / 'empty'
  empty.mkdir()
  untrained = tmp_path / 'untrained'
  untrained.mkdir()
  config = saved_runs.make_config()
  (untrained / 'config.json').write_text(json.dumps(config))
  other = shutil.copytree(path, tmp_path / 'other')
  config['model']['width'] = 24
  (other / 'config.json').write_text(json.dumps(config))
  old = shutil.copytree(path, tmp_path / 'old')
  del config['eval']['view_px']
  # Without it, nothing tells which defaults are its own.
  del config['method']['name']
  (old / 'config.json').write_text(json.dumps(config))
  text = tmp_path / 'notes.txt'
  text.write_text('no weights')
  for load, words in (
    (lambda: cmd_jax.load(tmp_path / 'none'), 'does not exist'),
    (lambda: cmd_jax.load(empty), 'no work directory of a run'),
    (lambda: cmd_jax.load(untrained), 'no checkpoint in .*: train first'),
    (lambda: cmd_jax.load(other), 'checkpoint of another model'),
    (lambda: cmd_jax.load(old), 'lacks a field .*view_px'),
    (lambda: cmd_jax.load(text), 'weights are read from'),
    (lambda: cmd_jax.load(path, network='both'), 'teacher or student'),
    (lambda: cmd_jax.load(path, depth=2), 'leave out depth'),
    (lambda: cmd_jax.load(path, batch_size=0), 'at least 1'),
  ):
    with pytest.raises(UserError, match=words) as caught:
      load()
    assert '\n' not in str(caught.value)


def test_what_is_no_image_is_one_line(encoder, tmp_path):
  text = tmp_path / 'notes.txt'
  text.write_text('no image')
  for images, words in (
    ([], 'no images'),
    (text, 'notes.txt: not an image'),
    (tmp_path / 'none.jpg', 'none.jpg: No such file'),
    (np.zeros((2, 8, 8, 3), np.float32), r'float32 \[8, 8, 3\] is no image'),
    (np.zeros((8, 8), np.uint8), r'uint8 \[8, 8\] is no image'),
    ([np.zeros((0, 8, 3), np.uint8)], 'without pixels'),
  ):
    with pytest.raises(UserError, match=words):
      encoder(images)


def test_the_examples_of_the_documentation_hold(run, tmp_path, monkeypatch):
  (tmp_path / 'runs').mkdir()
  (tmp_path / 'runs' / 'mine').symlink_to(run[0])
  (tmp_path / 'photos').symlink_to(run[4][0].parent)
  monkeypatch.chdir(tmp_path)
  failed, tried = doctest.testfile(
    str(_DOCS), module_relative=False, optionflags=doctest.ELLIPSIS
  )
  assert tried > 5 and not failed


def test_the_package_has_nothing_else():
  with pytest.raises(AttributeError, match='lode'):
    cmd_jax.lode  # noqa: B018
