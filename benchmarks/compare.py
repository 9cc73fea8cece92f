r"""Compares the methods at equal encoder, images seen and augmentation.

  python -m benchmarks.compare --workdir=runs/compare --set=toybirds
  python -m benchmarks.compare --workdir=runs/compare --tier=cpu --jobs=2 \
    --photographs=FOLDER --rows=dino,cmd --seeds=10,11,12

Each run, a row of a set with a seed, is `main.py` in WORKDIR/SET/ROW/seedN.
What is finished is not repeated, what is not is resumed; after every run its
record is in results/compare.json and the tables in compare.md are made again.
FOLDER is that of the photographs, or one that has cub100_box227 and cub20.
Settings are chosen with seeds 0 to 4 on --split=validation, so that the test
split, by default, is scored with seeds that nothing was chosen with.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import io
import pathlib
import random
import re
import signal
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks import (
  compare_configs,
  compare_readme,
  compare_rows,
  compare_runs,
  compare_team,
  record,
)
from benchmarks.compare_rows import Row, Set
from benchmarks.compare_runs import Run
from cmd_jax.errors import UserError
from cmd_jax.files.atomic import write_atomically

_HELD_OUT = 0.2


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  """Reads the command line.

  Args:
    arguments: in place of the process's.
  """
  options = make_parser().parse_args(arguments)
  options.workdir = options.workdir.expanduser()
  options.results = options.results.expanduser()
  return options


def make_parser() -> argparse.ArgumentParser:
  """The options."""
  parser = record.make_parser(__doc__)
  add = parser.add_argument
  add('--workdir', type=pathlib.Path, default=pathlib.Path('runs/compare'))
  add('--set', default='', help='names of sets, separated by commas')
  tiers = ('', *compare_rows.TIERS)
  add('--tier', default='', choices=tiers, help='all its sets')
  add('--rows', default='', help='names of rows; all by default')
  defaults = (
    f'{",".join(map(str, seeds))} for {split}'
    for split, seeds in compare_rows.SEEDS.items()
  )
  add('--seeds', help=f'by default {", ".join(defaults)}')
  add('--split', default='test', choices=compare_rows.SPLITS)
  add('--photographs', type=pathlib.Path, help='folder of photographs')
  add('--init', type=pathlib.Path, help='file of weights to start from')
  add('--epochs', type=int, help='in place of the budget of the set')
  add(
    '--override',
    action='append',
    default=[],
    metavar='config.FIELD=VALUE',
    help='changes --rows (cmd by default) into a row of its own',
  )
  add('--row_name', default='', help='name of the row that --override makes')
  add('--jobs', type=int, default=1, help='runs side by side')
  add('--smoke', action='store_true', help='all rows, as small as they get')
  add('--table', action='store_true', help='only makes the tables again')
  add('--dry_run', action='store_true', help='only prints the commands')
  return parser


def _named(text: str, known: dict[str, Any], option: str) -> list[Any]:
  """What a list of names stands for.

  Raises:
    UserError: a name that is not known, or commas alone.
  """
  names = [name for name in text.split(',') if name]
  if text and not names:
    raise UserError(f'--{option}={text}: choose from {", ".join(known)}')
  for name in names:
    if name not in known:
      raise UserError(
        f'--{option}: there is no {name!r}: choose from {", ".join(known)}'
      )
  return [known[name] for name in dict.fromkeys(names)]


def _seeds(options: argparse.Namespace) -> list[int]:
  if options.smoke:
    return [0]
  text = options.seeds
  if text is None:
    return list(compare_rows.SEEDS[options.split])
  seeds = text.split(',')
  if not all(re.fullmatch('[0-9]+', seed) for seed in seeds):
    raise UserError(
      f'--seeds={text}: give numbers of at least 0, separated by commas'
    )
  return list(dict.fromkeys(map(int, seeds)))


def _check_smoke(options: argparse.Namespace) -> None:
  names = ('set', 'tier', 'seeds', 'photographs', 'init', 'epochs')
  given = [f'--{x}' for x in names if getattr(options, x) not in (None, '')]
  if options.split != 'test':
    given.append('--split')
  if given:
    raise UserError(
      f'--smoke is a set of its own: leave out {", ".join(given)}'
    )


def choose_sets(options: argparse.Namespace) -> list[Set]:
  """The sets that the options name, with their budgets.

  Raises:
    UserError: an unknown set, or options that contradict one another.
  """
  if options.smoke:
    _check_smoke(options)
    sets = [compare_rows.SMOKE]
  elif options.set:
    if options.tier:
      raise UserError('give one of --set and --tier')
    sets = _named(options.set, compare_rows.SET_BY_NAME, 'set')
  else:
    tier = options.tier or 'cpu'
    sets = [x for x in compare_rows.SETS if x.tier == tier]
  if options.init:
    if len(sets) > 1:
      raise UserError(
        f'--init={options.init} is one file and sets have encoders of their '
        f'own: name one by --set, of {", ".join(x.name for x in sets)}'
      )
    path = str(_existing(options.init, 'init'))
    sets = [x.renamed('init', {'init.path': path}) for x in sets]
  if options.epochs is not None:
    if options.epochs < 1:
      raise UserError(f'--epochs={options.epochs}: give at least 1')
    sets = [
      x.renamed(f'{options.epochs}ep', {'total_epochs': options.epochs})
      for x in sets
    ]
  return sets


def choose_rows(of: Set, options: argparse.Namespace) -> list[Row]:
  """The rows of a set that the options name.

  Raises:
    UserError: an unknown row, or an override without a name.
  """
  known = compare_rows.rows_of(of)
  rows = _named(options.rows, known, 'rows')
  if bool(options.override) != bool(options.row_name):
    raise UserError('give both of --override and --row_name, or none')
  if options.override:
    rows = rows or [known[compare_rows.REFERENCE]]
    if len(rows) > 1:
      raise UserError('--override changes one row: name one by --rows')
    name = options.row_name
    if name in known or not re.fullmatch(r'[A-Za-z0-9][\w.+=-]*', name):
      raise UserError(
        f'--row_name={name}: give a new name of letters, digits and . _ + = -'
      )
    return [compare_configs.override_row(of, rows[0], name, options.override)]
  return rows or [x for x in known.values() if x.name in (of.rows or known)]


def _existing(path: pathlib.Path, option: str) -> pathlib.Path:
  if not path.expanduser().exists():
    raise UserError(f'--{option}={path} does not exist')
  return path.expanduser().resolve()


def find_photographs(of: Set, folder: pathlib.Path | None) -> pathlib.Path:
  """The folder of a set's photographs.

  Raises:
    UserError: it is not there.
  """
  if folder is None:
    raise UserError(
      f'the set {of.name} needs --photographs=FOLDER, with {of.folder} in it, '
      'or --set= without it'
    )
  folder = _existing(folder, 'photographs')
  for place in (folder / of.folder, folder):
    if (place / 'labels.csv').exists() and place.name == of.folder:
      return place
  raise UserError(
    f'--photographs={folder} neither is nor has a folder {of.folder} with a '
    f'labels.csv, which the set {of.name} needs'
  )


def validation_labels(text: str) -> str:
  """A labels.csv whose test split is a fifth of each class of the train split.

  Args:
    text: of a labels.csv with a split; its test rows are left out.
  """
  rows = list(csv.DictReader(io.StringIO(text.removeprefix('\ufeff'))))
  train = [row for row in rows if row['split'] == 'train']
  of_class: dict[str, list[dict]] = {}
  for row in sorted(train, key=lambda row: row['file']):
    of_class.setdefault(row['class_name'], []).append(row)
  for name, members in of_class.items():
    # A class's draw does not depend on what other classes there are.
    drawn = random.Random(name).sample(members, round(_HELD_OUT * len(members)))
    for row in drawn:
      row['split'] = 'test'
  file = io.StringIO()
  writer = csv.DictWriter(file, train[0].keys(), lineterminator='\n')
  writer.writeheader()
  writer.writerows(row for members in of_class.values() for row in members)
  return file.getvalue()


class _Place(NamedTuple):
  """Where the runs of a set are.

  Attributes:
    of: the set, with what its data need.
    folder: of its runs.
    labels: a labels.csv to be written there, or None.
  """

  of: Set
  folder: pathlib.Path
  labels: tuple[pathlib.Path, str] | None = None


def _place(of: Set, options: argparse.Namespace) -> _Place:
  split = options.split
  name = of.name if split == 'test' else f'{of.name}-{split}'
  folder = options.workdir.resolve() / name
  if not of.folder:
    return _Place(of.changed({'dataset.test_split': split}), folder)
  photographs = find_photographs(of, options.photographs)
  fields = {'dataset.path': str(photographs)}
  keypoints = photographs / 'parts.csv'
  if keypoints.exists():
    fields['eval.parts_hit.keypoints'] = str(keypoints)
  labels = None
  if split == 'validation':
    labels = folder / 'validation.csv'
    fields['dataset.labels_file'] = str(labels)
    text = (photographs / 'labels.csv').read_text(encoding='utf-8')
    labels = labels, validation_labels(text)
  return _Place(of.changed(fields), folder, labels)


def _with_base(run: Run, place: _Place) -> list[Run]:
  """A run; before one that equals its base, that of the base."""
  if not compare_runs.is_alias(run):
    return [run]
  row = compare_rows.ROW_BY_NAME[run.row.base]
  folder = place.folder / row.name / run.folder.name
  base = compare_runs.make_run(place.of, run.split, row, run.seed, folder)
  return [*_with_base(base, place), run]


def plan(options: argparse.Namespace) -> tuple[list[Run], list[_Place]]:
  """The runs that the options ask for, in their order, and their places.

  Those that equal others need these, which are run too.

  Raises:
    UserError: options that cannot be.
  """
  runs, places = [], []
  seeds = _seeds(options)
  for of in choose_sets(options):
    place = _place(of, options)
    places.append(place)
    for row in choose_rows(of, options):
      for seed in seeds:
        folder = place.folder / row.name / f'seed{seed}'
        run = compare_runs.make_run(place.of, options.split, row, seed, folder)
        runs += _with_base(run, place)
  return list({run.folder: run for run in runs}.values()), places


def _write_labels(places: Sequence[_Place]) -> None:
  for place in places:
    if place.labels is None:
      continue
    path, text = place.labels
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
      write_atomically(path, text)


def _results(options: argparse.Namespace) -> pathlib.Path:
  """The file of records."""
  if options.smoke:
    return options.workdir / 'smoke.json'
  return options.results / 'compare.json'


def _say(text: str) -> None:
  now = datetime.datetime.now().strftime('%H:%M:%S')
  print(f'{now}  {text}', file=sys.stderr, flush=True)


def _renew_texts(path: pathlib.Path) -> None:
  if not compare_runs.renew_texts(path):
    _say(
      f'{compare_readme.README} lacks the lines {compare_readme.BEGIN} and '
      f'{compare_readme.END}, between which its table would be'
    )


def run_all(
  runs: Sequence[Run], path: pathlib.Path, *, jobs: int = 1
) -> list[str]:
  """Runs what is not finished, and adds the records one by one.

  Args:
    runs: from `plan`.
    path: of the records.
    jobs: runs side by side.

  Returns:
    Names of the runs that failed.

  Raises:
    UserError: a folder belongs to a run of another config.
    KeyboardInterrupt: after all children have stopped.
  """
  todo = []
  for run in runs:
    if compare_runs.is_alias(run) or compare_runs.is_finished(run):
      compare_runs.add_finished(path, run)
    else:
      todo.append(run)
  _renew_texts(path)
  if left_out := len(runs) - len(todo):
    _say(f'{left_out} of {len(runs)} runs are finished or equal others')
  cores = compare_team.share_cores(jobs)
  with compare_team.Team(todo, cores, _say) as team:
    for outcome in team.outcomes():
      if outcome.failed:
        continue
      compare_runs.add_record(path, compare_runs.make_record(outcome.run))
  return team.failed


def main() -> None:
  """Runs, or prints commands, or makes tables."""
  options = parse()
  path = _results(options)
  if options.table:
    _renew_texts(path)
    return
  runs, places = plan(options)
  if options.dry_run:
    for run in runs:
      same = compare_runs.is_alias(run)
      print(f'# {run.name} = {run.row.base}' if same else run.command)
    return
  _write_labels(places)
  try:
    failed = run_all(runs, path, jobs=options.jobs)
  except KeyboardInterrupt:
    _say('stopped: the same command resumes')
    sys.exit(128 + signal.SIGINT)
  print(path.with_suffix('.md').read_text())
  if failed:
    print(f'failed: {", ".join(failed)}', file=sys.stderr)
    sys.exit(1)


if __name__ == '__main__':
  record.run_main(main)
