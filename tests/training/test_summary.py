"""What a person reads at the end of a run that started from knowledge."""

import types

import pytest

from cmd_jax.training import summary

_INIT = {'knn/20/top1': 0.8, 'knn/20/top5': 0.9, 'retrieval/x/rank1': 0.7}


def _lines(final, imported='weights.pth', keep_best='', **results):
  experiment = types.SimpleNamespace(
    imported=imported and types.SimpleNamespace(path=imported),
    steps=types.SimpleNamespace(keep_best=keep_best),
  )
  return summary._below_start(
    experiment, {'init': _INIT, 'final': final, **results}
  )


@pytest.mark.parametrize(
  'final, said',
  [
    ({**_INIT, 'knn/20/top1': 0.75}, 'knn/20/top1 (80.0 -> 75.0)'),
    ({**_INIT, 'retrieval/x/rank1': 0.6}, 'retrieval/x/rank1 (70.0 -> 60.0)'),
  ],
)
def test_an_end_below_the_start_is_said_with_what_to_change(final, said):
  (line,) = _lines(final)
  assert said in line and line.count('->') == 1
  assert 'base_learning_rate' in line and 'keep_best=auto' in line
  assert '--weights=weights.pth' in line
  assert 'keep_best' not in _lines(final, keep_best='rank1')[0]


def test_as_good_or_better_or_drawn_is_not_below():
  # What the table rounds away, and what is not shown as the main number.
  final = {**_INIT, 'knn/20/top1': 0.79999, 'knn/20/top5': 0.1}
  assert not _lines(final)
  assert not _lines({name: 0.1 for name in _INIT}, imported=None)


def test_without_labels_the_effective_rank_tells():
  scores = {'start': {'rankme': 300.0}, 'end': {'rankme': 12.0}}
  (line,) = _lines({}, while_training=scores)
  assert 'effective rank of the embeddings (300.0 -> 12.0)' in line
  assert not _lines({}, while_training={'start': {'rankme': 3.0}, 'end': {}})
