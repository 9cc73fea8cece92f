import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from cmd_jax.data import canvas
from cmd_jax.data.pipeline import lazy
from cmd_jax.data.sources import base, shards
from cmd_jax.errors import UserError

PX = 6


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  return tmp_path / 'cache'


def _png(number):
  buffer = io.BytesIO()
  Image.new('RGB', (8, 9), (number, 2 * number, 0)).save(buffer, 'PNG')
  return buffer.getvalue()


def _write(path, files):
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, 'w') as tar:
    for name, content in files.items():
      member = tarfile.TarInfo(name)
      member.size = len(content)
      tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def birds(tmp_path):
  """Two shards of training images and one of test images."""
  for shard in range(2):
    files = {}
    for number in range(3 * shard, 3 * shard + 3):
      name = ('wren', 'robin')[number % 2]
      files[f'a.b/{number:04d}.png'] = _png(number)
      files[f'a.b/{number:04d}.json'] = json.dumps({'label': name}).encode()
    _write(tmp_path / f'train-{shard:02d}.tar', files)
  _write(
    tmp_path / 'test-00.tar',
    {'x.cls': b'tit\n', 'x.seg.jpg': _png(9), '.hidden.jpg': b'', 'y.JPG': b''},
  )
  return tmp_path


def test_images_are_read_from_anywhere_in_the_shards(birds):
  every = f'{birds}/train-*.tar {birds}/test-*.tar'
  train = shards.shards_source(f'{birds}/train-{{00..01}}.tar', every)
  assert train.class_names == ('robin', 'tit', 'wren')
  assert train.labels.tolist() == [2, 0, 2, 0, 2, 0]
  assert train.file_names[4] == 'train-01.tar/a.b/0004.png'
  train = pickle.loads(pickle.dumps(train))
  made = lazy.lazy_canvases(train, canvas_px=PX)
  np.testing.assert_array_equal(
    made.images[[5, 0, 3]][:, 0, 0], [(5, 10, 0), (0, 0, 0), (3, 6, 0)]
  )
  test = shards.shards_source(f'file://{birds}/test-00.tar', every)
  assert test.class_names == train.class_names
  assert test.labels.tolist() == [1, base.UNLABELLED]
  made = canvas.make_canvases(test, canvas_px=PX)
  assert made.file_names == ('test-00.tar/x.seg.jpg',)
  assert [skipped.file_name for skipped in made.skipped] == [
    'test-00.tar/y.jpg'
  ]


def test_integers_are_classes_in_their_order(tmp_path):
  files = {f'{n}.png': _png(n) for n in (10, 9)}
  files |= {'10.cls': b'10', '9.cls': b'9'}
  _write(tmp_path / 'a.tar', dict(sorted(files.items())))
  found = shards.shards_source(str(tmp_path / 'a.tar'))
  assert found.class_names == ('9', '10')
  assert dict(zip(found.file_names, found.labels.tolist())) == {
    'a.tar/10.png': 1,
    'a.tar/9.png': 0,
  }


def test_shards_are_listed_once_until_one_changes(birds, cache, monkeypatch):
  pattern, listed = f'{birds}/train-*.tar', []
  list_shard = shards._list_shard
  monkeypatch.setattr(
    shards,
    '_list_shard',
    lambda *args: listed.append(args[1]) or list_shard(*args),
  )
  first = shards.shards_source(pattern)
  assert len(listed) == 2
  assert shards.shards_source(pattern).file_names == first.file_names
  assert len(listed) == 2
  _write(birds / 'train-01.tar', {f'{n}.png': _png(n) for n in range(30)})
  assert len(shards.shards_source(pattern).file_names) == 33
  assert len(listed) == 4
  assert len(list(cache.rglob('*.npz'))) == 1


def test_shards_of_one_name_have_names_of_their_own(tmp_path):
  for folder in ('a', 'b'):
    _write(tmp_path / folder / '0.tar', {'1.png': _png(1)})
  found = shards.shards_source(f'{tmp_path}/*/0.tar')
  assert len(set(found.file_names)) == 2


def test_no_pattern_is_no_test_set():
  found = shards.shards_source('')
  assert not found.file_names and not found.class_names


def test_unusable_shards_are_told(tmp_path):
  with pytest.raises(UserError, match='no shards match .*config.dataset.train'):
    shards.shards_source(f'{tmp_path}/*.tar')
  with pytest.raises(UserError, match='cannot look for the shards nowhere:'):
    shards.shards_source('nowhere://bucket/a.tar')
  (tmp_path / 'torn.tar').write_bytes(b'no tar' * 200)
  with pytest.raises(UserError, match='torn.tar cannot be listed'):
    shards.shards_source(f'{tmp_path}/torn.tar')
  _write(tmp_path / 'odd.tar', {'a.json': b'3', 'a.png': _png(1)})
  with pytest.raises(UserError, match='odd.tar cannot be listed.*no object'):
    shards.shards_source(f'{tmp_path}/odd.tar')
  _write(tmp_path / 'empty.tar', {'readme.md': b'nothing here'})
  with pytest.raises(UserError, match='empty.tar has no images'):
    shards.shards_source(f'{tmp_path}/empty.tar')


def test_a_shard_of_a_range_that_is_not_there_is_told(birds):
  with pytest.raises(UserError, match=r'train-02.tar does not exist, but'):
    shards.shards_source(f'{birds}/train-{{00..02}}.tar')


@pytest.mark.parametrize('members', [1, 2])
def test_a_shard_cut_between_members_is_told(tmp_path, members):
  path = tmp_path / 'cut.tar'
  _write(path, {f'{number}.png': _png(number) for number in range(3)})
  with tarfile.open(path) as tar:
    end = tar.getmembers()[members].offset
  # Right before a member, and within its header.
  whole = path.read_bytes()
  for cut in (end, end + 100):
    path.write_bytes(whole[:cut])
    with pytest.raises(UserError, match='cut.tar cannot be listed.*whole tar'):
      shards.shards_source(str(path))


def _labelled(tmp_path, files):
  """{name in the shard: class or ''} and the notes."""
  _write(tmp_path / 'a.tar', files)
  found = shards.shards_source(str(tmp_path / 'a.tar'))
  names = {
    name.removeprefix('a.tar/'): found.class_names[label] if label >= 0 else ''
    for name, label in zip(found.file_names, found.labels.tolist())
  }
  assert len(names) == len(found.file_names)
  return names, found.notes


def _images(*names):
  return {name: _png(number) for number, name in enumerate(names)}


def test_a_mask_beside_an_image_is_no_image(tmp_path):
  files = {}
  for n in ('000', 'b/001'):
    files |= _images(f'{n}.depth.tiff', f'{n}.jpg', f'{n}.seg.png')
    files[f'{n}.cls'] = n[-1:].encode()
    # No label either, and no object: not looked at.
    files[f'{n}.boxes.json'] = b'[1, 2]'
  names, (note,) = _labelled(tmp_path, files)
  assert names == {'000.jpg': '0', 'b/001.jpg': '1'}
  assert note.startswith('4 files of the shards are no images of their own')


def test_of_a_jpg_and_a_png_the_first_is_the_image(tmp_path):
  files = {**_images('0.png', '0.jpg'), '0.cls': b'wren'}
  names, (note,) = _labelled(tmp_path, files)
  assert names == {'0.jpg': 'wren'}
  assert note.startswith('1 files')


def test_dots_in_names_keep_their_labels(tmp_path):
  files = {
    **_images('a v1.5.jpg', 'a v1.6.JPG', 'dr. who.png', 'v.final.png'),
    **{'a v1.5.cls': b'x', 'a v1.6.txt': b'y', 'dr. who.json': b'{"label": 3}'},
    'v.final.cls': b'z',
    **_images('2020.01.02.png', '2020.01.03.png'),
  }
  names, notes = _labelled(tmp_path, files)
  assert names == {
    'a v1.5.jpg': 'x',
    'a v1.6.jpg': 'y',
    'dr. who.png': '3',
    'v.final.png': 'z',
    '2020.01.02.png': '',
    '2020.01.03.png': '',
  }
  assert not notes


def test_a_short_name_is_no_part_of_a_longer_one(tmp_path):
  files = _images('a v1.jpg', 'a v1.5.jpg')
  names, notes = _labelled(tmp_path, files)
  assert len(names) == 2 and not notes
  files |= {'a v1.cls': b'x', 'a v1.5.cls': b'y'}
  assert _labelled(tmp_path, files) == (
    {'a v1.jpg': 'x', 'a v1.5.jpg': 'y'},
    (),
  )


def test_images_before_all_labels_keep_them(tmp_path):
  names = [f'{n:03d}' for n in range(5)]
  files = _images(*(f'{n}.jpg' for n in names))
  files |= {f'{n}.cls': n.encode() for n in reversed(names)}
  expected = {f'{n}.jpg': n for n in names}
  assert _labelled(tmp_path, files) == (expected, ())
  # And the other way round, as tools that sort by extension write them.
  files = dict(sorted(files.items(), key=lambda x: x[0][-3:]))
  assert _labelled(tmp_path, files) == (expected, ())


def test_what_is_left_out_is_told_with_numbers(tmp_path):
  files = {
    **_images('0.left.jpg', '0.right.jpg', '1.jpg', '2.only.jpg'),
    **{'0.cls': b'x', '1.cls': b'y', '2.cls': b'z', 'labels/1.cls': b'w'},
  }
  names, (unsure, lone) = _labelled(tmp_path, files)
  assert names == {'1.jpg': 'y', '2.only.jpg': 'z'}
  assert unsure.startswith('2 images of the shards are left out')
  # That of the two, and that of another folder.
  assert lone.startswith('2 labels of the shards belong to no image')
  # Kept with the listing.
  source = shards.shards_source(str(tmp_path / 'a.tar'))
  assert source.notes == (unsure, lone)


def test_a_shard_of_unclear_images_alone_says_why(tmp_path):
  _write(tmp_path / 'a.tar', _images('0.left.jpg', '0.right.jpg'))
  with pytest.raises(UserError, match='has no images .2 images of the shards'):
    shards.shards_source(str(tmp_path / 'a.tar'))


def test_a_file_written_twice_counts_once(tmp_path):
  with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
    for number in (1, 2):
      member = tarfile.TarInfo('0.png')
      member.size = len(_png(number))
      tar.addfile(member, io.BytesIO(_png(number)))
  source = shards.shards_source(str(tmp_path / 'a.tar'))
  assert len(source.file_names) == 1
  assert source.load(0).image.getpixel((0, 0)) == (2, 4, 0)
  assert source.notes[0].startswith('1 images of the shards are left out: a')
