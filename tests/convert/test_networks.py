"""Files of several networks, and names with wrappers."""

import contextlib

import numpy as np
import pytest
from safetensors.numpy import save_file

from cmd_jax.convert import files, networks, wrappers
from cmd_jax.convert.torch_globals import (
  INERT,
  Tensor,
  UnreadableError,
  set_item,
)
from cmd_jax.errors import UserError

_NAMES = ('patch_embed.proj.weight', 'blocks.0.norm1.weight', 'norm.bias')


def _tensor(value):
  """What the reader of pickles makes of a tensor, told by its offset."""
  return Tensor(None, value, (), (), None)


def _encoder(value, prefix='', names=_NAMES):
  return {prefix + name: _tensor(value) for name in names}


def _value(leaves):
  """The encoder in the leaves, by the one offset that it has."""
  leaves = wrappers.strip_prefixes(leaves)
  values = {leaves[name].offset for name in _NAMES}
  assert len(values) == 1
  return values.pop()


def _of_root(root, network):
  found = networks.find_state_dict(root, network)
  return _value(networks.take_network(found, network))


@pytest.mark.parametrize(
  'trained, average',
  [
    *[('model', x) for x in ('ema', 'ema_state_dict', 'model_ema', 'shadow')],
    *[('model', x) for x in ('ema_model', 'swa_model', 'teacher', '_ema')],
    *[('model', x) for x in ('averaged_model', 'model_ema2', 'polyak')],
    ('encoder', 'target_encoder'),
    ('encoder', 'ema_encoder'),
    ('encoder', 'encoder_momentum'),
    ('encoder_q', 'encoder_k'),
    ('query_encoder', 'key_encoder'),
    ('online_encoder', 'target_encoder'),
    ('online_network', 'target_network'),
    ('student_state_dict', 'teacher_state_dict'),
    ('student', 'teacher'),
    ('base_encoder', 'momentum_encoder'),
    ('backbone', 'backbone_momentum'),
    ('backbone', 'momentum_backbone'),
    ('backbone', 'teacher_backbone'),
    ('net', 'net_ema'),
    ('state_dict', 'state_dict_ema'),
    ('state_dict', 'ema_state_dict'),
    ('model_state', 'ema_state'),
    ('netB', 'netB_ema'),
    ('encoder', 'targetEncoder'),
    ('model', 'EMA'),
    ('model', 'model-ema'),
  ],
)
@pytest.mark.parametrize('network, value', [('student', 1), ('teacher', 2)])
def test_the_average_is_the_teacher(trained, average, network, value):
  nested = {trained: _encoder(1), average: _encoder(2), 'epoch': 3}
  assert _of_root(nested, network) == value
  assert _of_root({'state_dict': nested, 'optimizer': {}}, network) == value
  inner = ('', 'module.', 'backbone.')
  for one, other in [(x, y) for x in inner for y in inner]:
    wrapped = {trained: _encoder(1, one), average: _encoder(2, other)}
    assert _of_root(wrapped, network) == value
    for outer in ('', 'module.', 'model.', 'learner.'):
      flat = _encoder(1, f'{outer}{trained}.{one}')
      flat |= _encoder(2, f'{outer}{average}.{other}')
      flat[f'{outer}{average}.num_updates'] = _tensor(7)
      flat[f'{outer}head.weight'] = _tensor(8)
      assert _of_root(flat, network) == value
      assert _of_root({'state_dict': flat, 'lr': 0.1}, network) == value
      assert _of_root(dict(reversed(flat.items())), network) == value


@pytest.mark.parametrize('network, value', [('student', 1), ('teacher', 2)])
def test_an_average_within_or_beside_the_weights(network, value):
  within = {'model': _encoder(1) | {'_ema': _encoder(2)}}
  assert _of_root(within, network) == value
  beside = _encoder(1) | _encoder(2, 'model_ema.module.')
  assert _of_root(beside, network) == value


@pytest.mark.parametrize('network, value', [('student', 1), ('teacher', 2)])
def test_an_average_whose_names_lost_their_dots(network, value):
  names = [name.replace('.', '') for name in _NAMES]
  for inner in ('', 'backbone.'):
    flat = _encoder(1, f'model.{inner}')
    flat |= _encoder(2, f'model_ema.{inner.replace(".", "")}', names)
    flat |= {'model_ema.decay': _tensor(3), 'model_ema.num_updates': _tensor(3)}
    assert _of_root(flat, network) == value


@pytest.mark.parametrize('network, value', [('student', 1), ('teacher', 2)])
def test_mmengine_saves_them_in_turn(network, value):
  root = {
    'meta': {'mmengine_version': '0.10'},
    'state_dict': _encoder(2, 'backbone.'),
    'ema_state_dict': _encoder(1, 'module.backbone.') | {'steps': _tensor(9)},
  }
  assert _of_root(root, network) == value


@pytest.mark.parametrize('network', ['student', 'teacher'])
def test_the_only_network_is_taken(network):
  for label in ('model', 'teacher', 'encoder_q', 'momentum_encoder', 'ema'):
    assert _of_root({label: _encoder(1), 'opt': {}}, network) == 1
    assert _of_root(_encoder(1, f'module.{label}.'), network) == 1
  # What an average has beside its weights is no network.
  steps = {'ema': {'decay': _tensor(2), 'num_updates': _tensor(2)}}
  assert _of_root({'model': _encoder(1)} | steps, network) == 1
  flat = _encoder(1, 'model.') | {'model_ema.decay': _tensor(2)}
  assert _of_root(flat, network) == 1
  # Nor are the moments of an optimiser.
  moments = {'optimizer': {'exp_avg': _encoder(2)}, 'exp_avg': _encoder(3)}
  moments['momentum_buffers'] = _encoder(4)
  assert _of_root({'model': _encoder(1)} | moments, network) == 1
  # One network under two names.
  encoder = _encoder(1)
  assert _of_root({'model': encoder, 'state_dict': encoder}, network) == 1
  assert _of_root(_encoder(1, 'net.') | _encoder(1, 'twin.'), network) == 1


@pytest.mark.parametrize(
  'names',
  [
    ('model', 'best_model'),
    ('left', 'right'),
    ('net1', 'net2'),
    ('encoder', 'backbone'),
    ('first', 'model'),
    # Neither is the average of the other.
    ('source_encoder', 'target_encoder'),
    ('visual_encoder', 'visual_encoder_m'),
  ],
)
@pytest.mark.parametrize('network', ['student', 'teacher'])
def test_where_nothing_tells_the_average_both_are_named(names, network):
  one, other = names
  for root in (
    {one: _encoder(1), other: _encoder(2)},
    {'model': {one: _encoder(1), other: _encoder(2)}},
    _encoder(1, f'{one}.') | _encoder(2, f'{other}.'),
    _encoder(1, f'module.{one}.') | _encoder(2, f'module.{other}.'),
  ):
    with pytest.raises(UnreadableError) as caught:
      _of_root(root, network)
    assert one in str(caught.value) and other in str(caught.value)
    assert 'save the one' in str(caught.value)


def test_a_student_is_not_taken_for_the_average():
  flat = _encoder(1, 'student.') | _encoder(2, 'net.')
  for root in (flat, {'student': _encoder(1), 'net': _encoder(2)}):
    assert _of_root(root, 'student') == 1
    with pytest.raises(UnreadableError, match='net.*student'):
      _of_root(root, 'teacher')


def test_parts_of_an_average_are_no_encoder():
  flat = _encoder(1, 'model.') | {'model_ema.head.weight': _tensor(2)}
  assert _of_root(flat, 'student') == 1
  with pytest.raises(UnreadableError, match='no whole .*network=student'):
    _of_root(flat, 'teacher')
  # What is beside an average that is alone is no network to choose.
  flat = _encoder(2, 'teacher.backbone.') | {'centre': _tensor(1)}
  for network in networks.NETWORKS:
    assert _of_root(flat, network) == 2


def test_two_averages_and_two_trained():
  root = {'model': _encoder(1), 'ema_1': _encoder(2), 'ema_2': _encoder(3)}
  assert _of_root(root, 'student') == 1
  with pytest.raises(UnreadableError, match='ema_1, ema_2'):
    _of_root(root, 'teacher')


def test_a_hook_that_exchanges_both_is_refused():
  flat = _encoder(1, 'backbone.')
  flat |= {f'ema_{name.replace(".", "_")}': _tensor(2) for name in flat}
  for network in networks.NETWORKS:
    with pytest.raises(UnreadableError, match='ema_backbone_'):
      _of_root({'state_dict': flat}, network)


@pytest.mark.parametrize(
  'average',
  [INERT, {'shadow_params': [_tensor(2)], 'decay': 0.9}, {'module': INERT}],
)
def test_an_average_without_names_is_not_passed_over(average):
  root = {'model': _encoder(1), 'ema': average}
  assert _of_root(root, 'student') == 1
  with pytest.raises(UnreadableError, match="'ema'.*network=student"):
    _of_root(root, 'teacher')
  swapped = {'model': average, 'ema': _encoder(2)}
  assert _of_root(swapped, 'teacher') == 2
  with pytest.raises(UnreadableError, match="'model'.*network=teacher"):
    _of_root(swapped, 'student')
  assert _of_root({'model': _encoder(1), 'ema': 0.99}, 'teacher') == 1
  assert _of_root({'model': _encoder(1), 'ema_args': INERT}, 'teacher') == 1


@pytest.mark.parametrize(
  'outer',
  [
    *('checkpoint', 'model_state', 'teacher_state_dict', 'classy_state_dict'),
    *('state', 'model_weights', 'backbone_params', 'ckpt', 'my_own_model'),
  ],
)
@pytest.mark.parametrize('network', ['student', 'teacher'])
def test_containers_of_other_trainers(outer, network):
  for encoder in (_encoder(1), _encoder(1, 'module.')):
    assert _of_root({outer: encoder, 'epoch': 1}, network) == 1
    nested = {outer: {'base_model': {'model': {'trunk': encoder}}}}
    assert _of_root(nested, network) == 1


@pytest.mark.parametrize('network, value', [('student', 1), ('teacher', 2)])
def test_files_without_pickles(tmp_path, network, value):
  arrays = {}
  for prefix, number in (('model.', 1), ('ema_model.', 2)):
    arrays |= {prefix + name: np.full(2, number) for name in _NAMES}
  np.savez(tmp_path / 'a.npz', **arrays)
  save_file(arrays, tmp_path / 'a.safetensors')
  for name in ('a.npz', 'a.safetensors'):
    tensors = files.read_tensors(tmp_path / name, network=network).tensors
    assert tensors.keys() == set(_NAMES)
    assert all((x == value).all() for x in tensors.values())
  arrays = {f'{x}.{name}': np.ones(2) for name in _NAMES for x in ('a', 'b')}
  save_file(arrays, tmp_path / 'b.safetensors')
  with pytest.raises(UserError, match='b.safetensors has several networks'):
    files.read_tensors(tmp_path / 'b.safetensors', network=network)


@pytest.mark.parametrize(
  'prefix',
  [
    *('module.encoder_q.', 'module.base_encoder.', 'module.momentum_encoder.'),
    *('net.', 'visual.trunk.', 'encoder_q.', 'online_encoder.net.', 'visual.'),
    *('backbone.', '_feature_blocks.', 'feature_extractor.', 'model.net.'),
    *('student.backbone.', 'image_encoder.', 'vision_tower.0.', 'f.', 'net1.'),
    *('_forward_module.module.', 'mySpecialNet.body.'),
  ],
)
@pytest.mark.parametrize('first', ['patch_embed.proj', 'layer1.0.conv1'])
def test_prefixes_of_other_trainers(prefix, first):
  names = [f'{first}.weight', 'norm.bias']
  heads = ['head.weight', 'text.a', 'text.b', 'text.c']
  tensors = {prefix + name: name for name in names} | {x: x for x in heads}
  stripped = wrappers.strip_prefixes(tensors)
  assert {name: stripped[name] for name in names} == {x: x for x in names}


@pytest.mark.parametrize(
  'wrapper',
  [
    *('_orig_mod', '_checkpoint_wrapped_module', '_fsdp_wrapped_module'),
    *('module', '_fpw_module'),
    '_fsdp_wrapped_module._checkpoint_wrapped_module',
  ],
)
def test_wrappers_between_the_parts(wrapper):
  names = {
    f'blocks.0.{wrapper}.norm.weight': 'blocks.0.norm.weight',
    f'{wrapper}.blocks.1.{wrapper}.attn.{wrapper}.qkv': 'blocks.1.attn.qkv',
    f'{wrapper}.patch_embed.{wrapper}.proj.weight': 'patch_embed.proj.weight',
    f'{wrapper}.norm.bias': 'norm.bias',
  }
  assert wrappers.strip_prefixes(names) == {x: x for x in names.values()}


def test_names_outside_of_the_encoder_are_not_mixed_in():
  tensors = {
    'visual.patch_embed.proj.weight': 1,
    'visual.blocks.0.norm.weight': 2,
    'blocks.0.norm.weight': 3,
  }
  stripped = wrappers.strip_prefixes(tensors)
  assert stripped['blocks.0.norm.weight'] == 2
  assert 3 in stripped.values()


@pytest.mark.parametrize(
  'names',
  [
    ['a.' * 200_000 + 'patch_embed.proj.weight', 'model.' * 100_000 + 'w'],
    [f'a{i}.patch_embed.proj.weight' for i in range(20_000)],
    [f'model{i}.w' for i in range(20_000)],
    ['ema.' * 50_000 + 'w', 'model.' * 50_000 + 'w'],
    ['_aA' * 100_000 + '.w', 'model.w'],
  ],
  ids=['long', 'many roots', 'many words', 'many wrappers', 'a long word'],
)
def test_names_that_would_take_for_ever(names):
  leaves = {name: name for name in names}
  with contextlib.suppress(UnreadableError):
    wrappers.strip_prefixes(networks.take_network(leaves, 'teacher'))


def test_wide_dicts_in_each_other_end():
  node = {}
  for _ in range(5):
    node = {f'model{i}': node for i in range(300)}
  assert networks.find_state_dict(node, 'teacher') == {}


def _dict(*items):
  """A dict as it is read of a file, its keys strings or not."""
  result = {}
  for key, value in items:
    set_item(result, key, value)
  return result


_INDEXED = _dict((0, _tensor(2)), (1, _tensor(2)))


@pytest.mark.parametrize('key', [0, 7, None, ('ema', 1)])
def test_a_network_whose_key_is_no_string_is_not_passed_over(key):
  assert _of_root(_dict((key, _encoder(1))), 'teacher') == 1
  root = _dict(('model', _encoder(1)), (key, _encoder(2)))
  for network in networks.NETWORKS:
    with pytest.raises(UnreadableError, match='several .*no name.*model'):
      _of_root(root, network)


def test_an_average_by_number_is_told_and_the_trained_one_is_read():
  root = _dict(('model', _encoder(1)), ('ema', _INDEXED))
  with pytest.raises(UnreadableError, match="'ema' as .* without names"):
    _of_root(root, 'teacher')
  assert _of_root(root, 'student') == 1


@pytest.mark.parametrize('name', ['optimizer', 'opt', 'state'])
def test_what_an_optimiser_keeps_by_number_is_no_network(name):
  moments = _dict((0, _dict(('exp_avg', _tensor(2)), ('step', _tensor(3)))))
  kept = _dict(('state', moments), (1, _tensor(4)))
  root = _dict(('model', _encoder(1)), (name, kept), ('indexed', _INDEXED))
  for network in networks.NETWORKS:
    assert _of_root(root, network) == 1
