"""State dicts of the real classes, and the names that released files have."""

import re

import jax
import numpy as np
import pytest

from cmd_jax.convert import architecture, families, load
from cmd_jax.errors import UserError
from cmd_jax.models import positions
from tests.convert import family_fixtures as fixtures


def _load(tmp_path, tensors, name, **changes):
  path = fixtures.write(tmp_path / 'weights.safetensors', tensors)
  return load.load_encoder(path, fixtures.encoder_of(name, **changes))


def _assert_same(ours, theirs):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
    assert a.dtype == b.dtype == np.float32
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('name', fixtures.ENCODERS)
def test_features_are_those_of_the_real_class(tmp_path, name):
  imported = _load(tmp_path, fixtures.weights(name), name)
  encoder = fixtures.encoder_of(name)
  fixtures.assert_same_features(name, encoder, imported.variables)


@pytest.mark.parametrize(
  'name', [n for n in fixtures.ENCODERS if n.startswith('hf_')]
)
def test_names_of_the_class_are_known_as_those_of_its_files(tmp_path, name):
  module = fixtures.weights(name, 'module')
  assert module and module.keys() != fixtures.weights(name).keys()
  path = tmp_path / 'weights.npz'
  np.savez(path, **module)
  encoder = fixtures.encoder_of(name)
  expected = _load(tmp_path, fixtures.weights(name), name)
  _assert_same(load.load_encoder(path, encoder).variables, expected.variables)


@pytest.mark.parametrize(
  'name, family, architecture',
  [
    ('timm_vit', 'ViT', 'vit'),
    ('deit_distilled', 'ViT', 'vit'),
    ('timm_dinov3', 'DINOv3 (timm)', 'vit'),
    ('timm_rotary', 'DINOv3 (timm)', 'vit'),
    ('hf_vit_classifier', 'ViT (Hugging Face)', 'vit'),
    ('hf_dinov2_swiglu', 'DINOv2 (Hugging Face)', 'vit'),
    ('hf_dinov2_registers', 'DINOv2 (Hugging Face)', 'vit'),
    ('hf_dinov3', 'DINOv3 (Hugging Face)', 'vit'),
    ('timm_swin', 'Swin', 'swin'),
    ('timm_resnet18', 'ResNet', 'resnet'),
    ('timm_resnet50', 'ResNet', 'resnet'),
  ],
)
def test_families_are_known_by_their_names(name, family, architecture):
  renamed = families.to_timm(fixtures.weights(name))
  assert (renamed.family, renamed.architecture) == (family, architecture)


def _hub(name):
  """A fixture in timm's naming; its features are tested above."""
  return families.to_timm(fixtures.weights(name)).tensors


def _renamed(tensors, *table):
  for pattern, replacement in table:
    tensors = {re.sub(pattern, replacement, k): v for k, v in tensors.items()}
  return tensors


def _assert_hub(tensors, expected):
  renamed = families.to_timm(tensors)
  assert renamed.tensors.keys() == expected.keys()
  for name, tensor in expected.items():
    np.testing.assert_array_equal(renamed.tensors[name], tensor)
  return renamed


@pytest.mark.parametrize(
  'name', ['hf_dinov2', 'hf_dinov2_swiglu', 'hf_dinov2_registers']
)
def test_dinov2_in_chunks_as_released(name):
  expected = _hub(name)
  meta = _renamed(
    expected,
    (r'^blocks\.0\.', 'blocks.0.0.'),
    (r'^blocks\.1\.', 'blocks.1.1.'),
    ('^reg_token$', 'register_tokens'),
  )
  if name == 'hf_dinov2_swiglu':
    meta = _renamed(meta, (r'\.fc1\.', '.w12.'), (r'\.fc2\.', '.w3.'))
  meta['mask_token'] = np.ones((1, 16), np.float32)
  renamed = _assert_hub(meta, expected)
  assert renamed.family == 'DINOv2'
  assert any('mask_token' in note for note in renamed.notes)


@pytest.mark.parametrize('registers, rule', [(0, 'dinov2'), (4, 'antialias')])
def test_positions_of_another_grid_by_the_rule_of_dinov2(registers, rule):
  tensors = {
    **fixtures.weights('timm_vit'),
    'mask_token': np.ones((1, 16), np.float32),
    'blocks.0.ls1.gamma': np.ones(16, np.float32),
  }
  if registers:
    tensors['register_tokens'] = np.ones((1, registers, 16), np.float32)
  renamed = families.to_timm(tensors)
  assert renamed.family == 'DINOv2'
  assert architecture.family_interpolation(renamed) == rule
  assert f'--config.model.interpolation={rule}' in (
    architecture.flags_that_fit(renamed)
  )


def test_positions_are_resized_by_the_rule_of_the_config(tmp_path):
  weights = fixtures.weights('timm_vit')
  resized = {}
  for rule in positions.INTERPOLATIONS:
    imported = _load(
      tmp_path, weights, 'timm_vit', image_px=48, interpolation=rule
    )
    resized[rule] = np.asarray(imported.variables['params']['pos_embed'])
    told = any('interpolation' in note for note in imported.report.notes)
    assert told == (rule != 'dinov2')
    want = positions.interpolate_positions(
      weights['pos_embed'][:, 1:],
      (round((resized[rule].shape[1] - 1) ** 0.5),) * 2,
      rule,
    )
    np.testing.assert_array_equal(resized[rule][:, 1:], want)
  assert np.abs(resized['dino'] - resized['antialias']).max() > 1e-3


@pytest.mark.parametrize('name', ['hf_dinov3', 'hf_dinov3_gated'])
def test_dinov3_as_released(name):
  expected = _hub(name)
  meta = _renamed(expected, ('^reg_token$', 'storage_tokens'))
  if name == 'hf_dinov3_gated':
    meta = _renamed(meta, (r'\.fc2\.', '.w3.'))
    for key in [key for key in meta if '.fc1.' in key]:
      meta[key.replace('fc1', 'w1')], meta[key.replace('fc1', 'w2')] = np.split(
        meta.pop(key), 2
      )
  for block in (0, 1):
    key = f'blocks.{block}.attn.qkv.bias'
    mask = np.repeat(np.float32([1, 0, 1]), 16)
    # What is masked may be anything.
    meta[key] = np.where(mask == 0, np.float32(np.nan), meta[key])
    meta[f'{key}_mask'] = mask
  meta['rope_embed.periods'] = np.float32([1, 10])
  meta['mask_token'] = np.ones((1, 16), np.float32)
  meta['local_cls_norm.weight'] = np.ones(16, np.float32)
  renamed = _assert_hub(meta, expected)
  assert (renamed.family, renamed.num_heads) == ('DINOv3', 2)


def test_rotary_positions_of_another_base_or_other_heads_are_refused(tmp_path):
  tensors = _hub('timm_rotary')
  tensors['rope_embed.periods'] = np.float32([1, 100])
  with pytest.raises(UserError, match='base 100'):
    families.to_timm(tensors)
  tensors['rope_embed.periods'] = np.float32([1, 10])
  with pytest.raises(UserError, match='has 2 attention heads, .* has 4'):
    _load(tmp_path, tensors, 'timm_rotary', num_heads=4)


def test_dino_checkpoint_with_its_head(tmp_path):
  expected = _load(tmp_path, fixtures.weights('timm_vit'), 'timm_vit')
  tensors = {
    f'module.backbone.{name}': tensor
    for name, tensor in fixtures.weights('timm_vit').items()
  }
  tensors['module.head.mlp.0.weight'] = np.ones((4, 16), np.float32)
  tensors['module.head.last_layer.weight_g'] = np.ones((8, 1), np.float32)
  imported = _load(tmp_path, tensors, 'timm_vit')
  _assert_same(imported.variables, expected.variables)
  assert imported.report.unexpected == (
    'head.last_layer.weight_g',
    'head.mlp.0.weight',
  )


def test_swin_of_esvit_and_microsoft():
  expected = _hub('timm_swin')
  meta = _renamed(expected, (r'layers\.1\.downsample', 'layers.0.downsample'))
  assert meta.keys() != expected.keys()
  for block in (0, 1):
    prefix = f'layers.0.blocks.{block}'
    meta[f'{prefix}.attn.relative_position_index'] = np.zeros((16, 16), int)
  meta['layers.0.blocks.1.attn_mask'] = np.zeros((4, 16, 16), np.float32)
  _assert_hub(meta, expected)


def test_positions_without_class_token_and_old_names_of_layer_scale():
  expected = _hub('hf_dinov2')
  expected['pos_embed'][:, 0] = 0
  tensors = _renamed(expected, (r'\.ls([12])\.gamma$', r'.gamma_\1'))
  tensors['pos_embed'] = expected['pos_embed'][:, 1:]
  renamed = _assert_hub(tensors, expected)
  assert any('no position' in note for note in renamed.notes)


@pytest.mark.parametrize(
  'name, words',
  [
    ('hf_dinov3', 'keys'),
    ('timm_dinov3', 'keys'),
    ('timm_registers_with_positions', 'queries, keys, values'),
    ('hf_vit', None),
  ],
)
def test_biases_that_no_block_has_are_zeros(name, words):
  renamed = families.to_timm(fixtures.weights(name))
  notes = [note for note in renamed.notes if 'biases' in note]
  expected = f'the attention has no biases for its {words}: zeros'
  assert notes == ([expected] if words else [])
  bias = renamed.tensors['blocks.1.attn.qkv.bias']
  assert bias.shape == (48,)
  assert bias[16:32].any() == (words is None)


@pytest.mark.parametrize(
  'name, missing',
  [
    ('hf_vit', 'encoder.layer.1.attention.attention.key.bias'),
    ('hf_vit', 'encoder.layer.1.attention.attention.value.weight'),
    ('hf_dinov3_gated', 'layer.1.mlp.up_proj.weight'),
    ('timm_dinov3', 'blocks.1.attn.v_bias'),
    ('timm_dinov3', 'blocks.1.mlp.fc1_x.weight'),
    ('timm_vit', 'blocks.1.attn.qkv.bias'),
  ],
)
def test_a_part_that_one_block_lacks_is_missing(tmp_path, name, missing):
  tensors = fixtures.weights(name)
  del tensors[missing]
  with pytest.raises(UserError, match=r'lacks 1 parameters \(blocks\.1\.'):
    _load(tmp_path, tensors, name)


def test_distilled_deit_has_two_tokens_before_the_patches():
  theirs = fixtures.weights('deit_distilled')
  ours = families.to_timm(theirs).tensors
  np.testing.assert_array_equal(
    ours['reg_token'], theirs['dist_token'] + theirs['pos_embed'][:, 1:2]
  )
  np.testing.assert_array_equal(
    ours['pos_embed'], np.delete(theirs['pos_embed'], 1, axis=1)
  )


@pytest.mark.parametrize(
  'name, extra, words',
  [
    ('timm_vit', 'norm_pre.weight', 'before the blocks'),
    ('timm_vit', 'fc_norm.weight', 'after the pooling'),
    ('timm_vit', 'blocks.0.attn.q_norm.weight', 'queries and keys'),
    ('timm_vit', 'blocks.0.mlp.norm.weight', 'within the MLP'),
    ('timm_vit', 'attn_pool.latent', 'attention pooling'),
    ('timm_rotary', 'cls_norm.weight', 'class token'),
    ('timm_rotary', 'rope.freqs', 'learned frequencies'),
    ('timm_vit', 'blocks.0.attn.relative_position_bias_table', 'relative'),
    ('timm_swin', 'layers.0.blocks.0.attn.logit_scale', 'Swin V2'),
    ('timm_swin', 'absolute_pos_embed', 'absolute positions'),
    ('timm_resnet18', 'layer1.0.se.fc1.weight', 'squeeze'),
    ('timm_resnet18', 'conv1.0.weight', 'stem'),
  ],
)
def test_parts_that_no_encoder_has_are_named(name, extra, words):
  tensors = fixtures.weights(name) | {extra: np.ones(16, np.float32)}
  with pytest.raises(UserError, match=words) as caught:
    families.to_timm(tensors)
  assert extra in str(caught.value)


@pytest.mark.parametrize(
  'change, words',
  [
    (lambda w: {'text_model.weight': w['cls_token']}, 'no family known here'),
    (lambda w: {}, 'no family known here'),
    (
      lambda w: w | {'blocks.5.0.norm1.weight': w['norm.weight']},
      'second tensor to become blocks.0.norm1.weight',
    ),
    (
      lambda w: w | {'pos_embed': w['pos_embed'][:, :13]},
      'pos_embed has 13 rows',
    ),
    (lambda w: w | {'dist_token': w['norm.weight']}, 'do not fit together'),
    (
      lambda w: w | {'rope_embed.periods': np.float32([1, 10])},
      'both learned and rotary',
    ),
  ],
)
def test_what_cannot_be_renamed_is_explained(change, words):
  with pytest.raises(UserError, match=words):
    families.to_timm(change(fixtures.weights('timm_vit')))
