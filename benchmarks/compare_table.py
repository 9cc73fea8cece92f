"""Records of `benchmarks.compare` as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.compare_rows import (
  ROW_BY_NAME,
  ROWS,
  SETS,
  SMOKE,
  SPLITS,
  Set,
)

BEGIN, END = '<!-- compare:begin -->', '<!-- compare:end -->'
NOT_MEASURED = 'not measured'
README_ROWS = ('dino', 'esvit', 'cmd_released', 'cmd', 'particle')
LOGREG = 'linear/logreg/top1'
RANK1 = 'retrieval/test-vs-train/rank1'
KNN = 'knn/20/top1'
_SCORES = {
  '`knn/20` top1': KNN,
  '`linear/logreg` top1': LOGREG,
  '`retrieval` rank1': RANK1,
  '`retrieval` mAP': 'retrieval/test-vs-train/mAP',
}
_ATTENDING = {'multi-instance': 'mil', "encoder's": 'encoder'}
# Of the annotations that a set has, the first says most of what is claimed.
_ANNOTATIONS = ('parts', 'keypoints', 'object', 'box')
_OPPONENTS = ('dino', 'esvit')
# That of the rows without local views.
_WITHOUT_LOCAL = 'dino-global-views'

Record = Mapping[str, Any]


class Measured(NamedTuple):
  """The records of a row.

  Attributes:
    by_seed: seed -> record, of the config of the newest.
    old: number of records of other configs, which are left out.
  """

  by_seed: dict[int, Record]
  old: int

  @property
  def newest(self) -> Record:
    """The record made last."""
    return max(self.by_seed.values(), key=lambda x: x['date'])


def measured_rows(records: Iterable[Record]) -> dict[str, Measured]:
  """The records of a set by row, in the order of `ROWS`, then by name."""
  of_row: dict[str, list[Record]] = {}
  for record in records:
    of_row.setdefault(record['row'], []).append(record)
  order = {row.name: number for number, row in enumerate(ROWS)}
  rows = {}
  for name in sorted(of_row, key=lambda x: (order.get(x, len(order)), x)):
    newest = max(of_row[name], key=lambda x: x['date'])['config_sha256']
    kept = [x for x in of_row[name] if x['config_sha256'] == newest]
    by_seed = {x['seed']: x for x in sorted(kept, key=lambda x: x['seed'])}
    rows[name] = Measured(by_seed, len(of_row[name]) - len(kept))
  return rows


def _is_alias(row: Measured, rows: Mapping[str, Measured]) -> bool:
  """Whether the row's config is that of its base as measured now."""
  base = rows.get(row.newest['base'])
  of_base = base and base.newest['config_sha256']
  if row.newest.get('same_as') and base is None:
    return True
  return of_base == row.newest['config_sha256']


def _values(record: Record, when: str) -> dict[str, float]:
  return {x['metric']: x[when] for x in record['rows'] if x[when] is not None}


def _ratio(values: Mapping[str, float], who: str) -> float | None:
  """Attention on what is annotated over that of an even one."""
  for what in _ANNOTATIONS:
    if f'parts/hit/{what}/uniform' in values:
      mass = values.get(f'parts/hit/{what}/{who}_mass')
      uniform = values[f'parts/hit/{what}/uniform']
      return None if mass is None or not uniform else mass / uniform
  return None


def spread(values: Sequence[float], form: str = '.1f') -> str:
  """Mean and sample standard deviation; of one value, itself."""
  if not values:
    return '-'
  mean = format(statistics.mean(values), form)
  if len(values) == 1:
    return mean
  return f'{mean} ± {format(statistics.stdev(values), form.removeprefix("+"))}'


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
  """A table, as narrow as it gets."""
  rows = [header, ['---'] * len(header), *lines]
  return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def _score_cells(all_values: Sequence[Mapping[str, float]]) -> list[str]:
  """Scores in per cent, then ratios."""
  cells = [
    spread([100 * x[metric] for x in all_values if metric in x])
    for metric in _SCORES.values()
  ]
  for who in _ATTENDING.values():
    ratios = [_ratio(x, who) for x in all_values]
    cells.append(spread([x for x in ratios if x is not None], '.2f'))
  return cells


def _cost_cells(records: Sequence[Record]) -> list[str]:
  def mean(name: str) -> str:
    values = [x[name] for x in records if x.get(name) is not None]
    return f'{statistics.mean(values):,.0f}' if values else '-'

  peaks = [x['peak_memory_mib'] for x in records if x.get('peak_memory_mib')]
  return [
    mean('images_seen'),
    mean('train_seconds'),
    # A program that is compiled takes more than one that is in the cache.
    f'{min(peaks):,}' if peaks else '-',
  ]


def _untrained(rows: Mapping[str, Measured]) -> list[str]:
  """The line of initial encoders, of the first row where rows differ."""
  best: dict[int, dict[str, float]] = {}
  for row in rows.values():
    for seed, record in row.by_seed.items():
      # The multi-instance attention is not in all of them.
      for metric, value in _values(record, 'init').items():
        best.setdefault(seed, {}).setdefault(metric, value)
  cells = _score_cells([best[seed] for seed in sorted(best)])
  return ['untrained', str(len(best)), *cells, '', '', '']


def _main_table(rows: Mapping[str, Measured], wanted: Sequence[str]) -> str:
  costs = ['images seen', 'train s', 'peak MiB']
  looks = [f'{name} attention x' for name in _ATTENDING]
  header = ['', 'seeds', *_SCORES, *looks, *costs]
  lines = []
  if any(
    record['rows'] for x in rows.values() for record in x.by_seed.values()
  ):
    lines.append(_untrained(rows))
  for name in dict.fromkeys([*wanted, *rows]):
    empty = [''] * (len(header) - 2)
    row = rows.get(name)
    if row is None:
      lines.append([f'`{name}`', NOT_MEASURED, *empty])
    elif _is_alias(row, rows):
      lines.append([f'`{name}`', f'= `{row.newest["base"]}`', *empty])
    elif row.newest.get('same_as'):
      # Its base has changed since, and it has not been run.
      lines.append([f'`{name}`', NOT_MEASURED, *empty])
    else:
      records = list(row.by_seed.values())
      cells = _score_cells([_values(x, 'final') for x in records])
      seeds = str(len(records))
      lines.append([f'`{name}`', seeds, *cells, *_cost_cells(records)])
  return markdown(header, lines)


def paired(row: Measured, other: Measured, metric: str) -> list[float]:
  """Differences in points, seed by seed, of those that both have."""
  differences = []
  for seed in row.by_seed:
    if seed in other.by_seed:
      mine, theirs = (
        _values(x.by_seed[seed], 'final').get(metric) for x in (row, other)
      )
      if mine is not None and theirs is not None:
        differences.append(100 * (mine - theirs))
  return differences


def _difference_table(rows: Mapping[str, Measured]) -> str:
  opponents = [x for x in (*_OPPONENTS, _WITHOUT_LOCAL) if x in rows]
  metrics = {'`linear/logreg` top1': LOGREG, 'rank1': RANK1}
  header = [
    '',
    *(
      text
      for opponent in opponents
      for name in metrics
      for text in (f'{name} - `{opponent}`', 'least')
    ),
  ]
  lines = []
  for name, row in rows.items():
    if _is_alias(row, rows) or row.newest.get('same_as'):
      continue
    cells = []
    for opponent in opponents:
      for metric in metrics.values():
        found = paired(row, rows[opponent], metric)
        local = 'augment.num_local' not in row.newest['differs']
        if name == opponent or (local and opponent == _WITHOUT_LOCAL):
          found = []
        least = f'{min(found):+.1f}' if found else ''
        cells += [spread(found, '+.1f') if found else '', least]
    if any(cells):
      lines.append([f'`{name}`', *cells])
  return markdown(header, lines) if lines else ''


def _starts_elsewhere(row: Measured, other: Measured) -> bool:
  """Whether the same seed has drawn another initial encoder."""
  for seed in row.by_seed.keys() & other.by_seed.keys():
    mine, theirs = (_values(x.by_seed[seed], 'init') for x in (row, other))
    if any(mine.get(x) != theirs.get(x) for x in _SCORES.values()):
      return True
  return False


def _notes(rows: Mapping[str, Measured]) -> list[str]:
  """What a reader must know of rows, a line each."""
  notes, first = [], next(iter(rows))
  for name, row in rows.items():
    newest = row.newest
    if newest.get('same_as') or _is_alias(row, rows):
      continue
    said = [newest['note']] if newest.get('note') else []
    base = rows.get(newest['base'])
    if base and newest['base_sha256'] != base.newest['config_sha256']:
      said.append(f'a variant of an earlier `{newest["base"]}`: run it again')
    if newest['differs']:
      fields = ', '.join(f'`config.{x}`' for x in newest['differs'])
      said.append(f'not as in the other rows: {fields}')
    if _starts_elsewhere(row, rows[first]):
      said.append(f'draws another initial encoder than `{first}`')
    if row.old:
      said.append(f'{row.old} older seeds of another config are left out')
    if said:
      notes.append(f'- `{name}`: {"; ".join(said)}')
  return notes


def _commands(rows: Mapping[str, Measured]) -> str:
  commands = [
    next(iter(row.by_seed.values()))['command']
    for row in rows.values()
    if not row.newest.get('same_as')
  ]
  return '\n'.join(f'    {command}' for command in commands)


def _origin(records: Sequence[Record]) -> str:
  """On what the records of a section were made."""

  def several(function: Callable[[Record], Any]) -> str:
    found = {str(function(x)) for x in records if function(x)}
    return ', '.join(sorted(found)) or 'unknown'

  side = several(lambda x: x.get('side_by_side'))
  processor = several(lambda x: x['machine'].get('processor'))
  jax = several(lambda x: x['versions'].get('jax'))
  commit = several(lambda x: x['commit'])
  return f'{processor}; JAX {jax}; commit {commit}; runs side by side: {side}.'


def _section(of: Set | None, name: str, records: Sequence[Record]) -> str:
  rows = measured_rows(records)
  wanted = () if of is None else of.rows or tuple(ROW_BY_NAME)
  trained = [x for x in records if x['rows']]
  blocks = [
    f'### {name}',
    _main_table(rows, wanted) if trained else f'All rows: {NOT_MEASURED}.',
  ]
  if trained:
    blocks += [
      '\n'.join(_notes(rows)),
      'Difference in points, paired by seed:',
      _difference_table(rows) or 'Neither `dino` nor `esvit` is measured.',
      _origin(trained),
      _commands(rows),
    ]
  return '\n\n'.join(filter(None, blocks))


_HEAD = """# Comparison of the methods

Made by `python -m benchmarks.compare`; not to be edited. Per cent, mean ±
sample standard deviation over seeds; `x`: share of the attention that falls on
what is annotated (`parts/hit`) over that of attention that is even, for the
first of {annotations} that a set has. All rows of a set have the same encoder,
images seen, augmentation and evaluation but for what the notes say. Seconds are
of training, the search for parts included; memory is the peak of the process,
the least of the seeds, as compiling takes more than training."""

_TITLES = {
  'test': '## Test',
  'validation': '## Validation, for choosing: no result',
}


def tables(records: Sequence[Record]) -> str:
  """All records as Markdown, the splits apart.

  Args:
    records: of compare.json, or of a smoke test.
  """
  blocks = [_HEAD.format(annotations=', '.join(_ANNOTATIONS))]
  known = {x.name: x for x in (*SETS, SMOKE)}
  of_smoke = any(x['set'] == SMOKE.name for x in records)
  for split in SPLITS:
    found: dict[str, list[Record]] = {}
    if split == 'test':
      listed = (SMOKE,) if of_smoke else SETS
      found = {x.name: [] for x in listed}
    for record in records:
      if record['split'] == split:
        found.setdefault(record['set'], []).append(record)
    if found:
      blocks.append(_TITLES[split])
    blocks += [
      _section(known.get(name), name, group) for name, group in found.items()
    ]
  return '\n\n'.join(blocks) + '\n'


_README_TAIL = """\
Per cent on the test split, mean ± sample standard deviation over seeds, at
equal encoder, images seen and augmentation (`particle` has no local views), by
`python -m benchmarks.compare`. All variants with their commands, where they
look and what they cost: [compare.md](benchmarks/results/compare.md)."""


def readme_block(records: Sequence[Record]) -> str:
  """The short table of README.md, its markers included.

  Args:
    records: of compare.json.
  """
  header = [
    'set',
    'method',
    '`linear/logreg` top1',
    'rank1',
    '`knn/20` top1',
    'seeds',
  ]
  lines = []
  for of in SETS:
    group = [x for x in records if x['set'] == of.name and x['split'] == 'test']
    rows = {
      name: row
      for name, row in measured_rows(group).items()
      if row.newest['rows']
    }
    if not any(name in rows for name in README_ROWS):
      lines.append([of.name, 'all', NOT_MEASURED, '', '', ''])
      continue
    for name in README_ROWS:
      if name not in rows:
        lines.append([of.name, f'`{name}`', NOT_MEASURED, '', '', ''])
        continue
      values = [_values(x, 'final') for x in rows[name].by_seed.values()]
      cells = [
        spread([100 * x[metric] for x in values if metric in x])
        for metric in (LOGREG, RANK1, KNN)
      ]
      lines.append([of.name, f'`{name}`', *cells, str(len(values))])
  return f'{BEGIN}\n{markdown(header, lines)}\n\n{_README_TAIL}\n{END}'


def find_block(text: str) -> str | None:
  """The block of a README between the markers, these included."""
  _, begin, rest = text.partition(BEGIN)
  block, end, _ = rest.partition(END)
  return f'{begin}{block}{end}' if begin and end else None
