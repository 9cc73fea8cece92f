import json

from cmd_jax.report import history


def test_lines_become_columns_and_damaged_ones_are_left_out(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(
    '{"step": 1, "loss": 3.14159265, "epoch": 0.5}\n'
    '{"loss": 3}\n'
    '{"step": 2, "loss": NaN, "learning_rate": 1e-3}\n'
    '{"step": 3, "lo'
  )
  curves = history.read_curves(path)
  assert curves == {
    'step': [1, 2],
    'series': {'learning_rate': [None, 1e-3], 'loss': [3.14159, None]},
  }
  empty = {'step': [], 'series': {}}
  assert history.read_curves(tmp_path / 'missing.jsonl') == empty


def test_long_runs_are_thinned_out(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(''.join(f'{{"step": {i}}}\n' for i in range(5001)))
  steps = history.read_curves(path)['step']
  assert steps == list(range(0, 5001, 3))


def test_scores_share_the_line_of_their_step_and_are_never_left_out(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  lines = [{'step': 0, 'eval/knn': 0.25}]
  for step in range(1, 5001):
    lines.append({'step': step, 'loss': 1.0})
    if step in (2, 4):
      lines.append({'step': step, 'eval/knn': 0.5})
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  curves = history.read_curves(path)
  assert curves['step'] == sorted({*range(0, 5001, 3), 2, 4})
  scored = zip(curves['step'], curves['series']['eval/knn'])
  assert {k: v for k, v in scored if v} == {0: 0.25, 2: 0.5, 4: 0.5}
  assert curves['series']['loss'][1] == 1.0


def test_the_table_has_every_score_once():
  rows = history.table({'init': {'a/x': 0.1, 'b/y': 0.2}, 'final': {'b/y': 1}})
  assert rows == [
    {'name': 'b/y', 'init': 0.2, 'final': 1},
    {'name': 'a/x', 'init': 0.1, 'final': None},
  ]
  assert history.table({}) == []
