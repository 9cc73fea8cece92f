"""Records of `benchmarks.compare` as Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.compare_measured import (
  LOGREG,
  RANK1,
  Measured,
  Record,
  is_alias,
  is_outdated,
  measured_rows,
  paired,
  scores_of,
  shown_rows,
  starts_elsewhere,
  untrained_values,
  values_of,
)
from benchmarks.compare_rows import (
  SEEDS_FOR_CHOOSING,
  SETS,
  SMOKE,
  SPLITS,
  rows_of,
)

NOT_MEASURED = 'not measured'
_ATTENDING = {'multi-instance': 'mil', "class token's": 'encoder'}
# Of the annotations that a set has, the first says most of what is claimed.
_ANNOTATIONS = ('parts', 'keypoints', 'object', 'box')
_OPPONENTS = ('dino', 'esvit')
# That of the rows without local views.
_WITHOUT_LOCAL = 'dino-global-views'


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


def _score_cells(
  all_values: Sequence[Mapping[str, float]], scores: Iterable[str]
) -> list[str]:
  """Scores in per cent, then ratios."""
  cells = [
    spread([100 * x[metric] for x in all_values if metric in x])
    for metric in scores
  ]
  for who in _ATTENDING.values():
    ratios = [_ratio(x, who) for x in all_values]
    cells.append(spread([x for x in ratios if x is not None], '.2f'))
  return cells


def _cost_cells(records: Sequence[Record]) -> list[str]:
  def mean(name: str) -> str:
    values = [x[name] for x in records if x.get(name) is not None]
    return f'{statistics.mean(values):,.0f}' if values else '-'

  def least(name: str) -> str:
    values = [x[name] for x in records if x.get(name) is not None]
    return f'{min(values):,.0f}' if values else '-'

  peak = least('peak_memory_mib')
  # A program that is compiled takes more than one that is in the cache.
  if len(records) == 1 and peak != '-':
    peak += ' with compilation'
  return [mean('images_seen'), least('train_seconds'), peak]


def _untrained(
  rows: Mapping[str, Measured], scores: Iterable[str]
) -> list[str]:
  """The line of initial encoders."""
  values = untrained_values(rows)
  cells = _score_cells(values, scores)
  return ['untrained', str(len(values)), *cells, '', '', '']


def _main_table(rows: Mapping[str, Measured], wanted: Sequence[str]) -> str:
  costs = ['images seen', 'train s', 'peak MiB']
  looks = [f'{name} attention x' for name in _ATTENDING]
  all_records = [x for row in rows.values() for x in row.by_seed.values()]
  scores = scores_of(all_records)
  metrics = list(scores.values())
  header = ['', 'seeds', *scores, *looks, *costs]
  lines = []
  if any(record['rows'] for record in all_records):
    lines.append(_untrained(rows, metrics))
  for name in dict.fromkeys([*wanted, *rows]):
    empty = [''] * (len(header) - 2)
    row = rows.get(name)
    if row is None:
      lines.append([f'`{name}`', NOT_MEASURED, *empty])
    elif is_alias(row, rows):
      lines.append([f'`{name}`', f'= `{row.newest["base"]}`', *empty])
    elif row.newest.get('same_as'):
      # Its base has changed since, and it has not been run.
      lines.append([f'`{name}`', NOT_MEASURED, *empty])
    else:
      records = list(row.by_seed.values())
      cells = _score_cells([values_of(x, 'final') for x in records], metrics)
      seeds = str(len(records))
      lines.append([f'`{name}`', seeds, *cells, *_cost_cells(records)])
  return markdown(header, lines)


def _difference_table(rows: Mapping[str, Measured]) -> str:
  opponents = [x for x in (*_OPPONENTS, _WITHOUT_LOCAL) if x in rows]
  metrics = {'`linear/logreg` top1': LOGREG, 'rank1': RANK1}
  header = [
    '',
    *(
      text
      for opponent in opponents
      for name in metrics
      for text in (f'{name} - `{opponent}`', 'least of seeds')
    ),
  ]
  lines = []
  for name, row in rows.items():
    if is_alias(row, rows) or row.newest.get('same_as'):
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


def _notes(rows: Mapping[str, Measured]) -> list[str]:
  """What a reader must know of rows, a line each."""
  shown = shown_rows(rows)
  notes, first = [], next(iter(shown), '')
  for name, row in shown.items():
    newest = row.newest
    said = [newest['note']] if newest.get('note') else []
    base = rows.get(newest['base'])
    if base and newest['base_sha256'] != base.newest['config_sha256']:
      said.append(f'a variant of an earlier `{newest["base"]}`: run it again')
    if is_outdated(row, shown):
      said.append('of another budget, data or recipe: run it again')
    if newest['differs']:
      fields = ', '.join(f'`config.{x}`' for x in newest['differs'])
      said.append(f'not as in the other rows: {fields}')
    if starts_elsewhere(row, shown[first]):
      said.append(f'draws another initial encoder than `{first}`')
    if row.old:
      said.append(f'older seeds of another config left out: {row.old}')
    if said:
      notes.append(f'- `{name}`: {"; ".join(said)}')
  return notes


def _notes_on_several(rows: Mapping[str, Measured]) -> list[str]:
  """What a reader must know of several rows at once, a line each."""
  shown = shown_rows(rows)
  records = [x for row in shown.values() for x in row.by_seed.values()]
  if not records:
    return []
  commit = max(records, key=lambda x: x['date'])['commit']
  elsewhere = [
    f'`{name}`'
    for name, row in shown.items()
    if any(x['commit'] != commit for x in row.by_seed.values())
  ]
  notes = []
  if elsewhere:
    listed = ', '.join(elsewhere)
    notes.append(f'- not all of the newest commit ({commit}): {listed}')
  if any(x['split'] == 'test' and x['set'] != SMOKE.name for x in records):
    seeds = {x['seed'] for x in records} & set(SEEDS_FOR_CHOOSING)
    if seeds:
      listed = ', '.join(map(str, sorted(seeds)))
      notes.append(f'- with seeds that settings are chosen with: {listed}')
  return notes


def _scored_images(records: Sequence[Record]) -> str:
  """How far a score may be off because the images are few."""
  counts = sorted({x['test_images'] for x in records if x.get('test_images')})
  if not counts:
    return ''
  errors = ', '.join(f'{100 * math.sqrt(0.25 / n):.1f}' for n in counts)
  return (
    f'Binomial standard error of a score of 50 % of '
    f'{", ".join(map(str, counts))} scored images, in points: {errors}.'
  )


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


def _section(
  name: str, records: Sequence[Record], wanted: Sequence[str]
) -> str:
  """The text of a set; of `wanted`, rows without records have a line too."""
  rows = measured_rows(records)
  trained = [x for x in records if x['rows']]
  blocks = [
    f'### {name}',
    _main_table(rows, wanted) if trained else f'All rows: {NOT_MEASURED}.',
  ]
  if trained:
    blocks += [
      _scored_images(trained),
      '\n'.join([*_notes(rows), *_notes_on_several(rows)]),
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
first of {annotations} that a set has. Where the
encoder pools by the mean (small ViTs) the class token of the last block is
trained by no loss; a Swin has none, and the column is the attention that its
patches receive. All rows of a set have the same encoder, images seen,
augmentation and evaluation but for what the notes say.

Settings are chosen with seeds {first} to {last} on the validation splits; the
test splits have others, with which nothing is chosen. Seconds are of training,
the search for parts included, memory is the peak of the process: the least of
the seeds, as other work on the machine adds to the one and compiling to the
other. One look at the test split of toybirds, with seeds 0 to 2, led to the
warm-up of the terms, and the budget of 12 epochs was added after that of 20 had
been scored (RESEARCH.md)."""

_TITLES = {
  'test': '## Test',
  'validation': '## Validation, for choosing: no result',
}


def tables(records: Sequence[Record]) -> str:
  """All records as Markdown, the splits apart.

  Args:
    records: of compare.json, or of a smoke test.
  """
  head = _HEAD.format(
    annotations=', '.join(_ANNOTATIONS),
    first=SEEDS_FOR_CHOOSING[0],
    last=SEEDS_FOR_CHOOSING[-1],
  )
  blocks = [head]
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
    for name, group in found.items():
      wanted: Sequence[str] = ()
      # Settings are chosen with the rows that it takes.
      if split == 'test' and name in known:
        wanted = known[name].rows or tuple(rows_of(known[name]))
      blocks.append(_section(name, group, wanted))
  return '\n\n'.join(blocks) + '\n'
