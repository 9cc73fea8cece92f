"""Weights that fit, weights that can be made to fit, and all others."""

import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest

from cmd_jax.convert import architecture, families, load
from cmd_jax.errors import UserError
from cmd_jax.models import make_encoder
from tests.convert import family_fixtures as fixtures


@pytest.fixture
def load_tensors(tmp_path):
  def load_tensors(tensors, encoder, **kwargs):
    path = fixtures.write(tmp_path / 'weights.safetensors', tensors)
    return load.load_encoder(path, encoder, **kwargs)

  return load_tensors


def _refusal(load_tensors, tensors, encoder):
  with pytest.raises(UserError) as caught:
    load_tensors(tensors, encoder)
  message = str(caught.value)
  assert '\n' not in message and 'weights.safetensors' in message
  return message


def _encoder_of_flags(message):
  """The encoder that the flags in a message build."""
  fields = {'name': re.search(r'--config=FILE:encoder=(\w+)', message)[1]}
  for name, value in re.findall(r'--config\.model\.(\w+)=(\S+)', message):
    value = value.strip("'").replace('(', '[').replace(')', ']')
    try:
      fields[name] = json.loads(value)
    except ValueError:
      fields[name] = value
  if 'variant' in fields:
    fields['variant'] = str(fields['variant'])
  return make_encoder(**fields)


def test_report_of_a_file_with_a_classifier(tmp_path, load_tensors):
  encoder = fixtures.encoder_of('deit_distilled')
  report = load_tensors(fixtures.weights('deit_distilled'), encoder).report
  assert report.path == str(tmp_path / 'weights.safetensors')
  assert (report.format, report.family) == ('safetensors', 'ViT')
  assert 'blocks.1.attn.qkv.bias' in report.matched
  assert len(report.matched) == 31
  heads = ('head.bias', 'head.weight', 'head_dist.bias', 'head_dist.weight')
  assert sorted(report.unexpected) == list(heads)
  assert report.missing == report.resized == report.cast == ()
  text = report.text()
  assert 'matched: 31\n' in text
  assert 'unexpected: 4 (head' in text
  assert 'resized: 0\n' in text
  assert 'note: dist_token became a register' in text
  assert report.sha256 in text


def test_report_lists_the_first_dozen_names(load_tensors):
  tensors = fixtures.weights('timm_vit') | {
    f'extra{index:02}': np.ones(1, np.float32) for index in range(15)
  }
  report = load_tensors(tensors, fixtures.encoder_of('timm_vit')).report
  assert len(report.unexpected) == 15
  assert 'extra11 and 3 more)' in report.text()


@pytest.mark.parametrize('name', fixtures.ENCODERS)
def test_flags_in_the_message_fit(load_tensors, name):
  other = 'timm_vit' if 'swin' in name or 'resnet' in name else 'timm_swin'
  tensors = fixtures.weights(name)
  message = _refusal(load_tensors, tensors, fixtures.encoder_of(other))
  encoder = _encoder_of_flags(message)
  assert load_tensors(tensors, encoder).report.resized == ()


@pytest.mark.parametrize(
  'fields, flags',
  [
    (
      dict(name='vit', variant='S', patch_px=14, image_px=518, layer_scale=1.0),
      ['variant=S', 'patch_px=14', 'image_px=518', 'layer_scale=1e-05'],
    ),
    # DINOv3's ViT-S+.
    (
      dict(name='vit', variant='S', ffn='swiglu', positions='rotary')
      | dict(mlp_ratio=6.0, layer_scale=1.0, num_registers=4),
      ['variant=S', 'mlp_ratio=6.0', 'positions=rotary', 'ffn=swiglu'],
    ),
    (dict(name='vit', variant='g', ffn='swiglu', num_registers=4), None),
    (dict(name='vit', width=192, depth=6, num_heads=3), None),
    (dict(name='swin', variant='S'), ['variant=S', 'window=7']),
    (dict(name='swin', variant='B', depths=(2, 2), num_heads=(4, 8)), None),
    (dict(name='resnet', variant='101'), ['variant=101', 'width_ratio=1.0']),
  ],
)
def test_flags_of_published_sizes(fields, flags):
  encoder = make_encoder(**fields)
  name, table = architecture.table_of(encoder)
  tensors = {
    name: np.broadcast_to(np.float32(0), shape)
    for name, shape in architecture.torch_shapes(encoder, table).items()
  }
  found = architecture.flags_that_fit(families.to_timm(tensors))
  given = [f'{k}={v}' for k, v in fields.items() if k not in _IN_OTHER_WORDS]
  assert f'--config=FILE:encoder={fields["name"]}' in found.split()
  for flag in flags or given:
    assert f'--config.model.{flag}' in found.split()
  if name != 'resnet':
    rebuilt = _encoder_of_flags(found)
    assert architecture.torch_shapes(rebuilt, table) == (
      architecture.torch_shapes(encoder, table)
    )


_IN_OTHER_WORDS = ('name', 'variant', 'depths', 'num_heads')


def test_another_architecture_is_named(load_tensors):
  message = _refusal(
    load_tensors,
    fixtures.weights('timm_resnet50'),
    fixtures.encoder_of('timm_vit'),
  )
  assert 'holds a resnet, the encoder is a vit' in message
  assert '--config=FILE:encoder=resnet --config.model.variant=50' in message


def test_missing_parameters_are_listed(load_tensors):
  tensors = fixtures.weights('timm_vit')
  del tensors['blocks.1.norm2.bias'], tensors['norm.weight']
  message = _refusal(load_tensors, tensors, fixtures.encoder_of('timm_vit'))
  assert 'lacks 2 parameters (blocks.1.norm2.bias, norm.weight)' in message


@pytest.mark.parametrize(
  'name, changes, extra',
  [
    ('timm_vit', dict(depth=1), 'blocks.1.'),
    ('timm_vit', dict(positions='rotary'), 'pos_embed'),
    ('timm_registers', dict(num_registers=0), 'reg_token'),
    ('timm_registers', dict(layer_scale=0.0), 'blocks.0.ls1.gamma'),
    ('timm_swin', dict(depths=(2, 1)), 'layers.1.blocks.1.'),
  ],
)
def test_parts_of_a_larger_encoder_are_no_mere_extras(
  load_tensors, name, changes, extra
):
  message = _refusal(
    load_tensors, fixtures.weights(name), fixtures.encoder_of(name, **changes)
  )
  assert 'parameters that the encoder lacks' in message
  assert extra in message


def test_wrong_shapes_are_told_with_the_flags_that_fit(load_tensors):
  message = _refusal(
    load_tensors,
    fixtures.weights('timm_vit'),
    fixtures.encoder_of('timm_vit', mlp_ratio=4.0),
  )
  assert 'blocks.0.mlp.fc1.weight is [32, 16] in the file' in message
  assert '[64, 16] in the encoder' in message
  assert '--config.model.mlp_ratio=2.0' in message


@pytest.mark.parametrize('name', ['timm_vit', 'timm_registers'])
@pytest.mark.parametrize('patches', [6, 2])
def test_positions_of_another_grid_are_those_of_the_native_encoder(
  load_tensors, name, patches
):
  tensors, native = fixtures.weights(name), fixtures.encoder_of(name)
  px = patches * native.patch_px
  resized = load_tensors(tensors, fixtures.encoder_of(name, image_px=px))
  assert resized.report.resized == ('pos_embed',)
  params = resized.variables['params']
  assert params['pos_embed'].shape == (1, patches**2 + 1, 16)
  images = np.random.default_rng(0).normal(size=(1, 3, px, px))
  images = images.astype(np.float32)
  expected = fixtures.features(
    native, load_tensors(tensors, native).variables, images
  )
  encoder = fixtures.encoder_of(name, image_px=px)
  found = fixtures.features(encoder, resized.variables, images)
  for ours, theirs in zip(found, expected):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def _in_microsofts_names(tensors):
  return {
    re.sub(
      r'^layers\.(\d)\.downsample',
      lambda match: f'layers.{int(match[1]) - 1}.downsample',
      name,
    ): tensor
    for name, tensor in tensors.items()
  }


@pytest.mark.parametrize('window', [3, 7])
def test_bias_tables_of_another_window_are_resized_as_by_torch(
  load_tensors, window
):
  tables = fixtures.arrays('bias_tables')
  tensors = _in_microsofts_names(fixtures.weights('timm_swin'))
  key = 'layers.0.blocks.0.attn.relative_position_bias_table'
  tensors[key] = tables['table']
  encoder = fixtures.encoder_of('timm_swin', window=window, image_px=64)
  imported = load_tensors(tensors, encoder)
  assert len(imported.report.resized) == 4
  block = imported.variables['params']['stage_0_block_0']
  np.testing.assert_allclose(
    block['attn']['relative_position_bias_table'],
    tables[str(2 * window - 1)],
    rtol=0,
    atol=1e-5,
  )


# From 7 to 2 * window - 1 a side: 1 + q + q^2 = window - 1.
@pytest.mark.parametrize('window, ratio', [(5, (13**0.5 - 1) / 2), (7, 1.5)])
def test_bias_tables_in_timms_names_are_resized_as_timm_does(
  load_tensors, window, ratio
):
  """The search for q ends at 1.5, short of the border for window 7."""
  table = fixtures.arrays('bias_tables')['table']
  tensors = fixtures.weights('timm_swin')
  key = 'layers.0.blocks.0.attn.relative_position_bias_table'
  tensors[key] = table
  encoder = fixtures.encoder_of('timm_swin', window=window, image_px=64)
  imported = load_tensors(tensors, encoder)
  places = np.cumsum([1, ratio, ratio**2])
  places = [*-places[::-1], 0, *places]
  wanted = np.arange(1 - window, window)
  square = table.reshape(7, 7, -1)
  columns = np.stack(
    [
      [np.interp(wanted, places, square[row, :, head]) for row in range(7)]
      for head in range(square.shape[-1])
    ]
  )
  expected = np.stack(
    [
      [np.interp(wanted, places, column) for column in head.T]
      for head in columns
    ]
  )
  block = imported.variables['params']['stage_0_block_0']
  np.testing.assert_allclose(
    block['attn']['relative_position_bias_table'],
    expected.transpose(2, 1, 0).reshape((2 * window - 1) ** 2, -1),
    rtol=0,
    atol=1e-5 * np.abs(table).max(),
  )


@pytest.mark.parametrize(
  'dtype',
  [np.float16, ml_dtypes.bfloat16, np.float64],
  ids=lambda d: d.__name__,
)
def test_other_precisions_become_float32(load_tensors, dtype):
  tensors = fixtures.weights('timm_vit')
  low = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
  imported = load_tensors(low, fixtures.encoder_of('timm_vit'))
  assert sorted(imported.report.cast) == sorted(tensors)
  assert f'cast to float32: {len(tensors)} (' in imported.report.text()
  for leaf in jax.tree.leaves(imported.variables):
    assert leaf.dtype == np.float32
  np.testing.assert_array_equal(
    imported.variables['params']['pos_embed'],
    low['pos_embed'].astype(np.float32),
  )


@pytest.mark.parametrize(
  'tensor, words',
  [
    (np.float32([np.nan] * 16), 'not finite'),
    (np.float64([1e300] * 16), 'not finite'),
    (np.ones(16, np.int8), 'int8, not floating'),
  ],
)
def test_values_that_are_no_weights_are_refused(load_tensors, tensor, words):
  tensors = fixtures.weights('timm_vit') | {'norm.bias': tensor}
  message = _refusal(load_tensors, tensors, fixtures.encoder_of('timm_vit'))
  assert words in message and 'norm.bias' in message


def test_student_and_teacher(load_tensors):
  teacher = fixtures.weights('timm_vit')
  student = teacher | {'norm.bias': teacher['norm.bias'] + 1}
  both = {f'teacher.{name}': x for name, x in teacher.items()}
  both |= {f'student.{name}': x for name, x in student.items()}
  encoder = fixtures.encoder_of('timm_vit')
  for network, expected in (('student', student), ('teacher', teacher)):
    loaded = load_tensors(both, encoder, network=network)
    np.testing.assert_array_equal(
      loaded.variables['params']['norm']['bias'], expected['norm.bias']
    )


def test_what_the_file_does_not_tell_is_noted(load_tensors):
  encoder = fixtures.encoder_of('hf_vit', norm_epsilon=1e-6, num_heads=4)
  report = load_tensors(fixtures.weights('hf_vit'), encoder).report
  assert 'norm_epsilon is 1e-06' in report.text()
  assert 'attention heads: 4 were taken\n' in report.text()


def test_epsilon_of_a_swin_is_noted(load_tensors):
  encoder = fixtures.encoder_of('timm_swin')
  report = load_tensors(fixtures.weights('timm_swin'), encoder).report
  assert 'norm_epsilon is 1e-05, which the file' in report.text()


def test_unusual_attention_heads_are_noted(load_tensors):
  encoder = make_encoder(
    'vit',
    variant='Mu',
    depth=1,
    image_px=16,
    num_heads=2,
    interpolation='dinov2',
  )
  _, table = architecture.table_of(encoder)
  shapes = architecture.torch_shapes(encoder, table)
  tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
  notes = load_tensors(tensors, encoder).report.notes
  assert notes == (
    'the file does not tell its attention heads: 2 were taken, usual for this '
    'width are 3',
  )


def test_unknown_weights_are_told_with_the_path(load_tensors):
  message = _refusal(
    load_tensors,
    {'text.weight': np.ones(3, np.float32)},
    fixtures.encoder_of('timm_vit'),
  )
  assert 'no family known here' in message


def _widened(name, axis, times):
  """The weights of a family with one tensor longer by one axis."""

  def change(tensors):
    return tensors | {name: np.repeat(tensors[name], times, axis)}

  return change


def _without(name):
  return lambda tensors: {n: x for n, x in tensors.items() if n != name}


def _with(name, shape):
  return lambda tensors: tensors | {name: np.ones(shape, np.float32)}


_KERNEL = 'patch_embed.proj.weight'


@pytest.mark.parametrize(
  'family, change, words',
  [
    # One channel, or four.
    ('timm_resnet50', lambda t: t | {'conv1.weight': t['conv1.weight'][:, :1]},
     'conv1.weight is [64, 1, 7, 7]'),
    ('timm_vit', lambda t: t | {_KERNEL: t[_KERNEL][:, :1]}, _KERNEL),
    ('timm_swin', _widened(_KERNEL, 1, 2), _KERNEL),
    # Groups as in ResNeXt, wider bottlenecks as in wide ResNets.
    ('timm_resnet50',
     lambda t: t | {'layer1.0.conv2.weight': t['layer1.0.conv2.weight'][:, :1]},
     'layer1.0.conv2.weight'),
    ('timm_resnet50', _widened('layer1.0.conv1.weight', 0, 2),
     'layer1.0.conv1.weight'),
    # Depths of no variant, as of a ResNet-152.
    ('timm_resnet50', _with('layer2.4.conv1.weight', (1,)), 'layer2'),
    # Patches that are no squares, or of videos.
    ('timm_vit', _widened(_KERNEL, 2, 2), _KERNEL),
    ('timm_vit', lambda t: t | {_KERNEL: t[_KERNEL][:, :, None]}, _KERNEL),
    # Parts that are missing or of nobody.
    ('timm_vit', _without('norm.weight'), 'norm.weight'),
    ('timm_vit', _with('blocks.0.attn.gate', (3,)), 'blocks.0.attn.gate'),
    ('timm_vit', _widened('blocks.1.mlp.fc1.bias', 0, 3), 'blocks.1.mlp.fc1'),
  ],
)  # fmt: skip
def test_no_advice_that_ends_in_the_same_refusal(
  load_tensors, family, change, words
):
  tensors = change(fixtures.weights(family))
  # As the config is, and where it is of another architecture.
  for encoder in ('timm_resnet50', 'timm_vit'):
    message = _refusal(load_tensors, tensors, fixtures.encoder_of(encoder))
    assert 'The file fits' not in message
    assert 'No encoder here fits' in message and words in message


def test_too_many_blocks_are_not_tried(load_tensors):
  tensors = fixtures.weights('timm_vit') | {
    f'blocks.{i}.norm1.bias': np.ones(16, np.float32) for i in range(2, 3000)
  }
  message = _refusal(load_tensors, tensors, fixtures.encoder_of('timm_vit'))
  assert '3000 blocks are more than any encoder has' in message


@pytest.mark.parametrize(
  'names, words',
  [
    (['visual.conv1.weight', 'visual.ln_pre.bias'], 'a norm before the blocks'),
    (['visual.conv1.weight', 'transformer.resblocks.0.ln_1.bias'], 'of CLIP'),
    (['stages.0.0.gamma', 'downsample_layers.0.0.bias'], 'a ConvNeXt'),
  ],
)
def test_what_other_networks_have_is_told(load_tensors, names, words):
  tensors = {name: np.ones(3, np.float32) for name in names}
  message = _refusal(load_tensors, tensors, fixtures.encoder_of('timm_vit'))
  assert words in message


@pytest.mark.parametrize('prefix', ['', 'backbone.', 'module.encoder_q.'])
def test_a_resnet_whose_layers_are_numbered(load_tensors, prefix):
  tensors = fixtures.weights('timm_resnet50')
  parts = {'conv1': '0', 'bn1': '1'} | {
    f'layer{i}': str(3 + i) for i in range(5)
  }
  numbered = {}
  for name, tensor in tensors.items():
    first, dot, rest = name.partition('.')
    numbered[f'{prefix}{parts.get(first, first)}{dot}{rest}'] = tensor
  encoder = fixtures.encoder_of('timm_resnet50')
  expected = load_tensors(tensors, encoder).variables
  found = load_tensors(numbered, encoder).variables
  jax.tree.map(np.testing.assert_array_equal, found, expected)
