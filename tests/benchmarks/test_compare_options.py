"""What the options of the comparison of methods plan."""

import csv
import io
import pathlib
import sys

import pytest

from benchmarks import compare, compare_rows
from cmd_jax.errors import UserError


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
  *birds, cub100, cub20 = runs
  assert len(birds) == 2
  for run in birds:
    assert run.resolved.config['dataset']['test_split'] == 'validation'
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
  assert len(runs) == 2 * len(compare_rows.MAIN_ROWS)
  runs = _plan(tmp_path, '--set=toybirds-12ep', '--seeds=3')
  assert len(runs) == len(compare_rows.rows_of(runs[0].of))
  weights = tmp_path / 'w.safetensors'
  weights.touch()
  runs = _plan(
    tmp_path,
    '--set=cub100-swin-t',
    given,
    f'--init={weights}',
    '--rows=cmd',
  )
  assert {run.of.name for run in runs} == {'cub100-swin-t-init'}
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
  assert len(smoke) == len(compare_rows.rows_of(compare_rows.SMOKE))


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['--set=sparrows'], "no 'sparrows': choose from toybirds"),
    (['--set=toybirds', '--rows=x'], "--rows: there is no 'x'"),
    (['--set=,'], '--set=,: choose from toybirds'),
    (['--set=toybirds', '--rows=,'], '--rows=,: choose from dino'),
    (['--set=toybirds', '--seeds=a'], '--seeds=a: give numbers'),
    (['--set=toybirds', '--seeds=,'], '--seeds=,: give numbers'),
    (['--set=toybirds', '--seeds=1,-2'], '--seeds=1,-2: .* of at least 0'),
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
    (['--smoke', '--set=toybirds'], 'leave out --set$'),
    (['--smoke', '--split=validation'], 'leave out --split$'),
    (['--smoke', '--seeds=0', '--epochs=0'], 'leave out --seeds, --epochs$'),
    (
      ['--smoke', '--photographs=.', '--init=.'],
      'leave out --photographs, --init$',
    ),
    (['--tier=gpu', '--init=.'], 'one by --set, of cub100-vit-s16, cub100-sw'),
  ],
)
def test_what_cannot_be_is_explained(tmp_path, arguments, message):
  with pytest.raises(UserError, match=message):
    _plan(tmp_path, *arguments)


def test_test_scores_have_seeds_that_nothing_was_chosen_with(tmp_path):
  of_test, of_validation = (
    {run.seed for run in _plan(tmp_path, *given, '--rows=dino')}
    for given in (['--set=toybirds'], ['--set=toybirds', '--split=validation'])
  )
  chosen_with = set(compare_rows.SEEDS_FOR_CHOOSING)
  assert of_test == {10, 11, 12} and not of_test & chosen_with
  assert of_validation <= chosen_with
  said = ' '.join(compare.make_parser().format_help().split())
  assert '10,11,12 for test' in said
  assert 'chosen with seeds 0 to 4 on --split=validation' in said


def test_the_base_of_a_row_that_equals_it_is_run(tmp_path):
  given = ('--set=toybirds', '--seeds=3,4')
  runs = _plan(tmp_path, *given, '--rows=cmd-sinkhorn')
  names = [(run.row.name, run.seed, run.folder.parent.name) for run in runs]
  assert names == [
    (name, seed, name) for seed in (3, 4) for name in ('cmd', 'cmd-sinkhorn')
  ]
  assert runs[0] in _plan(tmp_path, *given, '--rows=cmd')
  # An alias of an alias.
  of_mine = _plan(
    tmp_path,
    *given,
    '--rows=cmd-sinkhorn',
    '--row_name=mine',
    '--override=config.method.pooling=gated_attention',
  )
  assert [run.row.name for run in of_mine] == [
    'cmd',
    'cmd-sinkhorn',
    'mine',
  ] * 2


def test_home_is_written_out_in_paths(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  options = compare.parse(['--workdir=~/runs', '--results=~/results'])
  assert options.workdir == tmp_path / 'runs'
  assert options.results == tmp_path / 'results'


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
