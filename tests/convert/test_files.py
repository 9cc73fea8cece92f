import hashlib
import io
import pathlib
import random
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from cmd_jax.convert import files, networks, wrappers
from cmd_jax.errors import UserError

_DATA = pathlib.Path(__file__).parent / 'data'


def _arrays():
  dtypes = ('float64', 'float32', 'float16', 'int64', 'int8', 'uint8', 'bool')
  arrays = {name: np.arange(6).reshape(2, 3).astype(name) for name in dtypes}
  return arrays | {
    'bfloat16': np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16),
    'scalar': np.array(2.5, np.float32),
    'empty': np.zeros((0, 4), np.float32),
  }


def _assert_same(tensors, expected):
  assert tensors.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_array_equal(tensors[name], array, strict=True)
    assert not tensors[name].flags.writeable


def _refused(path, **kwargs):
  with pytest.raises(UserError) as caught:
    files.read_tensors(path, **kwargs)
  message = str(caught.value)
  assert str(path) in message and '\n' not in message
  return message


def test_safetensors_whatever_the_name(tmp_path):
  path = tmp_path / 'weights.pth'
  save_file(_arrays(), path, metadata={'format': 'pt'})
  read = files.read_tensors(path)
  assert read.format == 'safetensors'
  assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
  _assert_same(read.tensors, _arrays())


def test_safetensors_whose_length_begins_like_a_pickle(tmp_path):
  path = tmp_path / 'weights.safetensors'
  # The length of the header fills up to 0x80, the first byte of a pickle.
  save_file({'a': np.ones(2, np.float32)}, path, {'x': 'y' * 48})
  assert path.read_bytes()[:1] == b'\x80'
  _assert_same(files.read_tensors(path).tensors, {'a': np.ones(2, np.float32)})


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_npz_whatever_the_name(tmp_path, save):
  path = tmp_path / 'weights.bin'
  arrays = {f'a/{name}': array for name, array in _arrays().items()}
  with path.open('wb') as file:
    save(file, **arrays)
  read = files.read_tensors(str(path))
  assert read.format == 'npz'
  expected = {f'a.{name}': array for name, array in _arrays().items()}
  _assert_same(read.tensors, expected)


def test_npz_in_other_orders(tmp_path):
  path = tmp_path / 'a.npz'
  numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
  np.savez(path, big=numbers.astype('>f4'), columns=np.asfortranarray(numbers))
  tensors = files.read_tensors(path).tensors
  _assert_same(tensors, {'big': numbers, 'columns': numbers})


@pytest.mark.parametrize(
  'arrays, words',
  [
    ({'a': np.array([{}], object)}, 'not numeric'),
    ({'a': np.array(['x'])}, 'not numeric'),
    ({'a': np.zeros(1, [('x', 'f4')])}, 'not numeric'),
    (
      {'a/b': np.zeros(1), 'a.b': np.zeros(1)},
      "two arrays that would be 'a.b'",
    ),
  ],
)
def test_npz_that_holds_more_than_numbers(tmp_path, arrays, words):
  np.savez(tmp_path / 'a.npz', **arrays)
  assert words in _refused(tmp_path / 'a.npz')


def test_npz_bombs_are_refused(tmp_path):
  path = tmp_path / 'a.npz'
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('a.npy', bytes(2**26 + 1))
  assert 'expand' in _refused(path)
  header = io.BytesIO()
  np.lib.format.write_array_header_1_0(
    header, {'shape': (2**50,), 'fortran_order': False, 'descr': '<f4'}
  )
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('a.npy', header.getvalue())
  assert 'whose size is not that' in _refused(path)


@pytest.mark.parametrize(
  'form, kind', [('', 'torch'), ('_legacy', 'torch_legacy')]
)
def test_network_of_a_checkpoint(form, kind):
  path = _DATA / f'dino{form}.pth'
  for network, value in (('student', 1), ('teacher', 2)):
    read = files.read_tensors(path, network=network)
    assert read.format == f'torch{form}'
    assert set(read.tensors) == {
      *('norm.weight', 'norm.bias', 'head.weight', 'head.bias')
    }
    np.testing.assert_array_equal(read.tensors['norm.weight'], [value] * 3)
  default = files.read_tensors(path).tensors['norm.weight']
  np.testing.assert_array_equal(default, [2] * 3)


@pytest.mark.parametrize('outer', ['', 'module.', 'model.'])
def test_network_in_flat_names(tmp_path, outer):
  values = {'student': np.ones(2), 'teacher': np.zeros(2)}
  arrays = {f'{outer}{k}.backbone.norm.weight': v for k, v in values.items()}
  np.savez(tmp_path / 'a.npz', **arrays)
  for network, value in values.items():
    read = files.read_tensors(tmp_path / 'a.npz', network=network)
    _assert_same(read.tensors, {'norm.weight': value})


def test_the_only_network_is_taken(tmp_path):
  np.savez(tmp_path / 'a.npz', **{'student.backbone.norm.weight': np.ones(2)})
  _assert_same(
    files.read_tensors(tmp_path / 'a.npz').tensors, {'norm.weight': np.ones(2)}
  )


def _tensor(value):
  """What the reader of pickles makes of a tensor, told by its offset."""
  return files.Tensor(None, value, (), (), None)


_AVERAGED = {'model': {'w': _tensor(1)}, 'model_ema': {'w': _tensor(2)}}


@pytest.mark.parametrize(
  'root, network, offset',
  [
    ({'w': _tensor(1)}, 'teacher', 1),
    ({'best': _tensor(0), 'state_dict': {'w': _tensor(1)}}, 'teacher', 1),
    ({'model': {'state_dict': {'w': _tensor(1)}}, 'lr': 1}, 'teacher', 1),
    ({'optimizer': {'w': _tensor(0)}, 'net': {'w': _tensor(1)}}, 'student', 1),
    (
      {'model': {'w': _tensor(1)}, 'model_ema': {'w': _tensor(2)}},
      'student',
      1,
    ),
    (
      {'model': {'w': _tensor(1)}, 'model_ema': {'w': _tensor(2)}},
      'teacher',
      2,
    ),
    ({'model': 'vit', 'state_dict': {'w': _tensor(1)}}, 'teacher', 1),
    ({'student': {'w': _tensor(1)}, 'teacher': {}}, 'teacher', 1),
  ],
)
def test_where_the_state_dict_may_be(root, network, offset):
  found = networks.find_state_dict(root, network)
  assert {k: v.offset for k, v in found.items()} == {'w': offset}


def test_no_choice_between_state_dicts_of_unknown_use():
  root = {'model': {'w': _tensor(1)}, 'backbone': {'w': _tensor(2)}}
  with pytest.raises(files.UnreadableError, match='backbone, model'):
    networks.find_state_dict(root, 'teacher')


def test_dicts_in_themselves():
  root = {}
  root['model'] = root
  assert networks.find_state_dict(root, 'teacher') == {}
  root['w'] = _tensor(1)
  assert networks.find_state_dict(root, 'teacher') in ({}, {'w': root['w']})


@pytest.mark.parametrize(
  'names, expected',
  [
    (
      'module.backbone.a module.backbone.b module.head.mlp.0.weight',
      'a b head.mlp.0.weight',
    ),
    ('model._orig_mod.a model._orig_mod.b', 'a b'),
    ('vit.embeddings.a vit.encoder.layer.0 classifier.weight',
     'embeddings.a encoder.layer.0 classifier.weight'),
    ('encoder.patch_embed.a encoder.b decoder.c', 'patch_embed.a b decoder.c'),
    ('embeddings.a encoder.b encoder.c', 'embeddings.a encoder.b encoder.c'),
    ('a b model.c', 'a b model.c'),
    ('backbone.a backbone.fc.weight fc.weight',
     'a backbone.fc.weight fc.weight'),
    ('blocks.0.a blocks.1.a head.weight', 'blocks.0.a blocks.1.a head.weight'),
    ('module. module.', 'module.'),
  ],
)  # fmt: skip
def test_prefixes(names, expected):
  tensors = {name: name for name in names.split()}
  stripped = wrappers.strip_prefixes(tensors)
  assert ' '.join(stripped) == expected
  assert list(stripped.values()) == list(tensors)


def test_many_wrappers_end():
  name = 'module.' * 1000 + 'w'
  assert wrappers.strip_prefixes({name: 1})


@pytest.mark.parametrize(
  'data, words',
  [
    (b'', 'is empty'),
    (b'\x89PNG\r\n\x1a\n' + bytes(99), 'PNG'),
    (b'\xff\xd8\xff\xe0' + bytes(99), 'JPEG'),
    (b'<!DOCTYPE html><html>404</html>', 'web page'),
    (b'\n<html>', 'web page'),
    (
      b'version https://git-lfs.github.com/spec/v1\noid sha256:0',
      'git lfs pull',
    ),
    (b'some text\n', 'text file'),
    (bytes(600), 'not a file of weights'),
    (b'\x1f\x8b' + bytes(99), 'gzip'),
    (b'\x80\x04N.', 'Python pickle'),
    (b'cos\nsystem\n(S"x"\ntR.', 'text file'),
    (b'PK\x05\x06' + bytes(18), 'zip archive'),
  ],
)
def test_other_files_are_told_by_kind(tmp_path, data, words):
  path = tmp_path / 'weights.pth'
  path.write_bytes(data)
  assert words in _refused(path)


def test_other_archives_and_arrays(tmp_path):
  np.save(tmp_path / 'a.npy', np.ones(3))
  assert 'single array' in _refused(tmp_path / 'a.npy')
  with zipfile.ZipFile(tmp_path / 'a.zip', 'w') as archive:
    archive.writestr('readme.txt', 'x')
  assert 'neither' in _refused(tmp_path / 'a.zip')


def test_paths_without_a_file(tmp_path):
  assert 'does not exist' in _refused(tmp_path / 'missing.pth')
  assert 'folder' in _refused(tmp_path)
  with pytest.raises(UserError, match='student or teacher'):
    files.read_tensors(tmp_path, network='both')


def test_files_without_tensors(tmp_path):
  save_file({}, tmp_path / 'a.safetensors')
  assert 'no tensors' in _refused(tmp_path / 'a.safetensors')
  with zipfile.ZipFile(tmp_path / 'a.pth', 'w') as archive:
    archive.writestr('a/data.pkl', b'\x80\x02}.')
  assert 'no tensors' in _refused(tmp_path / 'a.pth')


def _examples(tmp_path):
  np.savez(tmp_path / 'npz', **_arrays())
  np.savez_compressed(tmp_path / 'compressed', **_arrays())
  save_file(_arrays(), tmp_path / 'a.safetensors')
  return {
    'npz': (tmp_path / 'npz.npz').read_bytes(),
    'compressed': (tmp_path / 'compressed.npz').read_bytes(),
    'safetensors': (tmp_path / 'a.safetensors').read_bytes(),
    'torch': (_DATA / 'dino.pth').read_bytes(),
    'torch_legacy': (_DATA / 'dino_legacy.pth').read_bytes(),
  }


def test_truncated_files(tmp_path):
  for name, data in _examples(tmp_path).items():
    path = tmp_path / f'{name}.part'
    ends = [1, 3, 8, 9, 20, 100, len(data) // 2, len(data) - 1]
    for end in ends:
      path.write_bytes(data[:end])
      message = _refused(path)
      if end > 20:
        words = ('damaged', 'ends', 'again')
        assert any(word in message for word in words), (name, end, message)


def test_damaged_files_raise_nothing_but_user_errors(tmp_path):
  draw = random.Random(0)
  path = tmp_path / 'a.bin'
  for name, data in _examples(tmp_path).items():
    if name.startswith('torch'):
      continue
    failures = 0
    for _ in range(100):
      damaged = bytearray(data)
      for _ in range(draw.choice([1, 4, 16])):
        place = draw.randrange(len(data))
        damaged[place] = draw.choice([0, 32, 123, 255])
      path.write_bytes(damaged)
      try:
        files.read_tensors(path)
      except UserError as error:
        failures += 1
        assert str(path) in str(error)
    assert failures > 20
