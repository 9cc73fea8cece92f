"""The runs of `benchmarks.compare` and their records."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import shlex
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks import (
  compare_configs,
  compare_readme,
  compare_table,
  record,
)
from benchmarks.compare_configs import Resolved
from benchmarks.compare_rows import ROW_BY_NAME, Row, Set
from cmd_jax.data.inspect.report_text import JSON_FILE
from cmd_jax.errors import UserError
from cmd_jax.files.atomic import write_atomically
from cmd_jax.rundir.config_diff import EPOCHS, differences, short
from cmd_jax.rundir.workdir import Workdir, read_json

# What makes a record's place: a new one for the same replaces the old.
KEY = ('tier', 'set', 'split', 'row', 'seed')
# Of a record that is made again later.
_OF_THE_MOMENT = ('date', 'commit', 'machine', 'versions')
# How much of a path a record has; a work directory's set, row and seed are said
# below the usual folder.
_PARTS_SAID = {
  '--workdir': 3,
  '--config.dataset.labels_file': 2,
  '--config.eval.parts_hit.keypoints': 2,
}
_USUAL = 'runs/compare/'


def _typed(arguments: Sequence[str]) -> str:
  # Tuples of strings have quotes of their own.
  quoted = (f'"{x}"' if "'" in x else shlex.quote(x) for x in arguments)
  return ' '.join(['python main.py', *quoted])


def _shorten(argument: str) -> str:
  name, _, value = argument.partition('=')
  if not value.startswith('/'):
    return argument
  said = '/'.join(value.split('/')[-_PARTS_SAID.get(name, 1) :])
  return f'{name}={_USUAL if name == "--workdir" else ""}{said}'


class Run(NamedTuple):
  """A row of a set with a seed.

  Attributes:
    of: the set, with its data.
    split: whose scores these are, one of `compare_rows.SPLITS`.
    row: the row.
    seed: of the run.
    folder: its --workdir.
    resolved: its config.
    base_sha256: hash of the config of the row that it is a variant of.
  """

  of: Set
  split: str
  row: Row
  seed: int
  folder: pathlib.Path
  resolved: Resolved
  base_sha256: str

  @property
  def name(self) -> str:
    """As messages have it."""
    split = '' if self.split == 'test' else f' ({self.split})'
    return f'{self.of.name}{split} {self.row.name} seed {self.seed}'

  @property
  def key(self) -> dict[str, Any]:
    """The place of its record."""
    values = (self.of.tier, self.of.name, self.split, self.row.name, self.seed)
    return dict(zip(KEY, values, strict=True))

  @property
  def arguments(self) -> list[str]:
    """What main.py is given."""
    given = compare_configs.arguments(self.resolved)
    return [given[0], f'--workdir={self.folder}', *given[1:]]

  @property
  def command(self) -> str:
    """What to type."""
    return _typed(self.arguments)

  @property
  def short_command(self) -> str:
    """The command, of paths the last parts, which say enough elsewhere."""
    return _typed([_shorten(x) for x in self.arguments])

  @property
  def log(self) -> pathlib.Path:
    """What main.py prints."""
    return self.folder.with_suffix('.log')

  @property
  def sessions(self) -> pathlib.Path:
    """What each start of main.py took."""
    return self.folder.with_suffix('.json')


def make_run(
  of: Set, split: str, row: Row, seed: int, folder: pathlib.Path
) -> Run:
  """Works out the configs of a run and of its base.

  Args:
    of: the set, with its data.
    split: one of `compare_rows.SPLITS`.
    row: the row.
    seed: of the run.
    folder: its --workdir.
  """
  resolved = compare_configs.resolve(of, row, seed)
  base = ''
  if row.base:
    base_row = ROW_BY_NAME[row.base]
    base = compare_configs.resolve(of, base_row, seed).sha256
  return Run(of, split, row, seed, folder, resolved, base)


def is_alias(run: Run) -> bool:
  """Whether the row equals its base, which is run in its place."""
  return run.resolved.sha256 == run.base_sha256


def has_scores(run: Run) -> bool:
  """Whether the run has come to its end."""
  results = Workdir(str(run.folder)).results()
  return bool(results.get('init') and results.get('final'))


def is_finished(run: Run) -> bool:
  """Whether the run has its scores by the protocols of its config.

  Of one that was scored otherwise the scores are dropped, so that none of them
  is taken for a new one should scoring be cut short.

  Raises:
    UserError: its folder is that of another config.
  """
  workdir = Workdir(str(run.folder))
  if not workdir.config_file.exists():
    return False
  found = differences(workdir.read_config(), run.resolved.config)
  for x in found:
    # Longer runs could be resumed, along schedules that no other row has.
    if not x.may_change or x.field == EPOCHS:
      raise UserError(
        f'{run.folder} is of another config: config.{x.field} is '
        f'{short(x.there)} there and {short(x.here)} here; move it away, give '
        'another --workdir, or a --row_name of its own'
      )
  if has_scores(run) and any(x.field.startswith('eval.') for x in found):
    workdir.update_results(final={})
  return has_scores(run)


def _test_images(run: Run) -> int | None:
  """Number of images that are scored; None if the run does not say."""
  path = run.folder / JSON_FILE
  report = read_json(path) if path.exists() else {}
  return report.get('splits', {}).get('test', {}).get('used')


def _note(run: Run) -> str:
  notes = (run.row.note, run.of.notes.get(run.row.name))
  return '; '.join(filter(None, notes))


def _common(run: Run) -> dict[str, Any]:
  """What all records have, as of now."""
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
  return {
    **run.key,
    'command': run.short_command,
    'date': now,
    'commit': record.commit(),
    'machine': record.describe_machine(),
    'versions': record.versions(),
    'config_sha256': run.resolved.sha256,
    'base_sha256': run.base_sha256,
    'shared_sha256': run.resolved.shared_sha256,
    'base': run.row.base,
    'note': _note(run),
  }


def make_record(run: Run) -> dict[str, Any]:
  """The record of a finished run."""
  results = Workdir(str(run.folder)).results()
  sessions = record.read(run.sessions) or [{}]
  common = _common(run)
  wall = [x['wall_seconds'] for x in sessions if 'wall_seconds' in x]
  peak = [x['peak_memory_mib'] for x in sessions if 'peak_memory_mib' in x]
  steps = results['steps']
  return {
    **common,
    'date': sessions[-1].get('date', common['date']),
    'commit': sessions[-1].get('commit', ''),
    'machine': {**common['machine'], 'devices': results.get('hardware', '')},
    'versions': {**common['versions'], **results.get('versions', {})},
    'differs': list(run.resolved.differs),
    'test_images': _test_images(run),
    'steps': steps,
    'images_seen': steps * run.resolved.config['batch_size'],
    'train_seconds': results['seconds'],
    'wall_seconds': round(sum(wall), 1) if wall else None,
    'peak_memory_mib': max(peak) if peak else None,
    'side_by_side': sessions[-1].get('side_by_side'),
    'load_average': sessions[-1].get('load_average'),
    'rows': [
      {'metric': name, 'init': results['init'].get(name), 'final': value}
      for name, value in results['final'].items()
    ],
  }


def _alias_record(run: Run) -> dict[str, Any]:
  """Says that the row equals its base."""
  return {**_common(run), 'same_as': run.row.base, 'rows': []}


def _same_key(one: dict[str, Any], other: dict[str, Any]) -> bool:
  return all(one.get(name) == other.get(name) for name in KEY)


@contextlib.contextmanager
def _only_writer(folder: pathlib.Path) -> Iterator[None]:
  """Others who add records to this folder wait."""
  folder.mkdir(parents=True, exist_ok=True)
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield
  finally:
    os.close(descriptor)


def _write_texts(path: pathlib.Path, records: Sequence[dict[str, Any]]) -> bool:
  """The tables of records, and README's; False where it lacks the markers."""
  write_atomically(path.with_suffix('.md'), compare_table.tables(records))
  if path.resolve() != record.RESULTS / 'compare.json':
    return True
  if not any(x['split'] == 'test' for x in records):
    return True
  return compare_readme.write_readme(records, compare_readme.README)


def renew_texts(path: pathlib.Path) -> bool:
  """Makes the Markdown of a file of records again.

  That is the tables beside it and, if they are the repository's own results on
  a test split, the block of README.md.

  Args:
    path: of the JSON file.

  Returns:
    Whether README.md has the markers of its block, if it is to have one.
  """
  with _only_writer(path.parent):
    return _write_texts(path, record.read(path))


def add_record(path: pathlib.Path, new: dict[str, Any]) -> None:
  """Adds a record, in place of that with the same key, and renews the texts.

  Args:
    path: of the JSON file.
    new: the record.
  """
  with _only_writer(path.parent):
    kept = [x for x in record.read(path) if not _same_key(x, new)]
    records = [*kept, new]
    write_atomically(path, json.dumps(records, indent=2) + '\n')
    _write_texts(path, records)


def add_finished(path: pathlib.Path, run: Run) -> None:
  """Adds what needs no run, unless it is there.

  Args:
    path: of the JSON file.
    run: that is finished, or equals its base.
  """
  new = _alias_record(run) if is_alias(run) else make_record(run)
  said = {k: v for k, v in new.items() if k not in _OF_THE_MOMENT}
  for old in record.read(path):
    if all(old.get(k) == v for k, v in said.items()):
      return
  add_record(path, new)
