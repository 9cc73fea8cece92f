"""Scores of frozen features, each under the name of its protocol.

An evaluator is a function `(train, test) -> {metric: value}` of two `Features`;
metrics are in [0, 1]. Each is made by a factory, so that a new protocol is one
function and one line in `EVALUATORS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tqdm

from cmd_jax.errors import UserError
from cmd_jax.evaluators.features import Features, extract_features

Evaluator = Callable[[Features, Features], dict[str, float]]

__all__ = [
  'EVALUATORS',
  'Evaluator',
  'Features',
  'evaluate',
  'extract_features',
  'get_evaluator',
]


def _knn_20() -> Evaluator:
  from cmd_jax.evaluators import knn

  return knn.make_knn(k=20, temperature=0.07)


def _linear_logreg() -> Evaluator:
  from cmd_jax.evaluators import linear

  return linear.make_logreg()


def _retrieval_test_vs_train() -> Evaluator:
  from cmd_jax.evaluators import retrieval

  return retrieval.make_retrieval()


def _retrieval_cmd_ratio9() -> Evaluator:
  from cmd_jax.evaluators import retrieval

  return retrieval.make_cmd_ratio9()


EVALUATORS: dict[str, Callable[[], Evaluator]] = {
  'knn/20': _knn_20,
  'linear/logreg': _linear_logreg,
  'retrieval/test-vs-train': _retrieval_test_vs_train,
  'retrieval/cmd-ratio9': _retrieval_cmd_ratio9,
}


def get_evaluator(name: str) -> Evaluator:
  """Makes the evaluator of a protocol.

  Args:
    name: a key of `EVALUATORS`.

  Returns:
    A function `(train, test) -> {metric: value in [0, 1]}`.

  Raises:
    UserError: there is no such protocol; the message lists those there are.
  """
  if name not in EVALUATORS:
    raise UserError(
      f'evaluator {name!r}: unknown protocol; choose from '
      + ', '.join(sorted(EVALUATORS))
    )
  return EVALUATORS[name]()


def evaluate(
  names: Sequence[str],
  train: Features,
  test: Features,
  progress: bool = False,
) -> dict[str, float]:
  """Scores frozen features under several protocols.

  Args:
    names: keys of `EVALUATORS`; all are looked up before the first one runs.
    train: features that a protocol may fit or search; rows labelled -1 are
      dropped.
    test: features that are scored; rows labelled -1 are dropped. A class that
      `train` lacks can't be predicted: its examples count as errors.
    progress: shows a progress bar on stderr.

  Returns:
    {'<protocol>/<metric>': value in [0, 1]}, such as 'knn/20/top1'.

  Raises:
    UserError: an unknown protocol, a split without labels, splits that name
      different classes, or features that aren't finite.
  """
  evaluators = {name: get_evaluator(name) for name in names}
  results = {}
  for name, evaluator in tqdm.tqdm(
    evaluators.items(), desc='evaluate', disable=not progress
  ):
    for metric, value in evaluator(train, test).items():
      results[f'{name}/{metric}'] = value
  return results
