"""labels.csv, the index of a listing, and shards that strangers wrote."""

import io
import json
import os
import pathlib
import tarfile

import numpy as np
import pytest

from cmd_jax.data.sources import folder as folder_lib
from cmd_jax.data.sources import index
from cmd_jax.data.sources.folder import folder_source
from cmd_jax.data.sources.shards import shards_source
from cmd_jax.errors import UserError
from tests.reliability import mutate, test_hostile_images

_NAMES = ('a/1.jpg', 'a/2.jpg', 'b/1.jpg', 'b/2.jpg')
_TABLE = """file,class_name,label,split
a/1.jpg,"robin, red",0,train
a/2.jpg,"robin, red",0,test
b/1.jpg,wren,1,train
b/2.jpg,wren,1,
"""


def _make_photographs(folder):
  """Files with the names of photographs: listing does not look into them."""
  for name in _NAMES:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def _tables():
  wide = ','.join(['file', 'class_name', *(f'c{i}' for i in range(10**6))])
  return {
    'empty': b'',
    'nuls': _TABLE.replace('wren', 'wr\0en').encode(),
    'a million columns': f'{wide}\n{"," * (10**6 + 1)}\n'.encode() * 2,
    'a million columns without a name': b',' * 10**6,
    'a long value': f'{_TABLE}{"x" * 10**6}.jpg,a,0,\n'.encode(),
    'a long name': f'{_TABLE}{"x" * 255}.jpg,wren,1,\n'.encode(),
    'unbalanced quotes': f'{_TABLE}"a/3.jpg,wren\n'.encode(),
    'a name of lines': f'{_TABLE}"a\nb",wren,1,\n"a\nb",wren,1,\n'.encode(),
    'twice the header': b'file,file,class_name\na/1.jpg,b/1.jpg,wren\n',
    'twice the mark': b'\xef\xbb\xbf\xef\xbb\xbf' + _TABLE.encode(),
    'utf-16': _TABLE.encode('utf-16'),
    'not unicode': _TABLE.replace('wren', 'wr\xe9n').encode('latin-1'),
    'a large label': _TABLE.replace(',1,', f',{"9" * 5000},').encode(),
    'outside': f'{_TABLE}../../etc/passwd,wren,1,\n'.encode(),
    'outside behind a folder': f'{_TABLE}a/../../x,wren,1,\n'.encode(),
    'absolute': f'{_TABLE}/etc/passwd,wren,1,\n'.encode(),
    'script': f'{_TABLE}b/3.jpg,<script>alert(1)</script>,2,\n'.encode(),
    'separators': f'{_TABLE}b/3.jpg,\u2028\u2029\x85,2,\n'.encode(),
  }


def _index(folder, file):
  """The index of the photographs, and copies with one array changed."""
  root = str(folder)
  names = index.Names.of(_NAMES)
  watched = ['', 'a', 'b']
  key = dict(
    folder=os.path.realpath(root), labels_file='', test_fraction=0.2, seed=0
  )
  arrays = dict(
    blob=names.blob,
    ends=names.ends,
    labels=np.array([0, 0, 1, 1], np.int32),
    splits=np.ones(4, np.int8),
    class_names=np.frombuffer(b'["a", "b"]', np.uint8),
    notes=np.frombuffer(b'[]', np.uint8),
    watched=np.frombuffer(json.dumps(watched).encode(), np.uint8),
    stamps=folder_lib._stamps([os.path.join(root, name) for name in watched]),
  )

  def write(**changes):
    index.write_index(file, key, **arrays | changes)
    return file.read_bytes()

  deep = np.frombuffer(b'[' * 100_000, np.uint8)
  return write(), {
    'labels beyond': write(labels=np.full(4, 7, np.int32)),
    'labels of another number': write(labels=np.zeros(9, np.int32)),
    'labels of text': write(labels=np.array(list('abcd'))),
    'ends beyond': write(ends=np.array([0, 2**62, 3, -5, 9])),
    'ends of fractions': write(ends=np.linspace(0, 9, 5)),
    'no names': write(ends=np.zeros(0, np.int64)),
    'splits beyond': write(splits=np.full(4, 100, np.int8)),
    'deep names': write(class_names=deep),
    'deep notes': write(notes=deep),
    'watched that is no list': write(watched=np.frombuffer(b'7', np.uint8)),
    'classes that are numbers': write(
      class_names=np.frombuffer(b'[1, 2]', np.uint8)
    ),
    'names outside': write(
      blob=index.Names.of(['../../etc/x'] * 4).blob,
      ends=np.arange(5) * 11,
    ),
    'matrix': write(blob=np.zeros((3, 3), np.uint8)),
    'a lone array': mutate.npy('(9,)', bytes(9)),
  }


def _shard(*members):
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode='w') as tar:
    for name, content, *fields in members:
      info = tarfile.TarInfo(name)
      info.size = len(content)
      for field in fields:
        info.pax_headers |= field
      tar.addfile(info, io.BytesIO(content))
  return buffer.getvalue()


def _sparse():
  """A label of 8 TB, all zeros, in 512 bytes."""
  header = bytearray(tarfile.TarInfo('1.cls').tobuf(tarfile.GNU_FORMAT))
  header[156:157] = tarfile.GNUTYPE_SPARSE
  header[386:398] = header[398:410] = b'00000000000\0'
  header[483:495] = b'\x80' + (2**43).to_bytes(11, 'big')
  return mutate.with_tar_checksums(bytes(header)) + bytes(1024)


def _shards():
  photo = test_hostile_images._encode('RGB', 'PNG')
  valid = _shard(
    ('1.png', photo),
    ('1.cls', b'7'),
    ('2.png', photo),
    ('2.json', b'{"label": 8, "caption": "a wren"}'),
  )
  negative = bytearray(valid)
  negative[124:136] = b'\xff' * 10 + b'\xfc\0'
  seeds = [
    mutate.Seed(valid, mutate.with_tar_checksums),
    mutate.Seed(
      b'{"label": 8, "class_name": "a wren"}',
      lambda data: mutate.in_tar(valid, '2.json', data),
    ),
  ]
  labels = {
    'a deep label': (b'[' * 100_000, '.json'),
    'a deep object': (b'{"label":' * 100_000, '.json'),
    'a label of many digits': (b'9' * 5000, '.cls'),
    'a long number': (b'{"label": %s}' % (b'9' * 5000), '.json'),
    'a long label': (b'x' * 3_000_000, '.txt'),
    'not unicode': (b'\xff\xfe', '.txt'),
    'a script': (b'<script>alert(1)</script>\n\xe2\x80\xa8', '.txt'),
  }
  specials = {
    what: _shard(('1.png', photo), (f'1{extension}', content))
    for what, (content, extension) in labels.items()
  }
  return seeds, specials | {
    'negative size': mutate.with_tar_checksums(bytes(negative)),
    'sparse': _shard(('1.png', photo))[:-10240] + _sparse(),
    'a size in words': _shard(('1.png', photo, {'size': 'many'})),
    'a size below nothing': _shard(('1.png', photo, {'size': '-1024'})),
    'names outside': _shard(('../../1.png', photo), ('/etc/2.png', photo)),
    'empty': b'',
    'two empty blocks': bytes(1024),
  }


def make_targets(folder):
  _make_photographs(folder / 'labels')
  _make_photographs(folder / 'listing' / 'photographs')
  where = 'tests.reliability.readers:'
  whole, changed = _index(
    folder / 'listing' / 'photographs', folder / 'listing' / 'index.npz'
  )
  members = ('ends', 'labels', 'class_names', 'stamps')
  seeds = [mutate.Seed(whole)] + [
    mutate.in_member(whole, f'{name}.npy') for name in members
  ]
  shards, tars = _shards()
  return [
    mutate.Target(
      'labels.csv',
      f'{where}labels',
      'labels/labels.csv',
      [mutate.Seed(_TABLE.encode())],
      _tables(),
    ),
    mutate.Target(
      'listings',
      f'{where}listing',
      'listing/index.npz',
      seeds,
      changed | mutate.zip_bombs('labels.npy'),
    ),
    mutate.Target('shards', f'{where}shard', 'shards/a.tar', shards, tars),
  ]


def test_a_table_that_is_a_pipe_or_a_device_is_refused(tmp_path):
  _make_photographs(tmp_path)
  os.mkfifo(tmp_path / 'labels.csv')
  (tmp_path / 'zeros.csv').symlink_to('/dev/zero')
  for name in ('labels.csv', 'zeros.csv'):
    with pytest.raises(UserError, match=name):
      folder_source(str(tmp_path), 'train', labels_file=name)


def test_two_columns_of_a_name_are_refused(tmp_path):
  _make_photographs(tmp_path)
  text = 'file,file,class_name\na/1.jpg,b/1.jpg,wren\n'
  (tmp_path / 'labels.csv').write_text(text)
  with pytest.raises(UserError, match='labels.csv.*file.*twice'):
    folder_source(str(tmp_path), 'train')


def test_odd_names_of_files_and_folders_are_kept(tmp_path):
  names = [
    'a\nb/1\t.jpg',
    '<script>alert(1)</script>'.replace('/', '-') + '/"\'.jpg',
    os.fsdecode(b'\xff\xfe') + '/\u2028.jpg',
    'é' * 120 + '/' + 'x' * 251 + '.jpg',
    '\x1b[31m/-rf.jpg',
  ]
  for name in names:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
  source = folder_source(str(tmp_path), 'train')
  assert sorted(source.file_names) == sorted(names)
  assert len(source.class_names) == len(names)


def test_loops_of_links_and_pipes_end(tmp_path):
  _make_photographs(tmp_path)
  (tmp_path / 'a' / 'up').symlink_to(tmp_path)
  (tmp_path / 'self.jpg').symlink_to('self.jpg')
  os.mkfifo(tmp_path / 'a' / 'pipe.jpg')
  source = folder_source(str(tmp_path), 'pretrain', test_fraction=0)
  assert set(source.file_names) == {*_NAMES, 'self.jpg'}


def test_names_in_a_shard_open_nothing_else(tmp_path):
  photo = test_hostile_images._encode('RGB', 'PNG')
  (tmp_path / 'a.tar').write_bytes(_shard(('../../1.png', photo)))
  source = shards_source(str(tmp_path / 'a.tar'))
  assert source.load(0).image.size == (16, 12)
  assert [p.name for p in pathlib.Path(tmp_path).iterdir()] == ['a.tar']
