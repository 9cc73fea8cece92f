"""The evaluator that docs/extending.md adds."""

import pathlib
import re

import numpy as np
import pytest

from cmd_jax.errors import UserError
from cmd_jax.evaluators import Splits, evaluate, run
from tests import scored_runs

_DOCS = pathlib.Path(__file__).resolve().parents[2] / 'docs' / 'extending.md'


@pytest.fixture
def evaluator(monkeypatch):
  """Made of the file and the entry that the page shows."""
  blocks = re.findall(r'```python\n(.*?)```', _DOCS.read_text(), re.DOTALL)
  file, entry = next(
    (x, y) for x, y in zip(blocks, blocks[1:]) if 'seg/nearest' in y
  )
  names = {}
  exec(file, names)
  module = type('nearest_parts', (), names)
  entries = eval('{' + entry + '}', vars(run) | {'nearest_parts': module})
  monkeypatch.setattr(run, 'EVALUATORS', run.EVALUATORS | entries)
  return run.make_evaluators(['seg/nearest'], {})[0]


def _with_masks(split, seed):
  rng = np.random.default_rng(seed)
  cells = rng.integers(0, 3, (len(split.images), 4, 4), np.uint8)
  return split._replace(part_ids=cells.repeat(4, 1).repeat(4, 2))


class _Network:
  """Its maps tell the parts, but for 1 and 2, which look alike."""

  def feature_maps(self, split):
    codes = np.float16([[1, 0], [0, 1], [0, 1]])
    return codes[split.part_ids[:, ::4, ::4]]


def test_the_example_scores_patches(evaluator):
  splits = scored_runs.make_experiment(labelled=False).splits
  splits = Splits(*(_with_masks(x, i) for i, x in enumerate(splits)))
  evaluator.check(None, splits)
  scores = evaluate([evaluator], _Network(), splits)
  first = splits.train.part_ids[:, ::4, ::4].ravel()
  always = first[first > 0][0]
  parts = splits.test.part_ids[:, ::4, ::4]
  assert scores == pytest.approx(
    {
      'seg/nearest/patches': np.mean((parts == 0) | (parts == always)),
      'seg/nearest/parts': np.mean(parts[parts > 0] == always),
    }
  )
  with pytest.raises(UserError, match='seg/nearest.*leave it out'):
    evaluator.check(None, splits._replace(test=None))
