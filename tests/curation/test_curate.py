"""A folder of drawn photographs, with mistakes in it, and what is written."""

import csv
import io
import json
import shutil
import urllib.parse
from xml.etree import ElementTree

import pytest
from PIL import ImageOps

import cmd_jax
from cmd_jax.cli import program
from cmd_jax.report.curated import read_curated
from cmd_jax.rundir.workdir import Workdir
from tests.stub_encoder import StubEncoder, draw_photograph

_RED, _BLUE = (220, 40, 40), (40, 60, 220)


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  folder = tmp_path_factory.mktemp('curate') / 'photos'
  for name, colour in (('red', _RED), ('blue', _BLUE)):
    (folder / name).mkdir(parents=True)
    for i in range(12):
      seed = 100 * (name == 'red') + i
      draw_photograph(seed, colour=colour).save(folder / name / f'{i:02}.png')
  shutil.copy(folder / 'red' / '00.png', folder / 'red' / 'copy.png')
  whole = draw_photograph(101, colour=_RED)
  ImageOps.mirror(whole).save(folder / 'red' / 'mirrored.png')
  draw_photograph(102, colour=_RED).crop((8, 12, 92, 96)).save(
    folder / 'red' / 'crop.png'
  )
  # A red one among the blue, and the very same under both names.
  draw_photograph(150, colour=_RED).save(folder / 'blue' / 'wrong.png')
  shutil.copy(folder / 'blue' / '03.png', folder / 'red' / 'also blue.png')
  (folder / 'red' / 'torn.jpg').write_bytes(b'\xff\xd8 junk')
  (folder / 'alone').mkdir()
  draw_photograph(999, colour=(30, 230, 30)).save(folder / 'alone' / 'x.png')
  return folder


@pytest.fixture
def curate(monkeypatch, capsys, photos):
  """(flags) -> (exit status, what it says, what it says of errors)."""
  monkeypatch.setattr(cmd_jax, 'load', lambda *args, **kw: StubEncoder())

  def curate(output, *flags, folder=photos):
    status = program.run(
      [
        'curate',
        '--weights=stub',
        f'--input={folder}',
        f'--output={output}',
        '--compilation_cache=',
        *flags,
      ]
    )
    captured = capsys.readouterr()
    return status, captured.out, captured.err

  return curate


@pytest.fixture
def written(curate, tmp_path, photos):
  before = _state(photos)
  status, out, _ = curate(tmp_path / 'out', '--select=3', '--alike_from=0.999')
  assert status == 0, out
  assert _state(photos) == before
  assert not [x for x in tmp_path.iterdir() if x.name != 'out']
  return tmp_path / 'out', out


def _state(folder):
  return {
    str(path): (path.stat().st_mtime_ns, path.read_bytes())
    for path in folder.rglob('*')
    if path.is_file()
  }


def _rows(folder):
  text = (folder / 'curate.csv').read_text()
  return {row['file']: row for row in csv.DictReader(io.StringIO(text))}


def test_mistakes_are_found(written):
  folder, out = written
  rows = _rows(folder)
  assert len(rows) == 30
  kinds = {
    name: (row['duplicate_of'], row['duplicate_kind'])
    for name, row in rows.items()
    if row['duplicate_kind'] not in ('', 'alike')
  }
  # Of two with as many pixels the first is kept.
  assert kinds == {
    'red/copy.png': ('red/00.png', 'copy'),
    'red/mirrored.png': ('red/01.png', 'mirrored'),
    'red/crop.png': ('red/02.png', 'crop'),
    'red/also blue.png': ('blue/03.png', 'copy'),
  }
  assert rows['blue/wrong.png']['suggested_class'] == 'red'
  assert float(rows['blue/wrong.png']['suspicion']) > 0.5
  assert rows['red/also blue.png']['same_photograph_called'] == 'blue'
  assert rows['blue/03.png']['same_photograph_called'] == 'red'
  assert rows['alone/x.png']['suggested_class'] == ''
  assert 'torn.jpg: not an image' in out
  assert 'class(es) with one image cannot be judged, the first is alone' in out
  chosen = sorted(r['select_rank'] for r in rows.values() if r['select_rank'])
  assert chosen == ['1', '2', '3']


def test_other_programs_can_read_it(written, photos):
  folder, _ = written
  rows = _rows(folder)
  coco = json.loads((folder / 'coco.json').read_text())
  names = {x['id']: x['name'] for x in coco['categories']}
  images = {x['id']: x for x in coco['images']}
  assert len(images) == len(coco['annotations']) == len(rows)
  for entry in coco['annotations']:
    row = rows[images[entry['image_id']]['file_name']]
    assert names[entry['category_id']] == row['class_name']
    assert entry['bbox'] == [0, 0, int(row['width']), int(row['height'])]
  places, labels = (
    json.loads((folder / 'fiftyone' / name).read_text())
    for name in ('data.json', 'labels.json')
  )
  assert places.keys() == labels['labels'].keys() and len(places) == len(rows)
  for key, label in labels['labels'].items():
    name = label['attributes']['file']
    assert places[key] == str(photos / name)
    assert label['label'] == rows[name]['class_name']
  tasks = json.loads((folder / 'label_studio' / 'tasks.json').read_text())
  assert [t['data']['reason'] for t in tasks[:3]] == ['label first'] * 3
  by_file = {t['data']['file']: t for t in tasks}
  assert {'blue/wrong.png', 'red/also blue.png', 'blue/03.png'} <= set(by_file)
  address = by_file['red/also blue.png']['data']['image']
  path = urllib.parse.unquote(address.removeprefix('/data/local-files/?d='))
  assert (photos.parent / path).is_file() and ' ' not in address
  (guess,) = by_file['blue/wrong.png']['predictions']
  interface = ElementTree.parse(folder / 'label_studio' / 'labels.xml')
  choices = [x.get('value') for x in interface.iter('Choice')]
  assert choices == ['alone', 'blue', 'red']
  assert guess['result'][0]['value'] == {'choices': ['red']}


def test_the_page_holds_the_photographs_and_asks_for_nothing(written):
  folder, _ = written
  html = (folder / 'curate.html').read_text()
  data = json.loads(html.partition('id="data">')[2].partition('</script>')[0])
  names = data['photos']['names']
  assert all(data['photos']['thumbnails'])
  (suspect,) = [
    x for x in data['suspects'] if names[x['photo']] == 'blue/wrong.png'
  ]
  classes = [data['photos']['classes'][i] for i in suspect['neighbours']]
  assert suspect['suggested'] == 'red' and set(classes) == {'red'}
  first = data['groups'][0]
  assert first['differs'] and first['kinds'][0] == ''
  assert data['counts']['unreadable'] == 1 and len(data['selected']) == 3
  assert 'http' not in html.replace('http-equiv', '').replace(
    'http://www.w3.org/2000/svg', ''
  )


def test_a_flat_folder_has_no_labels_to_judge(curate, tmp_path):
  flat = tmp_path / 'flat'
  flat.mkdir()
  for i in range(4):
    draw_photograph(i).save(flat / f'{i}.png')
  status, out, _ = curate(
    tmp_path / 'out', '--select=9', '--report_images=2', folder=flat
  )
  assert status == 0 and 'There are no labels' in out
  assert '9 images to label were asked for and 4' in out
  html = (tmp_path / 'out' / 'curate.html').read_text()
  assert (
    html.count('.png')
    and json.loads((tmp_path / 'out' / 'coco.json').read_text())['annotations']
    == []
  )


def test_mistakes_are_told_in_one_line_and_nothing_is_lost(
  curate, tmp_path, photos
):
  taken = tmp_path / 'taken'
  taken.mkdir()
  (taken / 'mine.txt').write_text('mine')
  empty = tmp_path / 'empty'
  empty.mkdir()
  torn = tmp_path / 'torn'
  torn.mkdir()
  (torn / 'a.jpg').write_bytes(b'junk')
  one = tmp_path / 'one'
  one.mkdir()
  draw_photograph(0).save(one / 'a.png')
  out = tmp_path / 'out'
  for output, flags, folder, words in (
    (taken, (), photos, 'is there already'),
    (photos / 'out', (), photos, 'is within --input'),
    (out, (), tmp_path / 'gone', 'gone does not exist'),
    (out, (), empty, 'has no images'),
    (out, (), torn, 'none of the 1 images can be read'),
    (out, (), one, 'has one readable image'),
    (out, ('--select=-1',), photos, '--select is -1'),
    (out, ('--alike_from=1.5',), photos, '--alike_from is 1.5'),
    (out, ('--alike_from=much',), photos, 'give a number'),
  ):
    status, _, err = curate(output, *flags, folder=folder)
    assert status == 2
    (line,) = [x for x in err.splitlines() if x.startswith('error: ')]
    assert words in line
  assert [x.name for x in taken.iterdir()] == ['mine.txt']
  assert not out.exists()


def test_nothing_half_written_is_left(curate, tmp_path, monkeypatch):
  from cmd_jax.curation import run

  def fail(path, content):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(run, 'write_atomically', fail)
  status, _, err = curate(tmp_path / 'out')
  assert status == 2 and 'No space left on device' in err
  assert not list(tmp_path.iterdir())


def test_a_run_is_curated_where_its_page_looks(
  monkeypatch, capsys, photos, tmp_path
):
  monkeypatch.setattr(cmd_jax, 'load', lambda *args, **kw: StubEncoder())
  config = {'dataset': {'source': 'folder', 'path': str(photos)}}
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(config))
  command = [
    'curate',
    f'--workdir={tmp_path / "run"}',
    '--alike_from=0.999',
    '--compilation_cache=',
  ]
  assert program.run(command) == 0, capsys.readouterr().err
  found = read_curated(Workdir(str(tmp_path / 'run')))
  rows = _rows(tmp_path / 'run' / 'curated')
  assert found['counts']['images'] == len(rows)
  assert found['counts']['duplicates'] == sum(
    bool(row['duplicate_of']) for row in rows.values()
  )
  # The very same photograph under both names comes first.
  assert {x['file'] for x in found['suspects'][:2]} == {
    'red/also blue.png',
    'blue/03.png',
  }
