"""Lists and archives of data sets that were fetched from somewhere."""

import functools
import gzip
import io
import json
import struct
import tarfile
import zlib

from tests.reliability import mutate, test_hostile_images, test_hostile_lists
from tests.tfds_builders import layouts

_WHERE = 'tests.reliability.readers:'


def _element(kind, data):
  return struct.pack('<II', kind, len(data)) + data + bytes(-len(data) % 8)


def _matrix(array_class, *elements, shape=(1, 1)):
  flags = _element(6, struct.pack('<II', array_class, 0))
  size = _element(5, struct.pack(f'<{len(shape)}i', *shape))
  return _element(14, flags + size + _element(1, b'a') + b''.join(elements))


def _matlab(*elements):
  return bytes(124) + b'\0\1IM' + b''.join(elements)


def _packed(data):
  return _element(15, zlib.compress(data, 9)).rstrip(b'\0')


def _nested(count):
  data = b''
  for _ in range(count):
    data = _matrix(1, data)
  return data


def _matlab_specials():
  width = _element(5, struct.pack('<i', 32))
  nothing = _element(1, b'')
  bomb = _element(15, zlib.compress(bytes(2**29), 9))
  packed = b'x'
  for _ in range(2000):
    packed = _element(15, zlib.compress(packed, 0))
  numbers = _element(7, struct.pack('<f', float('inf')))
  return {
    'bomb': _matlab(bomb),
    'bomb of structs': _matlab(
      _matrix(2, width, nothing, shape=(2**31 - 1, 2**31 - 1))
    ),
    'structs below nothing': _matlab(_matrix(2, width, nothing, shape=(-1,))),
    'fields of no width': _matlab(
      _matrix(2, _element(5, bytes(4)), _element(1, b'abc'))
    ),
    'fields of a negative width': _matlab(
      _matrix(
        2,
        _element(5, struct.pack('<i', -1)),
        _element(1, b'abc'),
        shape=(2**31 - 1,),
      )
    ),
    'cells in cells': _matlab(_nested(3000)),
    'packed in packed': _matlab(packed),
    'infinite flags': _matlab(_element(14, numbers + numbers)),
    'infinite shape': _matlab(
      _element(14, _element(6, struct.pack('<II', 2, 0)) + numbers)
    ),
    'cut off': _matlab(_element(14, b'')[:6]),
    'empty': b'',
  }


def _cars(tmp_path):
  rows = [
    dict(
      bbox_x1=1, bbox_y1=2, bbox_x2=30, bbox_y2=40, fname=f'{i}.jpg'
    ) | {'class': 1}
    for i in range(3)
  ]  # fmt: skip
  path = tmp_path / 'cars.mat'
  variables = {'annotations': layouts._structs(rows)}
  layouts.save_matlab(path, variables, compressed=False)
  plain = path.read_bytes()
  layouts.save_matlab(path, variables)
  packed = path.read_bytes()
  path.unlink()
  return [
    mutate.Seed(plain),
    mutate.Seed(plain[128:], lambda data: plain[:128] + _packed(data)),
    mutate.Seed(packed),
  ]


def _tar(folder, root):
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode='w') as tar:
    for path in sorted(folder.rglob('*.txt')):
      tar.add(path, f'{root}/{path.relative_to(folder)}'.lstrip('/'))
  return buffer.getvalue()


def _birds(tmp_path):
  archive = _tar(layouts.make_cub(tmp_path, masks=False), 'CUB_200_2011')
  with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
    members = {m.name: tar.extractfile(m).read() for m in tar}
  return archive, members


def _changed_lists(archive, members):
  def change(name, old, new):
    name = next(n for n in members if n.endswith(name))
    assert old in members[name]
    return mutate.in_tar(archive, name, members[name].replace(old, new, 1))

  return {
    'a box of nan': change('bounding_boxes.txt', b' 30.0', b' nan'),
    'an infinite box': change('bounding_boxes.txt', b' 30.0', b' 1e999'),
    'part 0': change('part_locs.txt', b'1 2 ', b'1 0 '),
    'part -3': change('part_locs.txt', b'1 2 ', b'1 -3 '),
    'part 99': change('part_locs.txt', b'1 2 ', b'1 99 '),
    'a long number': change('part_locs.txt', b'1 2 ', b'1 %s ' % (b'9' * 5000)),
    'a name of lines': change('images.txt', b'1 ', b'1 \x1b[2J\x85'),
  }


def _archives(archive):
  info = tarfile.TarInfo('CUB_200_2011/classes.txt')
  info.size = 2**29
  header = info.tobuf()
  press = zlib.compressobj(9, zlib.DEFLATED, 31)
  bomb = press.compress(header)
  block = bytes(2**20)
  for _ in range(2**9):
    bomb += press.compress(block)
  bomb += press.compress(bytes(1024)) + press.flush()
  return {
    'bomb': bomb,
    'gzip of gzip': gzip.compress(gzip.compress(archive)),
    'cut gzip': gzip.compress(archive)[:-9],
    'sparse': test_hostile_lists._sparse().replace(
      b'1.cls' + bytes(19), b'CUB_200_2011/classes.txt'
    ),
    'a size in words': test_hostile_lists._shard(('a', b'', {'size': 'x'})),
    'empty': b'',
  }


def make_targets(folder):
  archive, members = _birds(folder / 'made')
  birds = [
    mutate.Seed(archive, mutate.with_tar_checksums),
    mutate.Seed(archive, lambda x: gzip.compress(x, 1)),
    *(
      mutate.Seed(data, functools.partial(mutate.in_tar, archive, name))
      for name, data in members.items()
    ),
  ]
  table = b'name,x1,y1,x2,y2,class\n1.jpg,1,2,30,40,a\n2.jpg,2,3,31,41,b\n'
  photo = test_hostile_images._encode
  pair = [('a.jpg', photo('RGB', 'JPEG')), ('b.png', photo('RGB', 'PNG'))]
  packed = test_hostile_lists._shard(*pair)
  return [
    mutate.Target(
      'MATLAB files',
      f'{_WHERE}matlab',
      'matlab/a.mat',
      _cars(folder),
      _matlab_specials(),
    ),
    mutate.Target(
      'lists of birds',
      f'{_WHERE}birds',
      'birds/a.tgz',
      birds,
      _changed_lists(archive, members) | _archives(archive),
    ),
    mutate.Target(
      'tables of boxes',
      f'{_WHERE}boxes',
      'boxes/boxes.csv',
      [mutate.Seed(table)],
      {
        'long': b'x' * 200_000,
        'not unicode': table + b'\xff\xfe',
        'nan': table + b'3.jpg,nan,1,2,3,a\n',
        'infinite': table + b'3.jpg,1e999,1,2,3,a\n',
        'nul': table + b'\0',
        'quotes': table + b'"',
        'empty': b'',
      },
    ),
    mutate.Target(
      'photographs of builders',
      f'{_WHERE}photographs',
      'builders/a.tar',
      [
        mutate.Seed(data, functools.partial(mutate.in_tar, packed, name))
        for name, data in pair
      ],
      {
        what: mutate.in_tar(packed, 'a.jpg', data)
        for what, data in test_hostile_images._specials().items()
        if what in ('postscript', 'empty', 'huge png', 'text bomb')
      },
      mebibytes=1600,
    ),
    _mirrors(folder / 'mirrors'),
  ]


def _parquet(names=('Robin', 'Wren'), **options):
  import pyarrow as pa
  import pyarrow.parquet

  features = {'label': {'names': list(names)}}
  metadata = {'huggingface': json.dumps({'info': {'features': features}})}
  table = pa.table({'image': [b'x', b'y'], 'label': [0, 1]}, metadata=metadata)
  buffer = io.BytesIO()
  pyarrow.parquet.write_table(
    table.replace_schema_metadata(metadata), buffer, **options
  )
  return buffer.getvalue()


def _mirrors(folder):
  folder.mkdir()
  (folder / 'train-0.parquet').write_bytes(_parquet())
  plain = _parquet(compression='none')
  return mutate.Target(
    'Parquet of mirrors',
    f'{_WHERE}mirror',
    'mirrors/test-0.parquet',
    [mutate.Seed(plain), mutate.Seed(_parquet())],
    {
      'names of another kind': plain.replace(b'"Robin"', b'["Rob"]'),
      'features of another kind': plain.replace(b'"label": {', b'"label": ['),
      'empty': b'',
    },
  )
