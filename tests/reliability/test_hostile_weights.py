"""Files of weights that would rather be programs, or larger than the world."""

import builtins
import io
import json
import os
import pathlib
import pickle
import struct
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from cmd_jax.convert import files, recognise
from cmd_jax.errors import UserError
from tests.reliability import mutate

_TORCH = pathlib.Path(__file__).parents[1] / 'convert' / 'data'
_SAVED = ('dino.pth', 'dino_legacy.pth', 'views.pth', 'dtypes.pth')


class _Call:
  """Calls a function when pickle itself reads it."""

  def __init__(self, function, *args):
    self._function, self._args = function, args

  def __reduce__(self):
    return self._function, self._args


def _in_archive(pickled, *storages):
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, 'w') as archive:
    archive.writestr('archive/data.pkl', pickled)
    for key, data in enumerate(storages):
      archive.writestr(f'archive/data/{key}', data)
  return buffer.getvalue()


def _text(value):
  return b'X' + struct.pack('<I', len(value)) + value.encode()


def _number(value):
  return pickle.dumps(value, 2)[2:-1]


def _tensor(name, offset, shape, strides, count, kind='Float'):
  """A name and a tensor, as torch.save pickles them."""
  numbers = [b'(' + b''.join(map(_number, x)) + b't' for x in (shape, strides)]
  return b''.join(
    [
      _text(name),
      b'ctorch._utils\n_rebuild_tensor_v2\n((',
      _text('storage') + b'ctorch\n%sStorage\n' % kind.encode(),
      _text('0') + _text('cpu') + _number(count) + b'tQ' + _number(offset),
      *numbers,
      b'\x89}tR',
    ]
  )


def _state_dict(*tensors):
  return b'\x80\x02}(' + b''.join(tensors) + b'u.'


def _pickles():
  """Pickles by what they try."""
  big = 2**63
  shapes = {
    'a huge shape': ((2**31, 2**31), (1, 1)),
    'a shape beyond integers': ((big, big), (1, 1)),
    'a shape of a thousand digits': ((10**1000,), (1,)),
    'no strides': ((4,), ()),
    'a negative shape': ((-4,), (1,)),
    'strides out of the storage': ((2, 2), (2**40, 1)),
    'negative strides': ((2, 2), (-1, -1)),
    'all one number': ((2**20, 2**20), (0, 0)),
    'a hundred axes': ((1,) * 100, (1,) * 100),
    'nothing of much': ((0, 2**61), (1, 1)),
  }
  found = {
    what: _state_dict(_small('w', 0, *shape)) for what, shape in shapes.items()
  }
  shared = [
    _tensor(f'w{i}', 0, (2**20,), (1,), 2**20, 'Bool') for i in range(2000)
  ]
  command = 'touch hacked'
  return found | {
    'an offset beyond': _state_dict(_small('w', 2**62, (2,), (1,))),
    'a negative offset': _state_dict(_small('w', -1, (2,), (1,))),
    'one storage two thousand times': _state_dict(*shared),
    'os.system': pickle.dumps({'w': _Call(os.system, command)}),
    'eval': pickle.dumps(_Call(eval, '__import__("os").system("x")')),
    'exec': pickle.dumps(_Call(exec, 'import os')),
    'getattr': b'c__builtin__\ngetattr\n(cos\n_exit\nX\x04\0\0\0nametR.',
    'a chain of calls': pickle.dumps(
      _Call(_Call, builtins.print, _Call(os.system, command))
    ),
    'recursion': b'\x80\x02' + b'(' * 50_000 + b'.',
    'deep tuples': b'\x80\x02N' + b'\x85' * 50_000 + b'.',
    'deep lists': b'\x80\x02]' + b'q\0]h\0a' * 50_000 + b'.',
    'doubling tuples': b'\x80\x02)' + b'2\x86' * 50_000 + b'.',
    'doubling lists': b'\x80\x02(' + b'q\0h\0h\0l(' * 30_000 + b'.',
    'a list in itself': b'\x80\x02]q\0h\0a.',
    'a far memo': b'\x80\x02Nr\xff\xff\xff\xff.',
    'a long string': b'\x80\x02X\xff\xff\xff\xff',
    'a longer string': b'\x80\x04\x8d' + b'\xff' * 8,
    'a large frame': b'\x80\x04\x95' + b'\xff' * 8 + b'N.',
    'an integer of megabytes': b'\x80\x02\x8b' + struct.pack('<i', 2**21)
    + b'\x7f' * 2**21 + b'.',
    'a key that hashes for ever': b'\x80\x02})' + b'2\x86' * 60 + b'Ns.',
    'endless': b'\x80\x02' + b'N0' * 3_000_000,
    'reduce of itself': b'\x80\x02cos\nsystem\nq\0h\0)RR.',
  }  # fmt: skip


def _small(name, offset, shape, strides):
  return _tensor(name, offset, shape, strides, 4)


def _safetensors(header, data=b'', size=None):
  if not isinstance(header, bytes):
    header = json.dumps(header).encode()
  size = len(header) if size is None else size
  return struct.pack('<Q', size) + header + data


def _headers():
  def one(dtype='F32', shape=(2,), ends=(0, 8)):
    return {'w': {'dtype': dtype, 'shape': shape, 'data_offsets': ends}}

  data = bytes(8)
  twice = b'{"w":%s,"w":%s}' % ((json.dumps(one()['w']).encode(),) * 2)
  return {
    'no header': _safetensors(b'{', size=2**63),
    'a header of all memory': _safetensors(b'{', size=2**40),
    'a negative header': _safetensors(b'{}', size=2**64 - 1),
    'a deep header': _safetensors(b'{"a":' * 100_000),
    'a deep list': _safetensors(b'{"a":' + b'[' * 100_000),
    'a huge shape': _safetensors(one(shape=(2**31, 2**31)), data),
    'a shape that overflows': _safetensors(one(shape=(2**62, 2, 2)), data),
    'a shape of nothing': _safetensors(one(shape=(0, 2**63), ends=(0, 0))),
    'a shape of many axes': _safetensors(one(shape=(1,) * 99, ends=(0, 4))),
    'offsets beyond': _safetensors(one(ends=(0, 2**40)), data),
    'offsets backwards': _safetensors(one(ends=(8, 0)), data),
    'another dtype': _safetensors(one('F8_E4M3', (8,)), data),
    'no dtype': _safetensors(one('<script>'), data),
    'twice the same': _safetensors(twice, data),
    'names of lines': _safetensors({'a\n\x1b[2J\0': one()['w']}, data),
    'metadata of all': _safetensors({'__metadata__': 7, **one()}, data),
    'not unicode': _safetensors(b'{"\xff\xff":1}'),
    'lone surrogates': _safetensors(b'{"\\ud800":{}}'),
  }


def _arrays():
  rng = np.random.default_rng(0)
  return {
    'cls_token': rng.normal(size=(1, 1, 8)).astype(np.float32),
    'pos_embed': rng.normal(size=(1, 5, 8)).astype(np.float32),
    'patch_embed.proj.weight': np.ones((8, 3, 4, 4), np.float32),
    'blocks.0.attn.qkv.weight': np.ones((24, 8), np.float32),
    'blocks.0.mlp.fc2.weight': np.ones((8, 32), np.float32),
    'blocks.0.mlp.fc1.weight': np.ones((32, 8), np.float32),
  }


def _arrays_of_google():
  block = 'Transformer/encoderblock'
  attention = f'{block}/MultiHeadDotProductAttention_0'
  shapes = {
    'embedding/kernel': (4, 4, 3, 8),
    'embedding/bias': (8,),
    'cls': (1, 1, 8),
    'Transformer/encoder_norm/scale': (8,),
    f'{attention}/query/kernel': (2, 8, 2, 4),
    f'{attention}/query/bias': (2, 2, 4),
    f'{attention}/out/kernel': (2, 2, 4, 8),
    f'{block}/MlpBlock_0/Dense_0/kernel': (2, 8, 16),
  }
  return {name: np.ones(shape, np.float32) for name, shape in shapes.items()}


def _npz(arrays):
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)
  return buffer.getvalue()


def _seeds():
  seeds = [
    mutate.Seed((_TORCH / name).read_bytes())
    for name in (*_SAVED, 'unsigned.pth', 'views_legacy.pth')
  ]
  for name in _SAVED[::2]:
    data = (_TORCH / name).read_bytes()
    seeds += [mutate.in_member(data, f'{name[:-4]}/data.pkl')] * 4
  names = _npz(_arrays())
  return [
    *seeds,
    mutate.Seed(names),
    mutate.in_member(names, 'pos_embed.npy'),
    mutate.in_member(names, 'cls_token.npy'),
    mutate.Seed(_npz(_arrays_of_google())),
    mutate.in_member(_npz(_arrays_of_google()), 'embedding/kernel.npy'),
    *[mutate.Seed(safetensors.numpy.save(_arrays(), {'a': 'b'}))] * 3,
  ]


def _many_blocks(count):
  one = _arrays()
  more = {
    f'blocks.{i}.attn.qkv.weight': np.zeros((0, 8), np.float32)
    for i in range(count)
  }
  return safetensors.numpy.save(more | one)


def _described(**fields):
  known = dict(
    name='vit', dtype='float32', width=8, depth=1, num_heads=1, patch_px=4
  )
  text = json.dumps(known | fields)
  return safetensors.numpy.save(_arrays(), {'architecture': text})


def _encoders():
  wrong = dict(_arrays())
  wrong['pos_embed'] = np.ones((5,), np.float32)
  odd = {name: np.float32(1) for name in _arrays()}
  return {
    'many blocks': _many_blocks(20_000),
    'deep by its words': _described(depth=10**9),
    'of a depth in words': _described(depth='many'),
    'of fractions': _described(width=1.5, depth=0.5),
    'of no heads': _described(num_heads=0),
    'of no width': _described(width=0),
    'huge by its words': _described(width=2**40, image_px=2**31),
    'of a negative patch': _described(patch_px=-4),
    'of none': _described(name=None),
    'of many': _described(depth=[10**9] * 9),
    'of another shape': safetensors.numpy.save(wrong),
    'all scalars': _npz(odd),
    'deep description': safetensors.numpy.save(
      _arrays(), {'architecture': '[' * 100_000}
    ),
  }


def make_targets(folder):
  where = 'tests.reliability.readers:'
  pickles = _pickles()
  specials = {
    f'{what}, zip': _in_archive(data, bytes(2**20))
    for what, data in pickles.items()
  }
  specials |= {
    f'{what}, bare': data for what, data in pickles.items() if len(data) < 10**6
  }
  specials |= _headers() | mutate.zip_bombs('pos_embed.npy')
  return [
    mutate.Target(
      'weights', f'{where}weights', 'weights/w.pth', _seeds(), specials
    )
  ]


@pytest.mark.parametrize('what', _encoders())
def test_encoders_that_cannot_be_are_refused(what, tmp_path):
  path = tmp_path / 'w.safetensors'
  path.write_bytes(_encoders()[what])
  with pytest.raises(UserError, match='w.safetensors'):
    recognise.recognise_encoder(path)


def test_pipes_and_devices_are_no_weights(tmp_path):
  os.mkfifo(tmp_path / 'pipe.pth')
  (tmp_path / 'zeros.pth').symlink_to('/dev/zero')
  for name in ('pipe.pth', 'zeros.pth'):
    with pytest.raises(UserError, match=f'{name} is no file'):
      files.read_tensors(tmp_path / name)
