"""The block of results in docs/results.md, made by `benchmarks.compare`."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

from benchmarks import record
from benchmarks.compare_measured import (
  KNN,
  LOGREG,
  MAP,
  RANK1,
  Record,
  is_outdated,
  measured_rows,
  untrained_values,
  values_of,
)
from benchmarks.compare_rows import FORMER_SETS, SETS
from benchmarks.compare_table import NOT_MEASURED, markdown, spread
from cmd_jax.files.atomic import write_atomically

README = record.REPOSITORY / 'docs' / 'results.md'
BEGIN, END = '<!-- compare:begin -->', '<!-- compare:end -->'
ROWS = ('dino', 'esvit', 'cmd_released', 'cmd', 'particle')

_TAIL = """\
Per cent on the test split, mean ± sample standard deviation over seeds, at
equal encoder, images seen and augmentation (`particle` has no local views). All
variants with their commands, where they look and what they cost:
[compare.md](../benchmarks/results/compare.md). Made by

    {command}"""


def _command(records: Sequence[Record]) -> str:
  """What makes the records; those of the CPU's sets where there are none."""
  made = {x['set'] for x in records}
  sets = [
    x
    for x in (*SETS, *FORMER_SETS)
    if x.name in made or (not made and x.tier == 'cpu')
  ]
  seeds = sorted({x['seed'] for x in records})
  words = [
    'python -m benchmarks.compare',
    f'--set={",".join(x.name for x in sets)}',
    f'--rows={",".join(ROWS)}',
  ]
  if seeds:
    words.append(f'--seeds={",".join(map(str, seeds))}')
  if any(x.folder for x in sets):
    words.append('--photographs=FOLDER')
  return ' '.join(words)


def _cells(values: Sequence[Mapping[str, float]]) -> list[str]:
  return [
    spread([100 * x[metric] for x in values if metric in x])
    for metric in (LOGREG, RANK1, MAP, KNN)
  ]


def readme_block(records: Sequence[Record]) -> str:
  """The short table of docs/results.md, its markers included.

  Args:
    records: of compare.json.
  """
  header = [
    'set',
    'method',
    '`linear/logreg` top1',
    'rank1',
    'mAP',
    '`knn/20` top1',
    'seeds',
  ]
  lines, shown = [], []
  scored = {x['set'] for x in records if x['split'] == 'test'}
  for of in (*SETS, *(x for x in FORMER_SETS if x.name in scored)):
    group = [x for x in records if x['set'] == of.name and x['split'] == 'test']
    rows = {
      name: row
      for name, row in measured_rows(group).items()
      if row.newest['rows']
    }
    if not any(name in rows for name in ROWS):
      lines.append([of.name, 'all', NOT_MEASURED, '', '', '', ''])
      continue
    initial = untrained_values(rows)
    lines.append([of.name, 'untrained', *_cells(initial), str(len(initial))])
    for name in ROWS:
      if name not in rows:
        # Nobody waits for what a former recipe would give.
        if of not in FORMER_SETS:
          lines.append([of.name, f'`{name}`', NOT_MEASURED, '', '', '', ''])
        continue
      shown += rows[name].by_seed.values()
      values = [values_of(x, 'final') for x in rows[name].by_seed.values()]
      seeds = str(len(values))
      if is_outdated(rows[name], rows):
        seeds += ', of another budget, data or recipe'
      lines.append([of.name, f'`{name}`', *_cells(values), seeds])
  tail = _TAIL.format(command=_command(shown))
  return f'{BEGIN}\n{markdown(header, lines)}\n\n{tail}\n{END}'


def find_block(text: str) -> str | None:
  """The block of a README between the markers, these included."""
  _, begin, rest = text.partition(BEGIN)
  block, end, _ = rest.partition(END)
  return f'{begin}{block}{end}' if begin and end else None


def write_readme(records: Sequence[Record], path: pathlib.Path) -> bool:
  """Renews the block of results in docs/results.md.

  Args:
    records: of compare.json.
    path: of the file.

  Returns:
    Whether it has the markers of the block.
  """
  text = path.read_text()
  block = find_block(text)
  if block is None:
    return False
  new = readme_block(records)
  if new != block:
    write_atomically(path, text.replace(block, new))
  return True
