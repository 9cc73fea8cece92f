"""What the tables of the comparison say of made-up records."""

import pytest

from benchmarks import compare_readme, compare_runs, compare_table, record
from benchmarks.compare_rows import MAIN_ROWS, ROWS, SETS

_DAY = '2026-01-{:02d}T00:00:00+00:00'


def _record(row, seed, score, **fields):
  """A record whose scores are `score`, in per cent."""
  scores = {
    'knn/20/top1': score,
    'linear/logreg/top1': score + 10,
    'retrieval/test-vs-train/rank1': score - 10,
    'retrieval/test-vs-train/mAP': 5,
    'parts/hit/object/uniform': 50,
    'parts/hit/object/encoder_mass': 50,
    'parts/hit/parts/uniform': 10,
    'parts/hit/parts/encoder_mass': 15,
  }
  if row.startswith('cmd'):
    scores['parts/hit/parts/mil_mass'] = 20 + seed
  return {
    'tier': 'cpu',
    'set': 'toybirds',
    'split': 'test',
    'row': row,
    'seed': seed,
    'command': f'python main.py --config.seed={seed} # {row}',
    'date': _DAY.format(1),
    'commit': 'abc',
    'machine': {'processor': 'some chip'},
    'versions': {'jax': '1.2'},
    'config_sha256': row,
    'shared_sha256': 'shared',
    'base_sha256': 'cmd' if row.startswith('cmd-') else '',
    'base': 'cmd' if row.startswith('cmd-') else '',
    'note': '',
    'differs': [],
    'test_images': 960,
    'steps': 10,
    'images_seen': 48000,
    'train_seconds': 100.0 + seed,
    'wall_seconds': 120.0,
    'peak_memory_mib': 1000 + seed,
    'side_by_side': 2,
    'load_average': [1.0, 2.0],
    'rows': [
      {'metric': name, 'init': 0.1, 'final': value / 100}
      for name, value in scores.items()
    ],
    **fields,
  }


def _line(text, name):
  """Cells of the first line of a table that begins with a name."""
  line = next(x for x in text.splitlines() if x.startswith(f'| {name} |'))
  return [cell.strip() for cell in line.split('|')[2:-1]]


def _three(row, *scores, **fields):
  return [_record(row, seed, x, **fields) for seed, x in enumerate(scores)]


def test_mean_and_sample_deviation_over_seeds():
  text = compare_table.tables(_three('cmd', 30, 32, 37))
  assert _line(text, '`cmd`') == [
    '3',
    '33.0 ± 3.6',
    '43.0 ± 3.6',
    '23.0 ± 3.6',
    '5.0 ± 0.0',
    '2.10 ± 0.10',
    '1.50 ± 0.00',
    '48,000',
    '100',
    '1,000',
  ]
  assert _line(text, 'untrained')[:3] == ['3', '10.0 ± 0.0', '10.0 ± 0.0']
  # The first seed alone has been compiled.
  one = compare_table.tables(_three('cmd', 30))
  assert _line(one, '`cmd`')[-1] == '1,000 with compilation'
  assert compare_table.spread([1.0]) == '1.0'
  assert compare_table.spread([]) == '-'


def test_sets_with_part_masks_have_a_column_of_them():
  plain, parted = _record('dino', 0, 30), _record('cmd', 0, 40)
  assert 'mIoU' not in compare_table.tables([plain])
  parted['rows'].append(
    {'metric': 'seg/pascub5/miou', 'init': 0.12, 'final': 0.34}
  )
  text = compare_table.tables([plain, parted])
  assert 'parts, mIoU' in text
  assert _line(text, 'untrained')[5] == '12.0'
  assert _line(text, '`cmd`')[5] == '34.0'
  assert _line(text, '`dino`')[5] == '-'


def test_differences_are_paired_by_seed():
  records = [*_three('dino', 30, 40, 50), *_three('cmd', 31, 42, 56)]
  # A seed that only one of them has says nothing.
  records.append(_record('cmd', 7, 99))
  _, _, text = compare_table.tables(records).partition('paired by seed')
  assert _line(text, '`cmd`') == ['+3.0 ± 2.6', '+1.0'] * 2
  assert text.count('| least of seeds |') == 2
  assert '| `dino` |' not in text
  assert '`esvit`' not in text


def test_what_was_not_run_says_so():
  text = compare_table.tables(_three('dino', 30))
  assert _line(text, '`cmd_released`')[0] == compare_table.NOT_MEASURED
  for name in MAIN_ROWS:
    assert f'| `{name}` |' in text
  assert '`cmd-no-region`' not in text
  text = compare_table.tables([_record('dino', 0, 30, set='toybirds-12ep')])
  for row in ROWS:
    assert (f'| `{row.name}` |' in text) != row.asks_weights
  for of in SETS:
    assert f'### {of.name}\n' in text
  assert text.count(f'All rows: {compare_table.NOT_MEASURED}.') == len(SETS) - 1
  assert '-' in _line(text, '`dino`')


def test_a_variant_that_is_the_default_is_not_run_twice():
  alias = _record('cmd-sinkhorn', 0, 0, rows=[], config_sha256='cmd')
  alias['same_as'] = 'cmd'
  records = [*_three('cmd', 30), alias]
  text = compare_table.tables(records)
  assert _line(text, '`cmd-sinkhorn`')[0] == '= `cmd`'
  # The default is another one now.
  newer = _record('cmd', 0, 35, config_sha256='new', date=_DAY.format(2))
  text = compare_table.tables([newer, alias])
  assert _line(text, '`cmd-sinkhorn`')[0] == compare_table.NOT_MEASURED
  # A measured variant has become the default.
  variant = _record('cmd-centring', 0, 35, config_sha256='new')
  text = compare_table.tables([newer, variant])
  assert _line(text, '`cmd-centring`')[0] == '= `cmd`'


def test_records_of_other_configs_are_not_mixed_in():
  new = _record('cmd', 0, 50, config_sha256='new', date=_DAY.format(2))
  variant = _record('cmd-no-region', 0, 20)
  text = compare_table.tables([*_three('cmd', 30, 30)[1:], new, variant])
  assert _line(text, '`cmd`')[:2] == ['1', '50.0']
  assert '`cmd`: older seeds of another config left out: 1' in text
  assert '`cmd-no-region`: a variant of an earlier `cmd`: run it again' in text


def test_what_is_unequal_is_noted():
  note = dict(note='no local views', differs=['augment.num_local'])
  text = compare_table.tables([_record('particle', 0, 20, **note)])
  assert (
    '- `particle`: no local views; not as in the other rows: '
    '`config.augment.num_local`'
  ) in text
  assert 'python main.py --config.seed=0 # particle' in text
  assert 'some chip; JAX 1.2; commit abc; runs side by side: 2.' in text


def test_another_initial_encoder_is_noted():
  other = _record('particle', 0, 20)
  other['rows'][0] = {**other['rows'][0], 'init': 0.2}
  text = compare_table.tables([*_three('dino', 30), other])
  assert '- `particle`: draws another initial encoder than `dino`' in text
  assert _line(text, 'untrained')[1] == '10.0'
  # The same to rounding; nothing is said of a score that one of them lacks,
  # and rows without scores are nothing to compare with.
  other['rows'][0]['init'] = 0.1009
  del other['rows'][1]
  alias = _record('dino', 0, 0, rows=[], same_as='dino')
  text = compare_table.tables([alias, *_three('esvit', 30), other])
  assert 'another initial encoder' not in text
  other['rows'][0]['init'] = 0.102
  text = compare_table.tables([alias, *_three('esvit', 30), other])
  assert '- `particle`: draws another initial encoder than `esvit`' in text


def test_rows_of_another_budget_or_recipe_are_noted():
  said = 'of another budget, data or recipe'
  newer = dict(shared_sha256='new', date=_DAY.format(2))
  records = [*_three('dino', 30, 31), *_three('cmd', 30, **newer)]
  text = compare_table.tables(records)
  assert f'- `dino`: {said}: run it again' in text
  assert f'`cmd`: {said}' not in text
  block = compare_readme.readme_block(records)
  (line,) = (x for x in block.splitlines() if 'toybirds | `dino`' in x)
  assert line.endswith(f'| 2, {said} |')
  assert block.count(said) == 1
  # One of its seeds is enough.
  records[1]['shared_sha256'] = 'new'
  assert f'- `dino`: {said}' in compare_table.tables(records)
  records[0]['shared_sha256'] = 'new'
  assert said not in compare_table.tables(records)


def test_other_commits_and_seeds_for_choosing_are_noted():
  newer = dict(commit='def', date=_DAY.format(2))
  records = [
    *(_record(row, 10, 30) for row in ('dino', 'esvit')),
    _record('cmd', 10, 30, **newer),
  ]
  text = compare_table.tables(records)
  assert '- not all of the newest commit (def): `dino`, `esvit`\n' in text
  assert 'settings are chosen with:' not in text
  records = [*_three('cmd', 30, 31), _record('cmd', 10, 30)]
  text = compare_table.tables(records)
  assert '- with seeds that settings are chosen with: 0, 1\n' in text
  assert 'not all of the newest commit' not in text
  for record_ in records:
    record_['split'] = 'validation'
  text = compare_table.tables(records)
  assert 'settings are chosen with:' not in text


def test_the_head_says_what_the_class_token_is_trained_by():
  text = compare_table.tables(_three('dino', 30))
  head, _, rest = text.partition('## Test')
  assert 'the class token of the last block is trained by no loss' in (
    ' '.join(head.split())
  )
  assert "| class token's attention x |" in rest
  assert 'Settings are chosen with seeds 0 to 4' in head


def test_the_error_of_a_score_of_so_many_images_is_said():
  text = compare_table.tables(_three('dino', 30))
  assert 'of 50 % of 960 scored images, in points: 1.6.' in text
  text = compare_table.tables(_three('dino', 30, test_images=None))
  assert 'Binomial' not in text


def test_rows_without_local_views_have_a_reference_of_their_own():
  records = [
    *_three('dino', 30, 30),
    *_three('dino-global-views', 20, 20, differs=['augment.num_local']),
    *_three('cmd', 40, 40),
    *_three('particle', 25, 26, differs=['augment.num_local']),
  ]
  _, _, text = compare_table.tables(records).partition('paired by seed')
  assert _line(text, '`particle`')[4:6] == ['+5.5 ± 0.7', '+5.0']
  assert _line(text, '`cmd`')[4:] == [''] * 4


def test_validation_scores_stay_out_of_the_table_of_test_scores():
  records = [
    *_three('dino', 30),
    *_three('dino', 77.7, split='validation'),
    *_three('mine', 66.6, split='validation'),
  ]
  test, _, validation = compare_table.tables(records).partition('## Validation')
  assert '77.7' not in test and '`mine`' not in test
  assert _line(validation, '`dino`')[1] == '77.7'
  assert _line(validation, '`mine`')[1] == '66.6'
  assert 'not measured' in test
  assert 'not measured' not in validation
  assert '77.7' not in compare_readme.readme_block(records)


def test_the_block_of_the_readme(tmp_path):
  records = [*_three('dino', 30, 40), *_three('cmd-no-region', 50)]
  block = compare_readme.readme_block(records)
  lines = block.splitlines()
  assert (lines[0], lines[-1]) == (compare_readme.BEGIN, compare_readme.END)
  assert lines[-2] == (
    '    python -m benchmarks.compare --set=toybirds '
    '--rows=dino,esvit,cmd_released,cmd,particle --seeds=0,1'
  )
  values = '45.0 ± 7.1 | 25.0 ± 7.1 | 5.0 ± 0.0 | 35.0 ± 7.1'
  assert f'| toybirds | `dino` | {values} | 2 |' in block
  initial = ' | '.join(['10.0 ± 0.0'] * 4)
  assert f'| toybirds | untrained | {initial} | 2 |' in block
  assert '| toybirds | `particle` | not measured |  |  |  |  |' in block
  assert '| cub100-swin-t | all | not measured |  |  |  |  |' in block
  assert 'no-region' not in block
  readme = tmp_path / 'README.md'
  readme.write_text('before\n')
  assert not compare_readme.write_readme(records, readme)
  begin, end = compare_readme.BEGIN, compare_readme.END
  readme.write_text(f'before\n{begin}\nold\n{end}\nafter\n')
  assert compare_readme.write_readme(records, readme)
  assert readme.read_text() == f'before\n{block}\nafter\n'
  assert compare_readme.write_readme([], readme)
  assert '45.0' not in readme.read_text()


def test_readme_has_the_markers_of_its_block():
  text = compare_readme.README.read_text()
  assert compare_readme.find_block(text) is not None


def test_readme_and_tables_are_those_of_the_records():
  path = record.RESULTS / 'compare.json'
  if not path.exists():
    pytest.skip('nothing was compared yet')
  records = record.read(path)
  keys = [tuple(x[name] for name in compare_runs.KEY) for x in records]
  assert len(set(keys)) == len(keys)
  assert path.with_suffix('.md').read_text() == compare_table.tables(records)
  if any(x['split'] == 'test' for x in records):
    block = compare_readme.find_block(compare_readme.README.read_text())
    assert block == compare_readme.readme_block(records)
