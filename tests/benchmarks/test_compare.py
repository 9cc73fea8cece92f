"""Runs of the comparison of methods: planned, run, resumed, recorded."""

import json
import os
import pathlib
import sys
import time

import pytest

from benchmarks import (
  compare,
  compare_readme,
  compare_runs,
  compare_table,
  compare_team,
  record,
)
from cmd_jax.errors import UserError

_FAKE = pathlib.Path(__file__).with_name('fake_main.py')


@pytest.fixture
def fake(monkeypatch):
  monkeypatch.setattr(compare_team, 'MAIN', _FAKE)


def _options(tmp_path, *arguments):
  return compare.parse(
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
  assert found['test_images'] == 960
  assert len(found['load_average']) == 2
  assert '--workdir=runs/compare/toybirds/dino/seed2 ' in found['command']
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


def test_texts_are_those_of_the_records_after_every_run(
  fake, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(record, 'RESULTS', tmp_path / 'results')
  readme = tmp_path / 'README.md'
  monkeypatch.setattr(compare_readme, 'README', readme)
  frame = f'{compare_readme.BEGIN}\n{compare_readme.END}\n'
  readme.write_text(frame)
  # By another name, as --results may give it.
  path = tmp_path / 'runs' / '..' / 'results' / 'compare.json'
  (tmp_path / 'runs').mkdir()

  def agree():
    records = record.read(path)
    tables = compare_table.tables(records)
    assert path.with_suffix('.md').read_text() == tables
    assert readme.read_text().strip() == compare_readme.readme_block(records)

  def checked(team, outcomes=compare_team.Team.outcomes):
    for number, outcome in enumerate(outcomes(team)):
      if number:
        agree()
      yield outcome

  monkeypatch.setattr(compare_team.Team, 'outcomes', checked)
  given = ('--set=toybirds', '--rows=dino,esvit', '--seeds=10')
  on_validation = _plan(tmp_path, *given, '--split=validation')
  compare.run_all(on_validation[:1], path)
  assert readme.read_text() == frame
  compare.run_all(_plan(tmp_path, *given), path)
  agree()
  assert 'lacks the lines' not in capsys.readouterr().err
  readme.write_text('nothing\n')
  compare.run_all(_plan(tmp_path, *given), path)
  assert f'{readme} lacks the lines' in capsys.readouterr().err
  assert readme.read_text() == 'nothing\n'
  # Of results elsewhere it says nothing.
  compare.run_all(_plan(tmp_path, *given), tmp_path / 'compare.json')
  assert 'lacks the lines' not in capsys.readouterr().err


def test_a_record_is_renewed_when_what_rows_share_has_changed(fake, tmp_path):
  path = tmp_path / 'compare.json'
  (run,) = _plan(tmp_path, '--set=toybirds', '--rows=dino', '--seeds=0')
  compare.run_all([run], path)
  (old,) = record.read(path)
  assert old['shared_sha256'] == run.resolved.shared_sha256
  path.write_text(json.dumps([{**old, 'shared_sha256': 'earlier'}]))
  compare.run_all([run], path)
  assert record.read(path) == [old]
  assert len(_starts(run)) == 1


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


def test_what_a_run_has_come_to_is_told(fake, tmp_path, monkeypatch):
  monkeypatch.setenv('FAKE_WAITS', 'esvit')
  monkeypatch.setattr(compare_team, '_REPORT_EVERY_S', 0.0)
  (run,) = _plan(tmp_path, '--set=toybirds', '--rows=esvit', '--seeds=0')
  said = []

  def say(line):
    said.append(line)
    if line == '  toybirds esvit seed 0: step 2':
      raise KeyboardInterrupt

  with (
    pytest.raises(KeyboardInterrupt),
    compare_team.Team([run], [()], say) as team,
  ):
    list(team.outcomes())
  assert said[0].startswith('starts') and said[-1].startswith('stops')


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
