import logging
import pickle

import numpy as np
import pytest

from cmd_jax.data.sources import folder, index

NAMES = ('a/1.jpg', 'a/ü\n2.jpg', '', 'b/\udcff.png', '鳥.jpg')
KEY = {'folder': '/birds', 'seed': 0}


def test_names_are_a_sequence_of_strings():
  names = index.Names.of(NAMES)
  assert list(names) == list(NAMES)
  assert names == NAMES and NAMES == names
  assert names != NAMES[:4] and names != (*NAMES[:4], 'x')
  assert (names[1], names[-1], names[1:4:2]) == (
    NAMES[1],
    NAMES[4],
    NAMES[1:4:2],
  )
  with pytest.raises(IndexError):
    names[5]
  some = pickle.loads(pickle.dumps(names.take(np.array([4, 3, 0]))))
  assert some == (NAMES[4], NAMES[3], NAMES[0])
  assert some.take(np.array([1])) == (NAMES[3],)
  assert not index.Names.of(())
  assert list(index.Names.of(map(str, range(9999)))) == [
    str(i) for i in range(9999)
  ]


def test_an_index_is_read_back_for_its_own_key(tmp_path):
  path = tmp_path / 'new' / 'index.npz'
  assert index.read_index(path, KEY) is None
  index.write_index(path, KEY, labels=np.arange(4))
  kept = index.read_index(path, KEY)
  assert list(kept) == ['labels'] and kept['labels'].tolist() == [0, 1, 2, 3]
  assert index.read_index(path, {**KEY, 'seed': 1}) is None


def test_a_damaged_index_is_none_and_told_in_one_line(tmp_path, caplog):
  path = tmp_path / 'index.npz'
  index.write_index(path, KEY, labels=np.arange(4000))
  whole = path.read_bytes()
  middle = len(whole) // 2
  flipped = whole[:middle] + b'damaged' + whole[middle + 7 :]
  for content in (whole[:-100], flipped, b'', b'no index', whole[:4]):
    caplog.clear()
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
      assert index.read_index(path, KEY) is None
    assert len(caplog.messages) == 1 and str(path) in caplog.messages[0]


def test_an_index_that_cannot_be_kept_is_told(tmp_path, caplog):
  (tmp_path / 'file').touch()
  index.write_index(tmp_path / 'file' / 'index.npz', KEY, x=np.zeros(1))
  assert 'not kept' in caplog.text


def test_names_in_the_users_cache(monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  path = index.default_path(KEY)
  assert path.is_relative_to(tmp_path / 'cmd_jax')
  assert path != index.default_path({**KEY, 'seed': 1})


@pytest.fixture
def scans(monkeypatch):
  """Folders scanned; every folder is large and old enough to be indexed."""
  scanned, scan = [], folder._scan
  monkeypatch.setattr(folder, '_LEAST_INDEXED', 1)
  monkeypatch.setattr(folder, '_CLOCK_TICK_NS', -(10**12))

  def note(root):
    scanned.append(root)
    return scan(root)

  monkeypatch.setattr(folder, '_scan', note)
  return scanned


def test_a_folder_is_listed_once_until_something_changes(
  tmp_path, scans, caplog
):
  root, kept = tmp_path / 'birds', tmp_path / 'index.npz'
  for name in ('robin/1.jpg', 'robin/2.jpg', 'wren/\udcff.jpg', 'wren/4\n.jpg'):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).touch()

  def listed(split='pretrain', **options):
    return folder.folder_source(
      str(root), split, index_file=str(kept), **options
    )

  def check(*numbers):
    """Lists both splits as a folder without index and counts the scans."""
    scans.clear()
    for split in ('pretrain', 'test'):
      ours = listed(split)
      theirs = folder.folder_source(
        str(root), split, index_file=str(tmp_path / f'none{len(scans)}.npz')
      )
      assert ours.file_names == theirs.file_names
      assert ours.class_names == theirs.class_names
      np.testing.assert_array_equal(ours.labels, theirs.labels)
    for path in tmp_path.glob('none*.npz'):
      path.unlink()
    # Two scans without an index, the others with.
    assert len(scans) - 2 in numbers

  check(1)
  check(0)
  (root / 'wren' / '5.jpg').touch()
  check(1)
  (root / 'robin' / '1.jpg').unlink()
  check(1)
  (root / 'tit').mkdir()
  check(1)
  (root / 'labels.csv').write_text('file,class_name\nrobin/2.jpg,robin\n')
  check(1)
  (root / 'labels.csv').write_text('file,class_name\nwren/5.jpg,wren\n')
  check(1)
  check(0)
  kept.write_bytes(kept.read_bytes()[:-50])
  check(1)
  assert 'damaged and made anew' in caplog.text
  # Other options are another listing.
  scans.clear()
  listed(test_fraction=0.5)
  assert len(scans) == 1


def test_a_folder_that_may_be_changing_is_not_indexed(
  tmp_path, scans, monkeypatch
):
  monkeypatch.setattr(folder, '_CLOCK_TICK_NS', 2 * 10**9)
  (tmp_path / 'birds').mkdir()
  (tmp_path / 'birds' / '1.jpg').touch()
  path = tmp_path / 'index.npz'
  folder.folder_source(
    str(tmp_path / 'birds'), 'pretrain', index_file=str(path)
  )
  assert not path.exists()
