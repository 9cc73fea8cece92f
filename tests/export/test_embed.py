"""Folders of images as tables of embeddings, looked up and grouped."""

import contextlib
import csv
import io
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import cmd_jax
from cmd_jax.cli import program
from cmd_jax.errors import UserError
from cmd_jax.export import embed, folders
from cmd_jax.export.images import embed_folder, list_images
from tests import saved_runs

pq = pytest.importorskip('pyarrow.parquet')

_REPO = pathlib.Path(__file__).resolve().parents[2]
# As a photographer names them.
_NAMES = ('a b/ä.png', 'c\nd.PNG', 'e.png', 'a b/z.jpg')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  path = tmp_path_factory.mktemp('embed') / 'run'
  saved_runs.make_run(path, 'dino')
  return path


@pytest.fixture(scope='module')
def encoder(run):
  return cmd_jax.load(run)


@pytest.fixture
def photos(tmp_path):
  folder = tmp_path / 'photos'
  saved_runs.write_images(folder, _NAMES)
  (folder / 'torn.jpg').write_bytes(b'\xff\xd8\xff junk')
  (folder / 'notes.txt').write_text('no image')
  (folder / '.hidden').mkdir()
  Image.new('RGB', (9, 9)).save(folder / '.hidden' / 'x.png')
  (folder / 'loop').symlink_to(folder)
  return folder


def test_every_image_is_embedded_or_reported(encoder, photos, capsys):
  assert list_images(photos) == sorted([*_NAMES, 'torn.jpg'])
  # Pictures of a run and thumbnails are no photographs of the folder.
  (photos / 'run' / 'checkpoints').mkdir(parents=True)
  (photos / 'run' / 'config.json').write_text('{}')
  (photos / 'a b' / '@eaDir').mkdir()
  for name in ('run/neighbours.png', 'a b/@eaDir/z.jpg'):
    (photos / name).write_bytes((photos / 'e.png').read_bytes())
  assert list_images(photos) == sorted([*_NAMES, 'torn.jpg'])
  told = capsys.readouterr().err
  assert 'runs: run\n' in told and 'storage system: a b/@eaDir\n' in told
  got = embed_folder(encoder, photos, progress=False)
  assert list(got.file_names) == sorted(_NAMES)
  want = encoder.embed([photos / name for name in sorted(_NAMES)])
  np.testing.assert_allclose(got.vectors, want, atol=1e-5)
  assert [item.file_name for item in got.skipped] == ['torn.jpg']


@pytest.mark.parametrize('suffix', ['.npz', '.parquet'])
def test_tables_say_what_made_them_and_come_back(
  encoder, photos, tmp_path, suffix
):
  made = embed_folder(encoder, photos, progress=False)
  path = tmp_path / 'out' / f'table{suffix}'
  embed.save_embeddings(path, encoder, made)
  back = embed.load_embeddings(path, encoder)
  assert back.file_names == made.file_names and back.skipped == made.skipped
  np.testing.assert_array_equal(back.vectors, made.vectors)
  assert back.folder == photos
  if suffix == '.npz':
    with np.load(path) as file:
      assert str(file['encoder_sha256']) == encoder.hash
      preprocessing = str(file['preprocessing'])
  else:
    table = pq.read_table(path)
    assert table.column_names == ['file_name', 'embedding']
    assert table.schema.metadata[b'encoder_sha256'].decode() == encoder.hash
    preprocessing = table.schema.metadata[b'preprocessing']
  assert json.loads(preprocessing) == encoder.preprocessing


def test_names_that_are_no_unicode_are_kept(encoder, tmp_path):
  name = os.fsdecode(b'caf\xe9.png')
  try:
    saved_runs.write_images(tmp_path / 'photos', [name])
  except OSError:
    pytest.skip('this file system has Unicode names alone')
  made = embed_folder(encoder, tmp_path / 'photos', progress=False)
  embed.save_embeddings(tmp_path / 'x.npz', encoder, made)
  assert embed.load_embeddings(tmp_path / 'x.npz', encoder).file_names == (
    name,
  )
  embed.save_embeddings(tmp_path / 'x.parquet', encoder, made)
  (got,) = pq.read_table(tmp_path / 'x.parquet')['file_name'].to_pylist()
  assert got == 'caf\\xe9.png'


def test_tables_of_another_encoder_are_refused(encoder, photos, tmp_path, run):
  made = embed_folder(encoder, photos, progress=False)
  path = tmp_path / 'x.npz'
  embed.save_embeddings(path, encoder, made)
  student = cmd_jax.load(run, network='student')
  with pytest.raises(UserError, match='made by another encoder .teacher of'):
    embed.load_embeddings(path, student)


@pytest.mark.parametrize('suffix', ['.npz', '.parquet'])
def test_tables_that_are_none_are_refused(encoder, tmp_path, suffix):
  path = tmp_path / f'x{suffix}'
  path.write_bytes(b'junk' * 20)
  with pytest.raises(UserError, match='cannot be read') as caught:
    embed.load_embeddings(path, encoder)
  assert '\n' not in str(caught.value)


def test_a_folder_is_embedded_searched_and_grouped(run, photos, tmp_path):
  table = tmp_path / 'out' / 'x.parquet'
  said = folders.run(
    'embed', folders.Request(str(run), str(photos), output=table)
  )
  assert said == f'{table}: 4 embeddings of 16 features'
  query = str(photos / 'e.png')
  request = folders.Request(
    str(run), str(table), tmp_path / 'search.csv', query, top_k=2
  )
  said = folders.run('search', request)
  assert 'e.png' not in said.splitlines()[1]
  elsewhere = tmp_path / 'copy.png'
  elsewhere.write_bytes((photos / 'e.png').read_bytes())
  request = request._replace(query=str(elsewhere))
  said = folders.run('search', request)
  # Another file is a result, even of the same content.
  assert said.splitlines()[1].split() == ['1', '1.000', '1.000', 'e.png']
  with open(tmp_path / 'search.csv', encoding='utf-8', newline='') as file:
    rows = list(csv.DictReader(file))
  assert [row['rank'] for row in rows] == ['1', '2']
  assert rows[0]['file'] == 'e.png'
  with Image.open(tmp_path / 'search_images.png') as picture:
    assert picture.size[0] > 300
  request = folders.Request(
    str(run), str(photos), tmp_path / 'groups', num_clusters=2
  )
  assert folders.run('cluster', request).endswith(
    ': 2 groups, 0 images in none'
  )
  links = sorted((tmp_path / 'groups').glob('cluster_*/*'))
  assert len(links) == 4
  assert {link.resolve() for link in links} == {
    photos.resolve() / name for name in _NAMES
  }


@pytest.mark.parametrize(
  'mode, changes, words',
  [
    ('embed', {'input': ''}, '--input is missing'),
    ('embed', {'input': 'none'}, 'none does not exist'),
    ('embed', {'input': 'empty'}, 'empty has no images'),
    ('embed', {'output': 'x.csv'}, 'ends in .parquet or .npz'),
    ('search', {}, '--query is missing'),
    ('search', {'query': 'photos/notes.txt'}, 'not an image'),
    ('search', {'query': 'photos/e.png', 'top_k': 0}, '--top_k is 0'),
    ('cluster', {'output': 'photos'}, 'is there already'),
    ('cluster', {'num_clusters': 9}, 'at most the number of images, 5'),
    ('cluster', {'min_cluster_size': 1}, '--min_cluster_size is 1'),
    ('cluster', {'num_clusters': -1}, '--num_clusters is -1'),
    ('search', {'query': 'photos/e.png', 'output': 'x.png'}, 'ends in .csv'),
    (
      'search',
      {'query': 'photos/e.png', 'input': 'photos/e.png'},
      '--input is photos/e.png',
    ),
    ('embed', {'input': 'empty.npz'}, 'empty.npz cannot be read'),
  ],
)
def test_what_cannot_be_is_one_line(
  run, photos, tmp_path, monkeypatch, mode, changes, words
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'empty.npz').touch()
  output = {'embed': 'x.npz', 'search': 'x.csv', 'cluster': 'x'}[mode]
  fields = dict(source=str(run), input='photos', output=output) | changes
  fields['output'] = pathlib.Path(fields['output'])
  with pytest.raises(UserError, match=words) as caught:
    folders.run(mode, folders.Request(**fields))
  assert '\n' not in str(caught.value)
  assert not (tmp_path / output).exists()


@pytest.mark.parametrize(
  'mode, changes, missing, words',
  [
    ('embed', {'output': 'x.parquet'}, 'pyarrow', r'cmd_jax\[parquet\]'),
    ('search', {'index': 'faiss'}, 'faiss', r'cmd_jax\[faiss\]'),
    ('cluster', {}, 'sklearn', r'cmd_jax\[cluster\]'),
    ('embed', {'output': '/proc/nope/x.npz'}, '', 'cannot be written'),
    ('search', {'output': 'photos/e.png/x.csv'}, '', 'cannot be written'),
    ('cluster', {'output': '/proc/nope/x'}, '', 'cannot be written'),
    ('embed', {'output': 'a_folder.npz'}, '', 'is a folder'),
    ('cluster', {'num_clusters': 5000}, '', 'at most the number of images, 5'),
    ('search', {'query': 'gone.png'}, '', '--query=gone.png is no file'),
  ],
)
def test_what_can_be_known_is_told_before_an_image_is_embedded(
  photos, tmp_path, run, monkeypatch, mode, changes, missing, words
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'a_folder.npz').mkdir()
  if missing:
    monkeypatch.setitem(sys.modules, missing, None)

  def fail(*_, **__):
    raise AssertionError('an image is embedded')

  monkeypatch.setattr(folders, 'embed_folder', fail)
  output = {'embed': 'x.npz', 'search': 'x.csv', 'cluster': 'x'}[mode]
  fields = dict(source=str(run), input='photos', output=output)
  if mode == 'search':
    fields['query'] = 'photos/e.png'
  fields |= changes
  fields['output'] = pathlib.Path(fields['output'])
  with pytest.raises(UserError, match=words):
    folders.run(mode, folders.Request(**fields))


def test_the_program_needs_no_config(run, photos, tmp_path, capsys):
  shared = ('--compilation_cache=', f'--workdir={run}', f'--input={photos}')
  found = program.run(
    [
      'search',
      *shared,
      f'--query={photos / "e.png"}',
      f'--output={tmp_path / "x.csv"}',
    ]
  )
  captured = capsys.readouterr()
  assert found == 0, captured.err
  assert len(captured.out.splitlines()) == 11
  assert 'e.png is in --input and is not a result' in captured.err
  assert '1 unreadable image(s) skipped' in captured.err
  assert (tmp_path / 'x_images.png').is_file()
  written = program.run(['embed', *shared, f'--output={tmp_path / "x.npz"}'])
  assert written == 0, capsys.readouterr().err


def _run_on(encoding, argv):
  """Runs the program on a terminal; its exit status and what is shown."""
  buffer = io.BytesIO()
  out, err = (
    io.TextIOWrapper(buffer, encoding, errors, write_through=True)
    for errors in ('strict', 'backslashreplace')
  )
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = program.run(argv)
  return code, buffer.getvalue().decode(encoding)


# Of Chinese, what latin-1 has, broken Unicode, and what a terminal obeys.
_ODD = ('鸟/ä.png', 'b\x1b[31m.png', os.fsdecode(b'caf\xe9.png'))


@pytest.fixture
def odd(tmp_path):
  folder = tmp_path / 'vögel 鸟'
  saved_runs.write_images(folder, _ODD)
  (folder / 'ö鸟.jpg').write_bytes(b'torn')
  return folder


@pytest.mark.parametrize('encoding', ['ascii', 'latin-1', 'utf-8'])
@pytest.mark.parametrize('command', ['embed', 'search', 'cluster', 'inspect'])
def test_a_terminal_that_is_not_utf8(run, odd, tmp_path, encoding, command):
  output = {'embed': 'ö鸟.parquet', 'search': 'ö鸟.csv', 'cluster': 'ö鸟'}
  if command == 'inspect':
    argv = ['inspect', '--config=folder', f'--config.dataset.path={odd}']
  else:
    argv = [
      *(command, f'--workdir={run}', f'--input={odd}', '--compilation_cache='),
      f'--output={tmp_path / output[command]}',
    ]
    argv += {
      'search': [f'--query={odd / _ODD[0]}'],
      'cluster': ['--num_clusters=2'],
    }.get(command, [])
  code, shown = _run_on(encoding, argv)
  assert code == 0, shown
  assert 'Traceback' not in shown and '\x1b[31m' not in shown
  if command in ('search', 'inspect'):
    assert ('鸟' if encoding == 'utf-8' else '\\u9e1f') in shown
  if command != 'inspect':
    assert (tmp_path / output[command]).exists()


def test_a_mistake_is_told_on_a_terminal_that_is_not_utf8(tmp_path):
  path = tmp_path / '鸟'
  argv = ['inspect', '--config=folder', f'--config.dataset.path={path}']
  code, shown = _run_on('ascii', argv)
  assert code == 2 and '\\u9e1f does not exist' in shown


@pytest.mark.parametrize(
  'env',
  [
    {'LANG': 'C', 'PYTHONIOENCODING': 'ascii'},
    {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'},
  ],
)
def test_a_system_that_is_not_utf8(odd, tmp_path, env):
  command = [
    *(sys.executable, '-m', 'cmd_jax', 'inspect', '--config=folder'),
    f'--config.dataset.path={odd}',
    f'--workdir={tmp_path / "run"}',
  ]
  result = subprocess.run(
    command, cwd=_REPO, env={**os.environ, **env}, capture_output=True
  )
  assert result.returncode == 0, result.stderr
  assert b'4 images' in result.stdout, result.stdout
  assert b'Traceback' not in result.stderr
  # Readable, whatever is in it.
  (tmp_path / 'run' / 'data_report.txt').read_text('utf-8', 'surrogateescape')
