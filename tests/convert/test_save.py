"""Files for timm, and the way back."""

import ast
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from cmd_jax import __version__
from cmd_jax.convert import load, save
from cmd_jax.errors import UserError
from cmd_jax.models import vit
from tests import tiny
from tests.convert import family_fixtures as fixtures


def _read(path):
  with safe_open(path, framework='np') as file:
    tensors = {name: file.get_tensor(name) for name in file.keys()}
    return tensors, file.metadata()


def _load(tmp_path, name):
  encoder = fixtures.encoder_of(name)
  path = fixtures.write(tmp_path / 'in.safetensors', fixtures.weights(name))
  return encoder, load.load_encoder(path, encoder).variables


@pytest.mark.parametrize('name', fixtures.EXPORTED)
def test_round_trip_keeps_names_shapes_and_bits(tmp_path, name):
  encoder, variables = _load(tmp_path, name)
  path = tmp_path / 'out.safetensors'
  save.save_encoder(path, encoder, variables)
  tensors, _ = _read(path)
  expected = fixtures.weights(name)
  assert tensors.keys() == expected.keys()
  for key, tensor in expected.items():
    assert tensors[key].shape == tensor.shape
    assert tensors[key].dtype == tensor.dtype
    assert tensors[key].tobytes() == tensor.tobytes()


def _random_vit(**kwargs):
  encoder = vit.make_vit(**dict(variant='Mu', depth=1, image_px=16) | kwargs)
  images = jnp.ones((1, 16, 16, 3))
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), images)
  variables = tiny.draw_like(shapes)
  return encoder, variables


def test_an_encoder_comes_back_bit_for_bit(tmp_path):
  encoder, variables = _random_vit(layer_scale=0.1, interpolation='antialias')
  path = tmp_path / 'out.safetensors'
  save.save_encoder(path, encoder, variables | {'lora': {'a': 1}})
  back = load.load_encoder(path, encoder)
  assert back.report.unexpected == back.report.resized == ()
  assert back.report.cast == back.report.notes == ()
  jax.tree.map(np.testing.assert_array_equal, back.variables, dict(variables))


def test_an_encoder_with_registers_computes_the_same_when_back(tmp_path):
  encoder, variables = _random_vit(num_registers=2)
  path = tmp_path / 'out.safetensors'
  save.save_encoder(path, encoder, variables)
  tensors, _ = _read(path)
  assert tensors['pos_embed'].shape == (1, 1, 96)
  back = load.load_encoder(path, encoder).variables
  images = np.random.default_rng(0).normal(size=(2, 3, 16, 16))
  for ours, theirs in zip(
    fixtures.features(encoder, back, images.astype(np.float32)),
    fixtures.features(encoder, variables, images.astype(np.float32)),
  ):
    np.testing.assert_array_equal(ours, theirs)


def test_batch_norms_get_counters(tmp_path):
  encoder, variables = _load(tmp_path, 'timm_resnet18')
  tensors = save.to_timm(encoder, variables)
  counters = [x for name, x in tensors.items() if name.endswith('_tracked')]
  assert len(counters) == sum(n.endswith('running_var') for n in tensors) == 21
  assert all(x.dtype == np.int64 and x.shape == () for x in counters)


def _call(line):
  """Function and constant arguments of a line of Python."""
  call = ast.parse(line, mode='eval').body
  arguments = {}
  for keyword in call.keywords:
    try:
      arguments[keyword.arg] = ast.literal_eval(keyword.value)
    except ValueError:
      arguments[keyword.arg] = ast.unparse(keyword.value)
  return ast.unparse(call.func).rpartition('.')[2], arguments


def _norm(epsilon):
  return f'functools.partial(torch.nn.LayerNorm, eps={epsilon})'


@pytest.mark.parametrize(
  'name, cls, expected',
  [
    (
      'timm_vit',
      'VisionTransformer',
      dict(
        img_size=32,
        patch_size=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
        mlp_ratio=2.0,
        num_classes=0,
        global_pool='token',
        no_embed_class=False,
        reg_tokens=0,
        init_values=None,
        norm_layer=_norm('1e-06'),
      ),
    ),
    (
      'timm_swiglu',
      'VisionTransformer',
      dict(
        # Both halves together.
        mlp_ratio=3.0,
        mlp_layer='timm.layers.SwiGLUPacked',
        act_layer='torch.nn.SiLU',
        reg_tokens=4,
        no_embed_class=True,
        init_values=1e-5,
      ),
    ),
    (
      'timm_rotary',
      'Eva',
      dict(
        attn_type='rope',
        rope_type='dinov3',
        num_reg_tokens=4,
        use_abs_pos_emb=False,
        swiglu_mlp=False,
        norm_layer=_norm('1e-05'),
      ),
    ),
    (
      'timm_swin',
      'SwinTransformer',
      dict(
        depths=(2, 2),
        num_heads=(2, 4),
        window_size=4,
        norm_layer=_norm('1e-05'),
      ),
    ),
    (
      'timm_resnet50',
      'ResNet',
      dict(
        block='timm.models.resnet.Bottleneck',
        layers=(3, 4, 6, 3),
        channels=(2, 4, 8, 16),
        num_classes=0,
      ),
    ),
  ],
)
def test_constructor_of_timm(name, cls, expected):
  function, arguments = _call(save.timm_constructor(fixtures.encoder_of(name)))
  assert function == cls
  assert {key: arguments[key] for key in expected} == expected


def test_mean_pooling_keeps_the_norm_before_it():
  line = save.timm_constructor(fixtures.encoder_of('timm_vit', pool='mean'))
  _, arguments = _call(line)
  assert arguments['global_pool'] == 'avg'
  assert arguments['fc_norm'] is False


@pytest.mark.parametrize(
  'name, dtype',
  [
    ('timm_registers', 'bfloat16'),
    ('timm_swin', 'float32'),
    ('timm_resnet18', 'float32'),
  ],
)
def test_metadata_describe_the_architecture(tmp_path, name, dtype):
  _, variables = _load(tmp_path, name)
  encoder = fixtures.encoder_of(name, dtype=dtype)
  path = tmp_path / 'deeper' / 'out.safetensors'
  save.save_encoder(path, encoder, variables, {'step': '7', 'format': 'mine'})
  _, metadata = _read(path)
  assert metadata['format'] == 'pt'
  assert metadata['step'] == '7'
  assert metadata['cmd_jax_version'] == __version__
  assert metadata['timm'] == save.timm_constructor(encoder)
  fields = json.loads(metadata['architecture'])
  assert fields.pop('name') == fixtures.ENCODERS[name]['name']
  assert fields.pop('dtype') == dtype
  for field, value in fields.items():
    own = getattr(encoder, field)
    assert (list(own) if isinstance(own, tuple) else own) == value


def test_another_ending_is_refused(tmp_path):
  encoder, variables = _load(tmp_path, 'timm_vit')
  with pytest.raises(UserError, match='end in .safetensors'):
    save.save_encoder(tmp_path / 'out.pth', encoder, variables)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
  encoder, variables = _load(tmp_path, 'timm_vit')
  path = tmp_path / 'out' / 'out.safetensors'
  save.save_encoder(path, encoder, variables)
  before = path.read_bytes()

  def full(descriptor):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(UserError, match='No space left'):
    save.save_encoder(path, encoder, variables, {'step': '8'})
  assert path.read_bytes() == before
  assert list(path.parent.iterdir()) == [path]
