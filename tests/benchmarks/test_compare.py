"""Runs of the comparison of methods: planned, run, resumed, recorded."""

import csv
import io
import json
import os
import pathlib
import sys
import time

import pytest

from benchmarks import compare, compare_rows, compare_runs, compare_team, record
from cmd_jax.errors import UserError

_FAKE = pathlib.Path(__file__).with_name('fake_main.py')


@pytest.fixture
def fake(monkeypatch):
  monkeypatch.setattr(compare_team, 'MAIN', _FAKE)


def _options(tmp_path, *arguments):
  return compare.make_parser().parse_args(
    [
      f'--workdir={tmp_path / "runs"}',
      f'--results={tmp_path / "results"}',
      *arguments,
    ]
  )


def _plan(tmp_path, *arguments):
  return compare.plan(_options(tmp_path, *arguments))[0]


def _starts(run):
  path = run.folder / 'starts'
  return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def photographs(tmp_path):
  """Two sets of photographs without the photographs."""
  for name in ('cub100_box227', 'cub20'):
    folder = tmp_path / 'photographs' / name
    folder.mkdir(parents=True)
    rows = [
      f'{name}/{i}.jpg,{name},{label},{split}'
      for label, name in enumerate(('wren', 'robin'))
      for split, numbers in (('train', range(10)), ('test', range(10, 14)))
      for i in numbers
    ]
    text = '\n'.join(['file,class_name,label,split', *rows]) + '\n'
    (folder / 'labels.csv').write_text(text)
    (folder / 'parts.csv').write_text('file,part_id,x,y,visible\n')
  return tmp_path / 'photographs'


def test_finished_runs_are_not_repeated_and_records_merge(fake, tmp_path):
  path = tmp_path / 'results' / 'compare.json'
  first = _plan(
    tmp_path,
    '--set=toybirds',
    '--seeds=0,1',
    '--rows=dino,cmd,cmd-prototypes-shared,cmd-prototypes-separate',
  )
  assert compare.run_all(first, path) == []
  aliases = [run for run in first if compare_runs.is_alias(run)]
  # One of the two is the default.
  assert len(aliases) == 2
  assert not any(_starts(run) for run in aliases)
  before = path.read_text()
  assert compare.run_all(first, path) == []
  assert path.read_text() == before
  others = [run for run in first if run not in aliases]
  assert [len(_starts(run)) for run in others] == [1] * len(others)

  more = _plan(tmp_path, '--set=toybirds', '--rows=dino', '--seeds=1,2')
  compare.run_all(more, path)
  assert [len(_starts(run)) for run in more] == [1, 1]
  records = record.read(path)
  keys = [tuple(x[name] for name in compare_runs.KEY) for x in records]
  assert len(set(keys)) == len(keys) == len(first) + 1
  found = next(x for x in records if x['row'] == 'dino' and x['seed'] == 2)
  assert found['rows'][1] == {
    'metric': 'linear/logreg/top1',
    'init': 0.1,
    'final': 0.62,
  }
  assert found['images_seen'] == 10 * 32
  assert found['train_seconds'] == 1.5
  assert found['wall_seconds'] > 0
  assert found['peak_memory_mib'] > 5
  assert found['side_by_side'] == 1
  assert len(found['load_average']) == 2
  assert '--workdir=runs/toybirds/dino/seed2 ' in found['command']
  assert str(tmp_path) not in path.read_text()
  assert '61.0 ± 1.0' in path.with_suffix('.md').read_text()


def test_a_run_without_scores_is_taken_up_again(fake, tmp_path):
  path = tmp_path / 'compare.json'
  (run,) = runs = _plan(tmp_path, '--set=toybirds', '--rows=dino', '--seeds=0')
  compare.run_all(runs, path)
  results = run.folder / 'results.json'
  fields = json.loads(results.read_text())
  results.write_text(json.dumps({**fields, 'final': {}}))
  compare.run_all(runs, path)
  assert len(_starts(run)) == 2
  assert len(json.loads(run.sessions.read_text())) == 2
  (found,) = record.read(path)
  sessions = json.loads(run.sessions.read_text())
  total = sum(x['wall_seconds'] for x in sessions)
  assert found['wall_seconds'] == pytest.approx(total, abs=0.1)
  # Scored by others, it is scored anew and its old scores are gone at once.
  of = run.of.changed({'eval.view_px': 48})
  again = compare_runs.make_run(of, 'test', run.row, 0, run.folder)
  assert not compare_runs.is_finished(again)
  assert not json.loads(results.read_text())['final']


def test_records_are_made_again_from_folders(fake, tmp_path):
  path = tmp_path / 'compare.json'
  runs = _plan(tmp_path, '--set=toybirds', '--rows=dino', '--seeds=0')
  compare.run_all(runs, path)
  before = record.read(path)
  path.unlink()
  compare.run_all(runs, path)
  assert record.read(path) == before


@pytest.mark.parametrize(
  'field, value, message',
  [
    ('total_epochs', 3, r'config\.total_epochs is 3 there and \d+ here'),
    ('batch_size', 7, r'config\.batch_size is 7 there'),
  ],
)
def test_a_folder_of_another_config_is_refused(
  fake, tmp_path, field, value, message
):
  path = tmp_path / 'compare.json'
  runs = _plan(tmp_path, '--set=toybirds', '--rows=dino', '--seeds=0,1')
  compare.run_all(runs[:1], path)
  file = runs[0].folder / 'config.json'
  file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
  with pytest.raises(UserError, match=message) as error:
    compare.run_all(runs, path)
  assert str(runs[0].folder) in str(error.value)
  assert not _starts(runs[1])


def test_what_fails_is_said_and_the_others_go_on(
  fake, tmp_path, monkeypatch, capsys
):
  monkeypatch.setenv('FAKE_FAILS', 'dino')
  monkeypatch.setattr(
    sys,
    'argv',
    [
      'compare',
      f'--workdir={tmp_path / "runs"}',
      f'--results={tmp_path}',
      '--set=toybirds',
      '--rows=dino,esvit',
      '--seeds=0',
    ],
  )
  with pytest.raises(SystemExit) as exit_:
    compare.main()
  assert exit_.value.code == 1
  said = capsys.readouterr().err
  assert 'failed: toybirds dino seed 0' in said.splitlines()[-1]
  assert '  step 2\n' in said and 'step 1' not in said
  assert '\x1b' not in said
  assert [x['row'] for x in record.read(tmp_path / 'compare.json')] == ['esvit']


def test_ctrl_c_stops_all_children(fake, tmp_path, monkeypatch):
  monkeypatch.setenv('FAKE_WAITS', 'esvit')
  slow, fast = _plan(
    tmp_path, '--set=toybirds', '--rows=esvit,dino', '--seeds=0'
  )
  said = []
  with (
    pytest.raises(KeyboardInterrupt),
    compare_team.Team([slow, fast], [(), ()], said.append) as team,
  ):
    for outcome in team.outcomes():
      assert outcome.run == fast
      while not (slow.folder / 'waits').exists():
        time.sleep(0.05)
      raise KeyboardInterrupt
  assert (slow.folder / 'stopped').exists()
  (session,) = json.loads(slow.sessions.read_text())
  assert session['exit_code'] == 143
  assert 'stops toybirds esvit seed 0, which can be resumed' in said
  assert '1 of 2 left' in next(x for x in said if x.startswith('done'))


@pytest.mark.skipif(
  not hasattr(os, 'sched_getaffinity') or len(os.sched_getaffinity(0)) < 2,
  reason='one core',
)
def test_runs_side_by_side_have_cores_of_their_own(fake, tmp_path):
  runs = _plan(tmp_path, '--set=toybirds', '--rows=dino,esvit', '--seeds=0')
  compare.run_all(runs, tmp_path / 'compare.json', jobs=2)
  one, other = (set(_starts(run)[0].split()) for run in runs)
  assert one and other and not one & other
  records = record.read(tmp_path / 'compare.json')
  assert [x['side_by_side'] for x in records] == [2, 2]


def test_more_jobs_than_cores_are_refused():
  with pytest.raises(UserError, match='--jobs=1000: give 1 to'):
    compare_team.share_cores(1000)


def test_validation_holds_out_a_fifth_of_each_class_of_train(photographs):
  text = (photographs / 'cub20' / 'labels.csv').read_text()
  made = compare.validation_labels(text)
  assert made == compare.validation_labels(text)
  given = {row['file']: row for row in csv.DictReader(io.StringIO(text))}
  rows = list(csv.DictReader(io.StringIO(made)))
  assert {given[row['file']]['split'] for row in rows} == {'train'}
  assert len(rows) == 20
  held_out = [row['class_name'] for row in rows if row['split'] == 'test']
  assert sorted(held_out) == ['robin', 'robin', 'wren', 'wren']
  # One class more changes nothing of the others.
  fewer = [x for x in text.splitlines() if 'robin' not in x]
  assert set(compare.validation_labels('\n'.join(fewer)).splitlines()) <= set(
    made.splitlines()
  )


def test_validation_is_apart_from_test(photographs, tmp_path):
  options = _options(
    tmp_path,
    '--tier=cpu',
    '--rows=dino',
    '--seeds=0',
    '--split=validation',
    f'--photographs={photographs}',
  )
  runs, places = compare.plan(options)
  compare._write_labels(places)
  birds, cub100, cub20 = runs
  assert birds.resolved.config['dataset']['test_split'] == 'validation'
  dataset = cub100.resolved.config['dataset']
  labels = pathlib.Path(dataset['labels_file'])
  assert labels.read_text().count(',test\n') == 4
  assert labels.is_absolute() and 'cub100-validation' in labels.parts
  assert dataset['path'] == str(photographs / 'cub100_box227')
  on_test = _plan(
    tmp_path, '--rows=dino', '--seeds=0', f'--photographs={photographs}'
  )
  for run, other in zip(runs, on_test, strict=True):
    assert run.folder != other.folder
    assert run.key['split'] == 'validation' != other.key['split']
    assert run.resolved.sha256 != other.resolved.sha256


def test_sets_rows_and_budgets_are_chosen(photographs, tmp_path):
  given = f'--photographs={photographs}'
  runs = _plan(tmp_path, '--set=cub20', given, '--seeds=0')
  assert [run.row.name for run in runs] == [
    row.name for row in compare_rows.ROWS if row.name in compare_rows.MAIN_ROWS
  ]
  runs = _plan(tmp_path, '--set=toybirds', '--epochs=5', '--seeds=3,1,3')
  assert {run.of.name for run in runs} == {'toybirds-5ep'}
  assert {run.resolved.config['total_epochs'] for run in runs} == {5}
  assert len(runs) == 2 * len(compare_rows.ROWS)
  weights = tmp_path / 'w.safetensors'
  weights.touch()
  runs = _plan(tmp_path, '--tier=gpu', given, f'--init={weights}', '--rows=cmd')
  assert {run.of.name for run in runs} == {
    'cub100-vit-s16-init',
    'cub100-swin-t-init',
  }
  assert {run.resolved.config['init']['path'] for run in runs} == {str(weights)}
  (run,) = _plan(
    tmp_path,
    '--set=toybirds',
    '--seeds=0',
    '--override=config.method.weights.region=0.5',
    '--override=config.teacher.temperature=0.05',
    '--row_name=warm',
  )
  assert run.resolved.config['teacher']['temperature'] == 0.05
  assert run.folder.parts[-2:] == ('warm', 'seed0')
  smoke = _plan(tmp_path, '--smoke')
  assert len(smoke) == len(compare_rows.ROWS)


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['--set=sparrows'], "no 'sparrows': choose from toybirds"),
    (['--set=toybirds', '--rows=x'], "--rows: there is no 'x'"),
    (['--set=toybirds', '--seeds=a'], '--seeds=a: give numbers'),
    (['--set=toybirds', '--tier=cpu'], 'one of --set and --tier'),
    (['--set=toybirds', '--epochs=0'], 'give at least 1'),
    (['--set=toybirds', '--row_name=x'], 'both of --override and --row_name'),
    (
      ['--set=toybirds', '--row_name=cmd', '--override=config.seed=1'],
      'give a new name',
    ),
    (
      ['--set=toybirds', '--row_name=../x', '--override=config.seed=1'],
      'give a new name',
    ),
    (['--set=cub100'], 'needs --photographs=FOLDER'),
    (['--set=cub100', '--photographs=/nowhere'], 'does not exist'),
    (['--set=cub100', '--photographs=.'], 'neither is nor has a folder cub100'),
    (['--smoke', '--set=toybirds'], 'a set of its own'),
  ],
)
def test_what_cannot_be_is_explained(tmp_path, arguments, message):
  with pytest.raises(UserError, match=message):
    _plan(tmp_path, *arguments)


def test_the_folder_of_photographs_is_that_of_the_set(photographs, tmp_path):
  of = compare_rows.SET_BY_NAME['cub100']
  folder = photographs / 'cub100_box227'
  for given in (photographs, folder):
    assert compare.find_photographs(of, given) == folder
  with pytest.raises(UserError, match='neither is nor has'):
    compare.find_photographs(of, photographs / 'cub20')


def test_a_dry_run_prints_commands_and_runs_nothing(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(
    sys,
    'argv',
    [
      'compare',
      f'--workdir={tmp_path}',
      '--smoke',
      '--rows=cmd,cmd-pool-gated_attention,cmd-no-region',
      '--dry_run',
    ],
  )
  compare.main()
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 3
  assert f'--workdir={tmp_path}/smoke/cmd/seed0' in lines[0]
  assert "=('knn/20', 'linear/logreg'," in lines[0]
  assert lines[-1].endswith('--config.seed=0')
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_smallest_real_comparison(tmp_path):
  runs = _plan(tmp_path, '--smoke', '--rows=dino,cmd')
  path = tmp_path / 'smoke.json'
  assert compare.run_all(runs, path) == []
  for found in record.read(path):
    assert found['steps'] == 150
    metrics = {x['metric'] for x in found['rows']}
    assert {'linear/logreg/top1', 'parts/hit/parts/encoder_mass'} <= metrics
  assert '`cmd` | 1 |' in path.with_suffix('.md').read_text()
