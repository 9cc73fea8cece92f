"""Weights in several files with an index."""

import hashlib
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import cmd_jax
from cmd_jax.convert import files
from cmd_jax.errors import UserError
from tests.convert import family_fixtures as fixtures

_INDEX = 'model.safetensors.index.json'


def _write(folder, tensors, count=3, index=_INDEX, save=save_file, end=None):
  """Spreads tensors over files; returns the path of their index."""
  folder.mkdir(exist_ok=True)
  names, end = list(tensors), end or 'safetensors'
  weight_map = {}
  for part in range(count):
    name = f'model-{part + 1:05}-of-{count:05}.{end}'
    own = {x: np.ascontiguousarray(tensors[x]) for x in names[part::count]}
    save(own, folder / name)
    weight_map |= dict.fromkeys(own, name)
  text = {'metadata': {'total_size': 1}, 'weight_map': weight_map}
  (folder / index).write_text(json.dumps(text))
  return folder / index


def _refused(path):
  with pytest.raises(UserError) as caught:
    files.read_tensors(path)
  assert '\n' not in str(caught.value) and str(path) in str(caught.value)
  return str(caught.value)


@pytest.mark.parametrize('count', [1, 2, 5])
def test_the_index_and_its_folder(tmp_path, count):
  tensors = fixtures.weights('timm_vit')
  index = _write(tmp_path, tensors, count)
  shards = sorted(tmp_path.glob('*.safetensors'))
  lines = ''.join(
    f'{hashlib.sha256(x.read_bytes()).hexdigest()}  {x.name}\n' for x in shards
  )
  for path in (index, tmp_path, str(tmp_path)):
    read = files.read_tensors(path)
    assert read.format == 'safetensors'
    assert read.sha256 == hashlib.sha256(lines.encode()).hexdigest()
    assert read.tensors.keys() == tensors.keys()
    for name, array in tensors.items():
      np.testing.assert_array_equal(read.tensors[name], array)


def test_wrappers_and_averages_over_several_files(tmp_path):
  arrays = {}
  for prefix, value in (('model.', 1), ('model_ema.module.', 2)):
    for name in ('patch_embed.proj.weight', 'norm.bias', 'norm.weight'):
      arrays[prefix + name] = np.full(3, value, np.float32)
  _write(tmp_path, arrays, 4)
  for network, value in (('student', 1), ('teacher', 2)):
    tensors = files.read_tensors(tmp_path, network=network).tensors
    assert len(tensors) == 3
    assert all((x == value).all() for x in tensors.values())


def test_other_formats_and_names(tmp_path):
  tensors = fixtures.weights('timm_vit')

  def save(arrays, path):
    with path.open('wb') as file:
      np.savez(file, **arrays)

  _write(tmp_path, tensors, 2, 'weights.index.json', save, 'bin')
  assert files.read_tensors(tmp_path).tensors.keys() == tensors.keys()


def test_a_folder_of_one_file(tmp_path):
  tensors = fixtures.weights('timm_vit')
  fixtures.write(tmp_path / 'anything.safetensors', tensors)
  assert files.read_tensors(tmp_path).tensors.keys() == tensors.keys()
  fixtures.write(tmp_path / 'other.safetensors', tensors)
  assert 'anything.safetensors, other' in _refused(tmp_path)
  fixtures.write(tmp_path / 'model.safetensors', {'a': np.ones(2)})
  assert files.read_tensors(tmp_path).tensors.keys() == {'a'}


def test_load_takes_the_folder(tmp_path):
  tensors = fixtures.weights('timm_vit')
  index = _write(tmp_path / 'sharded', tensors)
  # Of the program that wrote the weights, not of a run.
  (tmp_path / 'sharded' / 'config.json').write_text('{"model_type": "vit"}')
  for path in (index, tmp_path / 'sharded'):
    assert cmd_jax.load(path, num_heads=2).module.width == 16


def test_one_of_several_is_told(tmp_path):
  index = _write(tmp_path, fixtures.weights('timm_vit'))
  shard = tmp_path / 'model-00002-of-00003.safetensors'
  message = _refused(shard)
  assert 'one of 3 files' in message and f'give {index}' in message
  index.unlink()
  assert 'the index.json of all' in _refused(shard)


def test_what_is_missing_is_told(tmp_path):
  index = _write(tmp_path, fixtures.weights('timm_vit'))
  shard = tmp_path / 'model-00002-of-00003.safetensors'
  data = shard.read_bytes()
  shard.write_bytes(data[:-5])
  assert 'model-00002-of-00003.safetensors, which is' in _refused(index)
  save_file({'a': np.ones(2)}, shard)
  assert 'in model-00002-of-00003.safetensors, which lacks it' in _refused(
    index
  )
  shard.unlink()
  assert '00002-of-00003.safetensors, which does not exist' in _refused(index)


@pytest.mark.parametrize(
  'text',
  [
    *('', '[]', '{}', 'null', '{"weight_map": []}', '{"weight_map": {}}'),
    *('{"weight_map": {"a": 3}}', '[' * 100_000, '{"weight_map": {"a": ""}}'),
    '{"weight_map": {"a": "../other/model.safetensors"}}',
    '{"weight_map": {"a": "/etc/passwd"}}',
    '{"weight_map": {"a": ".."}}',
    r'{"weight_map": {"a": "b\\c"}}',
    r'{"weight_map": {"a": "b\u0000"}}',
    f'{{"weight_map": {{"a": "{_INDEX}"}}}}',
  ],
)
def test_what_is_no_index_is_refused(tmp_path, text):
  (tmp_path / _INDEX).write_text(text)
  assert 'is no index of weights' in _refused(tmp_path)


def test_too_many_files(tmp_path):
  names = {f'a{i}': f'{i}.safetensors' for i in range(1001)}
  (tmp_path / _INDEX).write_text(json.dumps({'weight_map': names}))
  assert 'names 1001 files' in _refused(tmp_path / _INDEX)
