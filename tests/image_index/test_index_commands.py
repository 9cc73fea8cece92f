"""`cmd-jax index` on folders of drawn photographs."""

import csv
import json
import os
import shutil

import numpy as np
import pytest

import cmd_jax
from cmd_jax.cli import program
from cmd_jax.errors import UserError
from cmd_jax.image_index import store
from tests.stub_encoder import StubEncoder, draw_photograph


@pytest.fixture
def photos(tmp_path):
  folder = tmp_path / 'photos'
  for name, colour in (('red', (220, 40, 40)), ('blue', (40, 60, 220))):
    (folder / name).mkdir(parents=True)
    for i in range(5):
      draw_photograph(i, colour=colour).save(folder / name / f'{i}.png')
  (folder / 'single').mkdir()
  draw_photograph(99).save(folder / 'single' / 'one.png')
  (folder / 'red' / 'torn.jpg').write_bytes(b'junk')
  return folder


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
  """(words of the command line) -> (exit status, out, err), and the encoder."""
  encoder = StubEncoder()
  monkeypatch.setattr(cmd_jax, 'load', lambda source, **kw: call.encoder)
  monkeypatch.chdir(tmp_path)

  def call(action, *flags):
    status = program.run(
      ['index', action, '--index_dir=ix', '--compilation_cache=', *flags]
    )
    captured = capsys.readouterr()
    return status, captured.out, captured.err

  call.encoder = encoder
  return call


@pytest.fixture
def built(call, photos):
  status, out, err = call('build', '--weights=stub', f'--input={photos}')
  assert status == 0 and 'added 11' in out and '1 unreadable' in err
  return call


def _results(path='search.csv'):
  with open(path) as file:
    return list(csv.DictReader(file))


def _error(result):
  status, _, err = result
  assert status == 2
  (line,) = [x for x in err.splitlines() if x.startswith('error: ')]
  return line


def test_images_folders_and_classes_are_searched_for(built, photos, tmp_path):
  before = built.encoder.encoded
  status, out, _ = built('search', '--query=photos/red/0.png', '--top_k=3')
  assert status == 0 and '1    ' in out
  rows = _results()
  assert [row['rank'] for row in rows] == ['1', '2', '3']
  assert {row['class_name'] for row in rows} == {'red'}
  assert 'red/0.png' not in {row['file'] for row in rows}
  status, out, _ = built(
    'search', '--query_class=blue', '--top_k=4', '--output=b/c.csv'
  )
  assert status == 0 and '100.0% of 5 queries' in out
  assert len(_results('b/c.csv')) == 20
  # What is in the index is not encoded again.
  assert built.encoder.encoded == before
  shutil.copytree(photos / 'red', tmp_path / 'other')
  status, out, err = built('search', '--query=other', '--top_k=1')
  assert status == 0 and 'torn.jpg' in err
  assert built.encoder.encoded == before + 5
  names = {row['query']: row['file'] for row in _results()}
  assert names == {
    str(tmp_path / 'other' / f'{i}.png'): f'red/{i}.png' for i in range(5)
  }
  # A class of one image has no other to be found.
  status, out, _ = built('search', '--query_class=single')
  assert status == 0 and 'of its query' not in out


def test_adding_skips_what_is_there_and_notices_the_rest(built, photos):
  before = built.encoder.encoded
  (photos / 'red' / '0.png').unlink()
  changed = photos / 'blue' / '1.png'
  draw_photograph(50, colour=(230, 30, 30)).save(changed)
  os.utime(changed, ns=(1, 1))
  draw_photograph(60, colour=(40, 60, 220)).save(photos / 'blue' / 'new.png')
  status, out, _ = built('add', f'--input={photos}')
  assert status == 0
  assert 'added 2 (of these changed: 1), already there 9, vanished 1' in out
  assert built.encoder.encoded == before + 2
  index = store.open_index(photos.parent / 'ix')
  live = [index.items.names[row] for row in index.items.live]
  assert len(live) == 11 and 'red/0.png' not in live
  vectors = index.vectors()[index.items.live]
  np.testing.assert_allclose(index.items.mean, vectors.mean(0), rtol=1e-5)
  built('search', '--query=photos/blue/1.png', '--top_k=2')
  assert {row['class_name'] for row in _results()} == {'red'}
  # The file is back as it was.
  stamp = index.items.stamps[list(index.items.names).index('red/0.png'), 0]
  draw_photograph(0, colour=(220, 40, 40)).save(photos / 'red' / '0.png')
  os.utime(photos / 'red' / '0.png', ns=(int(stamp), int(stamp)))
  status, out, _ = built('add', f'--input={photos}')
  assert 'added 0' in out and 'ix: 12 images' in out
  assert built.encoder.encoded == before + 2


def test_another_folder_is_named_in_full_and_left_alone(
  built, photos, tmp_path
):
  shutil.copytree(photos / 'blue', tmp_path / 'more' / 'blue')
  status, out, _ = built('add', '--input=more')
  assert status == 0 and 'added 5' in out and 'vanished 0' in out
  shutil.rmtree(tmp_path / 'more' / 'blue')
  draw_photograph(7).save(tmp_path / 'more' / 'x.png')
  _, out, _ = built('add', f'--input={photos}')
  assert 'vanished 0' in out
  _, out, _ = built('add', '--input=more')
  assert 'added 1' in out and 'vanished 5' in out
  shutil.rmtree(tmp_path / 'more')
  assert 'more does not exist' in _error(built('add', '--input=more'))
  index = store.open_index(tmp_path / 'ix')
  assert index.items.names[-1] == str(tmp_path / 'more' / 'x.png')
  assert len(index.items.live) == 12


def test_an_index_keeps_to_its_encoder(built, photos, tmp_path):
  for other, words in (
    (StubEncoder('b' * 64), 'bbbbbbbbbbbb'),
    (StubEncoder(view_px=48), '48 px'),
  ):
    built.encoder = other
    for action, flag in (('add', 'input'), ('search', 'query')):
      shutil.copytree(photos, tmp_path / 'x', dirs_exist_ok=True)
      line = _error(built(action, f'--{flag}=x', '--weights=other'))
      assert 'was made by another encoder (stub' in line and words in line
  assert len(store.open_index(tmp_path / 'ix').items.names) == 11


def test_mistakes_are_told_in_one_line(built, photos, tmp_path):
  (tmp_path / 'empty').mkdir()
  for action, flags, words in (
    ('build', ('--weights=x', f'--input={photos}'), 'is an index already'),
    ('add', (), '--input is missing'),
    ('add', ('--input=empty',), 'has no images'),
    ('add', (f'--input={photos}', '--weights=x', '--workdir=y'), 'one of'),
    ('search', (), 'give one of --query'),
    ('search', ('--query=no.jpg',), 'no.jpg does not exist'),
    ('search', ('--query=photos/red/torn.jpg',), 'none of the 1 images'),
    ('search', ('--query_class=green',), 'choose blue, red, single'),
    ('search', ('--query_class=red', '--top_k=0'), '--top_k is 0'),
    ('search', ('--query_class=red', '--output=x.txt'), 'ends in .csv'),
    ('search', ('--query_class=red', '--index_dir=y'), 'y is no index'),
    ('build', ('--weights=x', '--input=empty', '--index_dir=y'), 'no images'),
    ('build', (f'--input={photos}', '--index_dir=y'), 'one of --workdir'),
    ('build', ('--weights=x', '--input=gone', '--index_dir=y'), 'not exist'),
    ('lose', (), 'build|add|search'),
  ):
    assert words in _error(built(action, *flags)), flags
  assert not (tmp_path / 'y').exists()
  assert len(store.open_index(tmp_path / 'ix').items.live) == 11


def test_only_one_adds_at_a_time(built, photos, tmp_path):
  with store.locked(tmp_path / 'ix'):
    line = _error(built('add', f'--input={photos}'))
  assert 'by another process' in line


def test_what_was_not_finished_is_not_there(built, photos, tmp_path):
  path = tmp_path / 'ix'
  index = store.open_index(path)
  # Vectors that were appended before the program was stopped.
  store.append(index, np.ones((3, index.dim), np.float32))
  assert index.vectors().shape == (11, index.dim)
  draw_photograph(61).save(photos / 'red' / 'new.png')
  built('add', f'--input={photos}')
  again = store.open_index(path)
  np.testing.assert_array_equal(again.vectors()[:11], index.vectors())
  assert again.vectors().shape == (12, index.dim)
  assert again.vectors()[11].max() > 1
  # A build that fails leaves nothing.
  (tmp_path / 'bad').mkdir()
  (tmp_path / 'bad' / 'a.jpg').write_bytes(b'junk')
  flags = ('--weights=x', '--input=bad', '--index_dir=z')
  assert 'none of the 1' in _error(built('build', *flags))
  assert not (tmp_path / 'z').exists()


@pytest.mark.parametrize(
  'change',
  [
    {'rows': 12},
    {'dim': 3},
    {'generation': '../1'},
    {'lists': {'file': '../x', 'rows': 1, 'probes': 1, 'recall': 1}},
    {'encoder': {}},
  ],
)
def test_a_damaged_index_says_so(built, tmp_path, change):
  file = tmp_path / 'ix' / store.MANIFEST
  file.write_text(json.dumps(json.loads(file.read_text()) | change))
  with pytest.raises(UserError, match='damaged'):
    store.open_index(tmp_path / 'ix')


def test_vectors_that_are_cut_short_and_newer_formats(built, tmp_path):
  path = tmp_path / 'ix'
  with open(path / store.VECTORS, 'r+b') as file:
    file.truncate(20)
  line = _error(built('search', '--query_class=red'))
  assert 'does not hold 11 vectors' in line
  file = path / store.MANIFEST
  file.write_text(
    file.read_text().replace('"format_version": 2', '"format_version": 9')
  )
  assert 'newer' in _error(built('search', '--query_class=red'))
