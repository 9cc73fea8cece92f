import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import io
import os
import pathlib
import pickle
import random
import re
import struct
import uuid
import zipfile

import numpy as np
import pytest

from cmd_jax.convert import files, torch_pickle
from cmd_jax.convert.torch_globals import INERT, Tensor, UnreadableError
from cmd_jax.errors import UserError

_DATA = pathlib.Path(__file__).parent / 'data'
_FORMATS = ['', '_legacy']


def _run(pickled):
  return torch_pickle.Interpreter(io.BytesIO(pickled), len(pickled)).run()


def _write_zip(path, pickled, storages=(), **kwargs):
  with zipfile.ZipFile(path, 'w', **kwargs) as archive:
    archive.writestr('archive/data.pkl', pickled)
    for key, data in enumerate(storages):
      archive.writestr(f'archive/data/{key}', data)


def _tensor_pickle(offset, shape, strides, count, key='0', name='w'):
  """A state dict of one float32 tensor, as torch.save pickles it."""

  def text(value):
    return b'X' + struct.pack('<I', len(value)) + value.encode()

  def number(value):
    return pickle.dumps(value, 2)[2:-1]

  def numbers(values):
    return b'(' + b''.join(map(number, values)) + b't'

  return (
    b'\x80\x02}' + text(name) + b'ctorch._utils\n_rebuild_tensor_v2\n(('
    + text('storage') + b'ctorch\nFloatStorage\n' + text(key) + text('cpu')
    + number(count) + b'tQ' + number(offset) + numbers(shape)
    + numbers(strides) + b'\x89}tRs.'
  )  # fmt: skip


@pytest.mark.parametrize('form', _FORMATS)
def test_every_dtype(form):
  tensors = files.read_tensors(_DATA / f'dtypes{form}.pth').tensors
  assert len(tensors) == 12
  for name, array in tensors.items():
    assert array.dtype.name == name
    expected = np.arange(6).reshape(2, 3).astype(array.dtype)
    np.testing.assert_array_equal(array, expected)


def test_dtypes_without_a_type_of_storage():
  tensors = files.read_tensors(_DATA / 'unsigned.pth').tensors
  assert {x.dtype.name for x in tensors.values()} == set(tensors)
  for array in tensors.values():
    np.testing.assert_array_equal(array, [0, 1, 2])


@pytest.mark.parametrize('form', _FORMATS)
def test_views_of_one_storage(form):
  tensors = files.read_tensors(_DATA / f'views{form}.pth').tensors
  numbers = np.arange(24, dtype=np.float32)
  expected = {
    'whole': numbers,
    'transposed': numbers.reshape(4, 6).T,
    'slice': numbers[5:9],
    'strided': numbers.reshape(4, 6)[1::2, 2::3],
    'permuted': numbers.reshape(2, 3, 4).transpose(2, 0, 1),
    'scalar': np.float32(7),
    'long': np.int64(3),
    'empty': np.empty((0, 5)),
    'parameter': np.ones(2),
  }
  assert tensors.keys() == expected.keys()
  for name, array in tensors.items():
    np.testing.assert_array_equal(array, expected[name], strict=False)
    assert array.shape == expected[name].shape
    assert name == 'empty' or not array.flags.writeable


@pytest.mark.parametrize('form', _FORMATS)
def test_arguments_and_other_objects_carry_nothing(form):
  root = None
  if form:
    with (_DATA / 'dino_legacy.pth').open('rb') as file:
      size = (_DATA / 'dino_legacy.pth').stat().st_size
      for _ in range(4):
        root = torch_pickle.Interpreter(file, size).run()
  else:
    with zipfile.ZipFile(_DATA / 'dino.pth') as archive:
      root = _run(archive.read('dino/data.pkl'))
  for name in ('args', 'best', 'names', 'device'):
    assert root[name] is INERT
  assert root['epoch'] == 7
  assert isinstance(root['dino_loss']['center'], Tensor)
  assert not hasattr(INERT, '__dict__')


class _Evil:
  """Creates a file when it is unpickled by pickle itself."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.system, (f'touch {self.path}',)


class _Builtin(_Evil):
  def __reduce__(self):
    return eval, (f'open({str(self.path)!r}, "w")',)


class _State(_Evil):
  """Hides the call in the state that an allowed name is built with."""

  def __reduce__(self):
    import argparse

    return argparse.Namespace, (), {'x': _Evil(self.path)}


def _instructions(path):
  """Payloads in the instructions that the standard pickler seldom writes."""
  command = f'touch {path}'
  text = b'X' + struct.pack('<I', len(command)) + command.encode()
  quoted = repr(command).encode()
  return {
    'INST': b'(S' + quoted + b'\nios\nsystem\n.',
    'OBJ': b'(cos\nsystem\n' + text + b'o.',
    'STACK_GLOBAL': b'\x8c\x02os\x8c\x06system\x93' + text + b'\x85R.',
    'NEWOBJ': b'cos\nsystem\n' + text + b'\x85\x81.',
    'NEWOBJ_EX': b'cos\nsystem\n' + text + b'\x85}\x92.',
    'EXT1': b'\x82\x01.',
    'attribute': b'\x8c\x0acollections\x8c\x0eOrderedDict.get\x93.',
    'submodule': b'ctorch\nserialization.os.system\n' + text + b'\x85R.',
    'persistent': b'Pcos\n.',
    'memo': b'cargparse\nNamespace\nq\x00cos\nsystem\nq\x00h\x00R.',
    'getattr': b'c__builtin__\ngetattr\n' + text + b'\x85R.',
  }


def test_nothing_is_executed(tmp_path):
  target = tmp_path / 'executed'
  payloads = {
    f'{kind.__name__}{protocol}': pickle.dumps({'w': kind(target)}, protocol)
    for kind in (_Evil, _Builtin, _State)
    for protocol in range(6)
  } | _instructions(target)
  # The payloads are real ones.
  pickle.loads(payloads['_Evil2'])
  assert target.exists()
  target.unlink()
  path = tmp_path / 'evil.pth'
  legacy = (_DATA / 'views_legacy.pth').read_bytes()
  # Magic number and protocol.
  head = legacy[:21]
  for name, payload in payloads.items():
    for write in (
      lambda data: _write_zip(path, data),
      path.write_bytes,
      lambda data: path.write_bytes(head + data),
      lambda data: path.write_bytes(head + b'N.' + data),
    ):
      write(payload)
      with pytest.raises(UserError):
        files.read_tensors(path)
      assert not target.exists(), name


@pytest.mark.parametrize(
  'pickled, name',
  [
    (pickle.dumps(os.getcwd, 2), f'{os.getcwd.__module__}.getcwd'),
    (pickle.dumps(eval, 2), '__builtin__.eval'),
    (pickle.dumps(eval, 4), 'builtins.eval'),
    (pickle.dumps(_Evil('x'), 2), f'{os.system.__module__}.system'),
    (b'(S"x"\nios\nsystem\n.', 'instruction'),
  ],
)
def test_the_refused_name_is_told(tmp_path, pickled, name):
  _write_zip(tmp_path / 'a.pth', pickled)
  with pytest.raises(UserError) as caught:
    files.read_tensors(tmp_path / 'a.pth')
  assert name in str(caught.value)
  assert 'a.pth' in str(caught.value)


@pytest.mark.parametrize(
  'pickled',
  [
    # Lengths for which memory might be set aside.
    b'\x96' + b'\xff' * 8,
    b'\x96' + struct.pack('<Q', 2**62) + b'.',
    b'X\xff\xff\xff\x7f.',
    b'\x8b\xff\xff\xff\x7f.',
    b'\x8b\xff\xff\xff\xff.',
    # Stack, mark and memo that are not there.
    *(b'R.', b't.', b'h\x00.', b'0.', b'1.', b'.', b'a.', b'(s.', b'}Nu.'),
    # Calls of what is no name, with what are no arguments.
    *(b'N)R.', b'))R.', b'ctorch\nSize\nNR.', b'ctorch\nSize\n)R.'),
    b'ctorch._utils\n_rebuild_tensor_v2\n(NNNNtR.',
    b'ctorch._utils\n_rebuild_parameter\nN\x85R.',
    b'NQ.',
    b'',
  ],
)
def test_damaged_pickles(pickled):
  with pytest.raises(UnreadableError):
    _run(pickled)


def test_pickles_that_would_take_for_ever():
  # 64 levels of pairs of the same, whose hash visits 2 ** 64 of them.
  shared = b'}' + b')' + b'2\x86' * 64 + b'Ns.'
  assert _run(shared) == {}
  # Deeper than the C stack.
  assert _run(b'})' + b'\x85' * 300_000 + b'Ns.') == {}
  # The standard Unpickler sets memory aside for all smaller indices.
  assert _run(b'Nr\xff\xff\xff\xff.') is None


def test_state_changes_nothing():
  # A state dict has the attribute _metadata.
  state = b'X\x01\x00\x00\x00a'
  named = b'ccollections\nOrderedDict\n)R' + state + b'K\x01s'
  assert _run(named + b'}' + state + b'K\x02sb.') == {'a': 1}
  assert _run(b'cargparse\nNamespace\n)\x81}' + state + b'K\x02sb.') is INERT


@pytest.mark.parametrize(
  'view, words',
  [
    ((0, (4,), (1,), 4), None),
    ((0, (2, 2), (1, 2), 4), None),
    ((0, (1, 4), (2**61, 1), 4), None),
    ((1, (4,), (1,), 4), 'reaches out'),
    ((0, (2, 2), (3, 2), 4), 'reaches out'),
    ((0, (4,), (2**61,), 4), 'reaches out'),
    ((-1, (4,), (1,), 4), 'shape'),
    ((0, (4,), (-1,), 4), 'shape'),
    ((0, (-4,), (1,), 4), 'shape'),
    ((0, (4,), (), 4), 'shape'),
    ((0, (4, None), (1, 1), 4), 'shape'),
    ((0, (2**63,), (0,), 4), 'shape'),
    ((0, (1,) * 33, (1,) * 33, 4), 'shape'),
    ((0, (0, 2**61), (1, 1), 4), 'shape'),
    ((0, (2**40,), (0,), 4), 'contiguous'),
    ((0, (5,), (1,), 5), 'ends'),
    ((0, (4,), (1,), None), 'shape'),
    ((0, (4,), (1,), 4, '7'), "lacks the record 'data/7'"),
    ((0, (4,), (1,), 4, '../data.pkl'), 'lacks the record'),
  ],
)
def test_views_stay_within_their_storage(tmp_path, view, words):
  path = tmp_path / 'a.pth'
  storage = np.arange(4, dtype='<f4').tobytes()
  _write_zip(path, _tensor_pickle(*view), [storage])
  if words is None:
    array = files.read_tensors(path).tensors['w']
    assert array.shape == view[1]
    assert sorted(array.ravel()) == [0, 1, 2, 3]
  else:
    with pytest.raises(UserError) as caught:
      files.read_tensors(path)
    assert words in str(caught.value)


def test_compressed_records_are_refused(tmp_path):
  path = tmp_path / 'bomb.pth'
  _write_zip(
    path,
    _tensor_pickle(0, (2**18,), (1,), 2**18),
    [bytes(2**20)],
    compression=zipfile.ZIP_DEFLATED,
  )
  with pytest.raises(UserError, match='encrypted'):
    files.read_tensors(path)


def test_a_wrong_checksum_is_told(tmp_path):
  data = bytearray((_DATA / 'views.pth').read_bytes())
  place = data.index(np.arange(24, dtype='<f4').tobytes())
  data[place + 40] ^= 1
  (tmp_path / 'a.pth').write_bytes(data)
  with pytest.raises(UserError, match='checksum'):
    files.read_tensors(tmp_path / 'a.pth')


def test_big_endian_files_are_refused(tmp_path):
  path = tmp_path / 'a.pth'
  _write_zip(path, _tensor_pickle(0, (1,), (1,), 1), [bytes(4)])
  with zipfile.ZipFile(path, 'a') as archive:
    archive.writestr('archive/byteorder', 'big')
  with pytest.raises(UserError, match='little-endian'):
    files.read_tensors(path)


@pytest.mark.parametrize(
  'name, words',
  [('script', 'torch.jit.load'), ('model', 'save model.state_dict')],
)
def test_programs_are_refused(name, words):
  with pytest.raises(UserError, match=words):
    files.read_tensors(_DATA / f'{name}.pth')


@pytest.mark.parametrize('name', ['dino', 'dino_legacy', 'views_legacy'])
def test_damaged_files_raise_nothing_but_user_errors(tmp_path, name):
  good = (_DATA / f'{name}.pth').read_bytes()
  draw = random.Random(0)
  path = tmp_path / 'a.pth'
  failures = 0
  for _ in range(150):
    data = bytearray(good)
    if draw.random() < 0.3:
      data = data[: draw.randrange(len(data))]
    else:
      for _ in range(draw.choice([1, 2, 8])):
        data[draw.randrange(len(data))] = draw.choice([0, 40, 82, 255])
    path.write_bytes(data)
    try:
      files.read_tensors(path)
    except UserError as error:
      failures += 1
      assert 'a.pth' in str(error)
  assert failures > 50


class _Mode(enum.Enum):
  FAST = 'fast'


class _Flags(enum.IntFlag):
  ONE, TWO = 1, 2


@dataclasses.dataclass
class _Settings:
  path: pathlib.Path
  modes: dict


class _ByAttribute:
  def __reduce__(self):
    return getattr, (_Mode, 'FAST')


_Pair = collections.namedtuple('_Pair', 'a b')


@pytest.mark.parametrize(
  'value',
  [
    argparse.Namespace(a=1, path=pathlib.Path('/x'), mode=_Mode.FAST),
    *(_Mode.FAST, _Flags.ONE | _Flags.TWO, _Mode, _ByAttribute()),
    *(_Settings(pathlib.Path('x'), {'m': _Mode.FAST}), _Pair(1, _Mode.FAST)),
    *(pathlib.PurePosixPath('a/b'), pathlib.PureWindowsPath('c:/d')),
    *(uuid.UUID(int=1), decimal.Decimal('1.5'), fractions.Fraction(1, 2)),
    *(datetime.datetime.now(datetime.UTC), range(3), ..., type(None)),
    *(re.compile('a'), collections.ChainMap({}), bytearray(b'a'), 1j),
    *(np.float32(1), np.arange(3), np.random.default_rng(0), np.dtype('f4')),
  ],
  ids=lambda x: type(x).__name__,
)
@pytest.mark.parametrize('protocol', [2, 4, 5])
def test_objects_beside_the_weights_are_skipped(tmp_path, value, protocol):
  path = tmp_path / 'a.pth'
  weights = _tensor_pickle(0, (2,), (1,), 2)[2:-1]
  text = b'X\x04\0\0\0args'
  pickled = pickle.dumps(value, protocol)[:-1]
  state = b'X\x0a\0\0\0state_dict' + weights
  head, body = pickled[:2], pickled[2:]
  # The frames of later protocols are taken as they come.
  _write_zip(path, head + b'}(' + state + text + body + b'u.', [bytes(8)])
  tensors = files.read_tensors(path).tensors
  assert tensors.keys() == {'w'}


@pytest.mark.parametrize(
  'module, name',
  [
    *(('timm.utils', 'os.system'), ('pkg.os', 'system'), ('pkg', 'eval')),
    *(('posix', 'system'), ('subprocess', 'Popen'), ('torch.hub', 'load')),
    *(('torch', 'load'), ('torch._utils', '_rebuild_qtensor'), ('os', 'x')),
    *(('torch.storage', '_load_from_bytes'), ('importlib', 'import_module')),
  ],
)
def test_names_that_mean_harm_or_tensors_are_refused(tmp_path, module, name):
  pickled = b'\x80\x04}X\x01\0\0\0wc%s\n%s\n)Rs.'
  _write_zip(tmp_path / 'a.pth', pickled % (module.encode(), name.encode()))
  with pytest.raises(UserError, match=f'asks for .{module}.{name}'):
    files.read_tensors(tmp_path / 'a.pth')


@pytest.mark.parametrize(
  'value, words',
  [
    (_Settings('x', {}), 'no state dict'),
    ({'net': _Settings('x', {})}, r'it has net\): if it is a whole model'),
    ({'epoch': 3, 'logs': {'a': 1}}, 'it has epoch, logs'),
  ],
)
def test_objects_alone_are_no_weights(tmp_path, value, words):
  _write_zip(tmp_path / 'a.pth', pickle.dumps(value, 2))
  with pytest.raises(UserError, match=words):
    files.read_tensors(tmp_path / 'a.pth')
