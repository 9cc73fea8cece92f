"""EfficientNet-Lite against the class that its published weights belong to."""

import ast
import functools
import pathlib

import jax
import numpy as np
import pytest
from safetensors import safe_open

import cmd_jax
from cmd_jax.convert import files, load, pretrained, save
from cmd_jax.convert.recognise import recognise_encoder
from cmd_jax.data.augment import multi_crop
from cmd_jax.errors import UserError
from cmd_jax.models import make_encoder
from tests import tiny
from tests.convert import family_fixtures
from tests.convert.make_efficientnet_fixture import SIZES, draw_images

_NAME = 'efficientnet_lite0'
_FIXTURE = pathlib.Path(__file__).parent / f'{_NAME}.npz'


@functools.cache
def _published():
  """Tensors of the published file, the classifier among them."""
  return files.read_tensors(pretrained.find_pretrained(_NAME)).tensors


@functools.cache
def _compute(size):
  """Maps and embedding of the fixture's images by the recognised encoder."""
  recognised = recognise_encoder(_NAME)
  images = (
    draw_images(*size) / 255 - np.array(multi_crop.IMAGENET_MEAN)
  ) / np.array(multi_crop.IMAGENET_STD)

  @jax.jit
  def apply(variables, images):
    encoder = recognised.encoder
    maps = encoder.apply(variables, images, method='stages')
    return maps, encoder.apply(variables, images).image

  return apply(recognised.imported.variables, images.astype(np.float32))


@pytest.fixture
def tiny_encoder():
  """A tiny encoder, drawn variables of it, and its state dict."""
  encoder = make_encoder(
    'efficientnet', variant='Mu', width_ratio=0.5, drop_path_rate=0.0
  )
  shapes = jax.eval_shape(
    encoder.init, jax.random.key(0), np.zeros((1, 32, 32, 3))
  )
  variables = tiny.draw_like(shapes)
  return encoder, variables, save.to_timm(encoder, variables)


@pytest.mark.parametrize('size', SIZES)
def test_features_are_those_of_the_published_class(size):
  maps, _ = _compute(size)
  with np.load(_FIXTURE) as file:
    theirs = {
      name: np.moveaxis(file[f'{size[0]}x{size[1]}/{name}'], 1, -1)
      for name in [f'stride{2**i}' for i in range(1, 6)]
      if f'{size[0]}x{size[1]}/{name}' in file
    }
  assert len(theirs) == (5 if size[0] == size[1] else 1)
  for name, expected in theirs.items():
    found = maps[int(name.removeprefix('stride')).bit_length() - 2]
    np.testing.assert_allclose(
      found, expected, rtol=1e-4, atol=1e-4, err_msg=name
    )


@pytest.mark.parametrize('size', SIZES)
def test_logits_are_those_of_the_published_class(size):
  _, embedding = _compute(size)
  weight, bias = (_published()[f'_fc.{name}'] for name in ('weight', 'bias'))
  with np.load(_FIXTURE) as file:
    expected = file[f'{size[0]}x{size[1]}/logits']
  assert expected.shape == (1, 1000)
  found = np.asarray(embedding) @ weight.T + bias
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_every_tensor_of_the_published_file_is_used_or_named():
  recognised = recognise_encoder(_NAME)
  assert recognised.encoder == make_encoder(
    'efficientnet', variant='lite0', drop_path_rate=0.0
  )
  report = recognised.imported.report
  assert report.family == 'EfficientNet-Lite'
  assert report.sha256 == pretrained.WEIGHTS[_NAME].sha256
  assert report.unexpected == ('_fc.weight', '_fc.bias')
  assert report.missing == report.resized == report.cast == ()
  counters = [n for n in _published() if n.endswith('num_batches_tracked')]
  assert {*report.matched, *report.unexpected, *counters} == set(_published())


def test_the_published_file_leaves_as_it_came(tmp_path):
  recognised = recognise_encoder(_NAME)
  path = tmp_path / 'encoder.safetensors'
  save.save_encoder(path, recognised.encoder, recognised.imported.variables)
  back = files.read_tensors(path).tensors
  assert {*back, '_fc.weight', '_fc.bias'} == set(_published())
  for name, tensor in back.items():
    if not name.endswith('num_batches_tracked'):
      assert tensor.tobytes() == _published()[name].tobytes(), name
      assert tensor.shape == _published()[name].shape
  again = recognise_encoder(path)
  assert again.encoder == recognised.encoder


def test_one_call_embeds_photographs_by_the_name():
  encoder = cmd_jax.load(_NAME)
  pixels = np.asarray(draw_images(64, 64)[0])
  outputs = encoder(pixels)
  assert outputs.image.shape == (1, 1280)
  assert outputs.tokens.shape == (1, 14 * 14, 112)
  assert outputs.grid == (14, 14)


def test_names_and_shapes_tell_the_encoder(tmp_path, tiny_encoder):
  encoder, variables, tensors = tiny_encoder
  path = family_fixtures.write(tmp_path / 'x.safetensors', tensors)
  recognised = recognise_encoder(path)
  assert recognised.encoder == encoder
  jax.tree.map(
    np.testing.assert_array_equal,
    recognised.imported.variables,
    dict(variables),
  )
  other = recognise_encoder(path, tokens='stride32', batch_statistics='frozen')
  assert other.encoder == encoder.clone(
    tokens='stride32', batch_statistics='frozen'
  )


@pytest.mark.parametrize(
  'lacking', ['_blocks.3._bn1.running_mean', '_bn0.bias', '_conv_head.weight']
)
def test_missing_tensors_are_named(tmp_path, tiny_encoder, lacking):
  encoder, _, tensors = tiny_encoder
  del tensors[lacking]
  path = family_fixtures.write(tmp_path / 'x.safetensors', tensors)
  with pytest.raises(UserError, match=rf'lacks 1 parameters \({lacking}\)'):
    load.load_encoder(path, encoder)


def test_what_is_of_another_network_is_named(tmp_path, tiny_encoder):
  encoder, _, tensors = tiny_encoder
  path = tmp_path / 'x.safetensors'
  extra = {'_blocks.7._project_conv.weight': np.ones((4, 4, 1, 1), np.float32)}
  family_fixtures.write(path, tensors | extra)
  with pytest.raises(UserError, match='1 parameters that the encoder lacks'):
    load.load_encoder(path, encoder)
  extra = {'_blocks.1._se_reduce.weight': np.ones((2, 4, 1, 1), np.float32)}
  family_fixtures.write(path, tensors | extra)
  with pytest.raises(UserError, match='squeeze and excitation.*_se_reduce'):
    load.load_encoder(path, encoder)


def test_another_size_is_refused_with_the_flags_that_fit(
  tmp_path, tiny_encoder
):
  _, _, tensors = tiny_encoder
  path = family_fixtures.write(tmp_path / 'x.safetensors', tensors)
  with pytest.raises(UserError) as caught:
    load.load_encoder(path, make_encoder('efficientnet', variant='Mu'))
  flags = (
    '--config=FILE:encoder=efficientnet --config.model.variant=Mu '
    '--config.model.width_ratio=0.5'
  )
  assert str(caught.value).endswith(flags)


@pytest.mark.parametrize('variant', ['lite1', 'lite2'])
def test_sizes_of_the_same_depth_are_told_apart_by_their_widths(
  tmp_path, variant
):
  encoder = make_encoder('efficientnet', variant=variant, drop_path_rate=0.0)
  shapes = jax.eval_shape(
    encoder.init, jax.random.key(0), np.zeros((1, 32, 32, 3))
  )
  variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  path = family_fixtures.write(
    tmp_path / 'x.safetensors', save.to_timm(encoder, variables)
  )
  assert recognise_encoder(path).encoder == encoder


def test_the_file_tells_the_class_that_loads_it(tmp_path, tiny_encoder):
  encoder, variables, _ = tiny_encoder
  path = tmp_path / 'x.safetensors'
  save.save_encoder(path, encoder, variables)
  with safe_open(path, framework='np') as file:
    metadata = file.metadata()
  assert 'timm' not in metadata
  line = metadata['efficientnet_lite_pytorch']
  assert line == save.timm_constructor(encoder)
  call = ast.parse(line, mode='eval').body
  assert ast.unparse(call.func) == 'efficientnet_lite_pytorch.EfficientNet'
  blocks, settings = (keyword.value for keyword in call.keywords)
  assert ast.literal_eval(blocks.args[0]) == [
    'r1_k3_s11_e1_i32_o4',
    'r1_k3_s22_e6_i4_o6',
    'r1_k5_s22_e6_i6_o8',
    'r1_k3_s22_e6_i8_o12',
    'r1_k5_s11_e6_i12_o16',
    'r1_k5_s22_e6_i16_o24',
    'r1_k3_s11_e6_i24_o32',
  ]
  fields = {x.arg: ast.literal_eval(x.value) for x in settings.keywords}
  assert fields['relu_fn'] == 'relu6' and fields['fix_head_stem']
  assert fields['batch_norm_epsilon'] == 1e-3
