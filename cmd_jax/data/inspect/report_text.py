"""The data report in words, and what of it is worth a line before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cmd_jax.data.canvas import printable
from cmd_jax.data.inspect.kinds import TOP

TEXT_FILE, JSON_FILE = 'data_report.txt', 'data_report.json'

_SHOWN = 5
# What a histogram's longest bar measures.
_BAR = 30
_IMBALANCE = 10


def _names(names: Sequence[str]) -> str:
  return ', '.join(printable(name) for name in names)


def _some(facts: Mapping[str, Any]) -> str:
  more = ', ...' if facts['count'] > len(facts['first']) else ''
  return f'{facts["count"]:,} ({_names(facts["first"])}{more})'


def _cut(names: Sequence[str]) -> str:
  more = len(names) - _SHOWN
  return _names(names[:_SHOWN]) + (f' and {more:,} more' if more > 0 else '')


def _sample_of(split: Mapping[str, Any]) -> str:
  if split['looked_at'] == split['used']:
    return ''
  return f' (of {split["looked_at"]:,} images looked at, evenly spaced)'


def _class_lines(split: Mapping[str, Any]) -> list[str]:
  classes = split['classes']
  if not classes['count']:
    return ['  classes: none, the images are not labelled']
  if classes['min'] == classes['max']:
    sizes = f'{classes["min"]:,} images each'
    ends = ()
  else:
    sizes = (
      f'{classes["min"]:,} to {classes["max"]:,} images, median '
      f'{classes["median"]:g}'
    )
    ends = (('smallest', 'fewest'), ('largest', 'most'))
  count = f'{classes["count"]:,}'
  if classes['absent']:
    count = f'{classes["count"] - len(classes["absent"]):,} of {count}'
  lines = [f'  classes: {count}, {sizes}']
  for key, word in ends:
    listed = ', '.join(f'{printable(n)} {c:,}' for n, c in classes[key])
    lines.append(f'    {word}: {listed}')
  if classes['absent']:
    lines.append(f'    no images: {_cut(classes["absent"])}')
  if split['unlabelled']:
    lines.append(f'    without a label: {split["unlabelled"]:,} images')
  return lines


def _histogram_lines(title: str, facts: Mapping[str, Any]) -> list[str]:
  if not facts:
    return []
  lines = [
    f'  {title}: {facts["min"]:g} to {facts["max"]:g}, median '
    f'{facts["median"]:g}'
  ]
  bins = list(facts['histogram'].items())
  filled = [i for i, (_, count) in enumerate(bins) if count]
  longest = max(facts['histogram'].values())
  for label, count in bins[filled[0] : filled[-1] + 1]:
    bar = '#' * -(-count * _BAR // longest)
    lines.append(f'    {label:>9} {count:>9,} {bar}'.rstrip())
  return lines


def _kind_line(split: Mapping[str, Any]) -> str:
  if split.get('channels', 3) != 3:
    return f'  files of {split["channels"]} channels, kept in 16 bits'
  if split['kinds'] is None:
    return '  kinds of files: not known'
  found = [
    f'{kind} {_some(facts)}'
    for kind, facts in split['kinds'].items()
    if facts['count']
  ]
  return f'  files converted to RGB: {"; ".join(found) or "none but RGB"}'


def _deep_lines(split: Mapping[str, Any]) -> list[str]:
  deep = split['sixteen_bits']
  if not deep:
    return []
  dark = deep['dark']['count']
  line = (
    f'  values of the {deep["count"]:,} files of 16 bits: {deep["low"]:,} to '
    f'{deep["high"]:,} of {TOP:,}'
  )
  return [
    f'{line}; {dark:,} have none above {deep["dark_high"]:,}' if dark else line
  ]


def _white(high: int) -> int:
  """The largest value of as many bits as `high` takes, at least eight."""
  return 2 ** max(high.bit_length(), 8) - 1


def _skip_lines(split: Mapping[str, Any]) -> list[str]:
  lines = [
    f'    {printable(name)}: {reason}'
    for name, reason in split['skipped_images'][:_SHOWN]
  ]
  more = split['skipped'] - len(lines)
  return lines + ([f'    and {more:,} more'] if more > 0 else [])


def _split_lines(role: str, split: Mapping[str, Any]) -> list[str]:
  is_partial = split['is_streamed'] and split['looked_at'] < split['used']
  lines = [
    f'{role}: {printable(split["name"])}',
    f'  images: {split["images_in"]:,} in = {split["used"]:,} used + '
    f'{split["skipped"]:,} skipped'
    + (' as far as they were looked at' if is_partial else ''),
    *_skip_lines(split),
    *(f'  {note}' for note in split['notes']),
    *_class_lines(split),
    *_histogram_lines(
      f'shorter side in pixels{_sample_of(split)}', split['shorter_side_px']
    ),
    *_histogram_lines('longer side / shorter side', split['aspect_ratio']),
    _kind_line(split),
    *_deep_lines(split),
  ]
  if split['one_colour']['count']:
    lines.append(
      f'  of nearly one colour: {_some(split["one_colour"])}; not compared '
      'with others'
    )
  lines.append(
    f'  canvases: {split["canvas_px"]} x {split["canvas_px"]} pixels, '
    f'{split["canvas_bytes"] / 2**20:,.1f} MiB; larger than '
    f'{split["smaller_than_canvas"]:,} of the images'
  )
  return lines


def _pair_lines(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
  def shown(image):
    label = '' if image['class'] is None else f' [{printable(image["class"])}]'
    return f'{image["split"]} {printable(image["file"])}{label}'

  lines = [
    f'    {shown(pair["a"])} = {shown(pair["b"])}'
    if pair['distance'] < 0
    else f'    {shown(pair["a"])} ~ {shown(pair["b"])} '
    f'({pair["distance"]} of 64 bits differ)'
    for pair in pairs[:_SHOWN]
  ]
  more = len(pairs) - _SHOWN
  return lines + ([f'    more in {JSON_FILE}'] if more > 0 else [])


def _leaks(report: Mapping[str, Any]) -> list[str]:
  """One line for each ordered pair of splits that share images."""
  roles = list(report['splits'])
  lines = []
  for number, b in enumerate(roles):
    for a in roles[number + 1 :]:
      counts = report['duplicates']['images'][a][b]
      if counts['twins']:
        lines.append(
          f'{counts["twins"]:,} of {report["splits"][a]["looked_at"]:,} {a} '
          f'images have a twin in {b} ({counts["copies"]:,} of them a copy)'
        )
  return lines


def _repeats(report: Mapping[str, Any]) -> list[str]:
  """One line for each split with duplicates of its own."""
  lines = []
  for role, split in report['splits'].items():
    counts = report['duplicates']['images'][role][role]
    if counts['twins']:
      lines.append(
        f'{counts["twins"]:,} of {split["looked_at"]:,} {role} images have a '
        f'twin in {role} ({counts["copies"]:,} of them a copy)'
      )
  return lines


def _duplicate_lines(report: Mapping[str, Any]) -> list[str]:
  facts = report['duplicates']
  lines = [
    'duplicates: = is a copy, the same canvas byte for byte; ~ is nearly so, '
    'by a perceptual hash'
  ]
  if any(s['looked_at'] < s['used'] for s in report['splits'].values()):
    lines.append('  only among the images looked at: there may be more')
  for sentences, pairs in (
    (_leaks(report), facts['pairs']['across']),
    (_repeats(report), facts['pairs']['within']),
  ):
    lines += [f'  {sentence}' for sentence in sentences]
    lines += _pair_lines(pairs)
  if facts['other_label']:
    lines.append(
      f'  {facts["other_label"]:,} images have a twin with another label'
    )
    lines += _pair_lines(_conflicting(report))
  if len(lines) == 1:
    lines.append('  none')
  return lines


def _conflicting(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  pairs = report['duplicates']['pairs']
  return [
    pair
    for pair in (*pairs['across'], *pairs['within'])
    if None not in (pair['a']['class'], pair['b']['class'])
    and pair['a']['class'] != pair['b']['class']
  ]


def report_text(report: Mapping[str, Any]) -> str:
  """All of a data report, for a person.

  Args:
    report: from `report.make_report`.

  Returns:
    Lines, each ended by a newline, with what JSON has in full cut short.
  """
  lines = []
  for role, split in report['splits'].items():
    lines += [*_split_lines(role, split), '']
  lines += _duplicate_lines(report)
  if report['placement']:
    lines += ['', report['placement']]
  return '\n'.join(lines) + '\n'


def _notable_in(role: str, split: Mapping[str, Any]) -> list[str]:
  lines = []
  classes = split['classes']
  if classes.get('absent'):
    lines.append(
      f'{len(classes["absent"]):,} of {classes["count"]:,} classes have no '
      f'{role} images ({_cut(classes["absent"])})'
    )
  if classes.get('max', 0) >= _IMBALANCE * max(classes.get('min', 0), 1):
    lines.append(
      f'{role} classes have {classes["min"]:,} to {classes["max"]:,} images'
    )
  if split['one_colour']['count']:
    lines.append(
      f'{role} images of nearly one colour: {_some(split["one_colour"])}'
    )
  deep = split['sixteen_bits']
  if deep and deep['dark']['count']:
    lines.append(
      f'{role} images of 16 bits have values up to {deep["dark_high"]:,} of '
      f'{TOP:,} alone and look nearly black: {_some(deep["dark"])}; for '
      f'grey ones set --config.grey16_white={_white(deep["dark_high"])}'
    )
  stretched = split['smaller_than_canvas']
  if stretched > split['looked_at'] / 2:
    lines.append(
      f'{stretched:,} of {split["looked_at"]:,} {role} images are smaller than '
      f'config.canvas_px {split["canvas_px"]}'
    )
  return lines


def notable(report: Mapping[str, Any]) -> list[str]:
  """What of a data report a researcher should know before training.

  Args:
    report: from `report.make_report`.

  Returns:
    Sentences; none if nothing is notable. Images that were skipped are not
    among them.
  """
  lines = _leaks(report)
  if report['duplicates']['other_label']:
    lines.append(
      f'{report["duplicates"]["other_label"]:,} images have a twin with '
      'another label'
    )
  lines += _repeats(report)
  for role, split in report['splits'].items():
    lines += _notable_in(role, split)
  # Splits of one folder have the same.
  notes = (x for split in report['splits'].values() for x in split['notes'])
  return [*lines, *dict.fromkeys(notes)]
