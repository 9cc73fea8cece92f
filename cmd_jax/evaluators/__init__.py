"""Scores of frozen features, each under the name of its protocol.

An evaluator is a function `(train, test) -> {metric: value}` of two `Features`;
metrics are in [0, 1]. Each is made by a factory, so that a new protocol is one
function and one line in `EVALUATORS`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from cmd_jax.errors import UserError
from cmd_jax.evaluators.features import Features, extract_features

Evaluator = Callable[[Features, Features], dict[str, float]]

__all__ = [
  'EVALUATORS',
  'OF_LAST_BLOCKS',
  'OF_MAPS',
  'Evaluator',
  'Features',
  'check_protocol',
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


def _retrieval_loo_test() -> Evaluator:
  from cmd_jax.evaluators import retrieval

  return retrieval.make_loo()


def _retrieval_cmd_ratio9() -> Evaluator:
  from cmd_jax.evaluators import retrieval

  return retrieval.make_cmd_ratio9()


def _linear_esvit4() -> Evaluator:
  from cmd_jax.evaluators import linear_sgd

  return linear_sgd.make_esvit4()


def _labels(percent: int) -> Evaluator:
  from cmd_jax.evaluators import labels

  return labels.make_label_share(percent)


EVALUATORS: dict[str, Callable[[], Evaluator]] = {
  'knn/20': _knn_20,
  'linear/logreg': _linear_logreg,
  'linear/esvit4': _linear_esvit4,
  **{
    f'labels/{percent}': functools.partial(_labels, percent)
    for percent in (10, 20, 50, 100)
  },
  'retrieval/test-vs-train': _retrieval_test_vs_train,
  'retrieval/loo-test': _retrieval_loo_test,
  'retrieval/cmd-ratio9': _retrieval_cmd_ratio9,
}


# Protocols of maps and masks: part_segmentation and attention_hit.
OF_MAPS = ('parts/hit', 'seg/pascub5')
# Protocols whose features are those of `models.last_blocks`, not the embedding.
OF_LAST_BLOCKS = ('linear/esvit4',)


def check_protocol(name: str) -> None:
  """Raises UserError for a protocol that doesn't exist, with those that do."""
  known = sorted((*EVALUATORS, *OF_MAPS))
  if name not in known:
    raise UserError(
      f'evaluator {name!r}: unknown protocol; choose from {", ".join(known)}'
    )


def get_evaluator(name: str) -> Evaluator:
  """Makes the evaluator of a protocol.

  Args:
    name: a key of `EVALUATORS`.

  Returns:
    A function `(train, test) -> {metric: value in [0, 1]}`.

  Raises:
    UserError: there is no such protocol; the message lists those there are.
  """
  check_protocol(name)
  return EVALUATORS[name]()


def evaluate(
  names: Sequence[str], train: Features, test: Features
) -> dict[str, float]:
  """Scores frozen features under several protocols.

  Args:
    names: keys of `EVALUATORS`; all are looked up before the first one runs.
    train: features that a protocol may fit or search; rows labelled -1 are
      dropped.
    test: features that are scored; rows labelled -1 are dropped. A class that
      `train` lacks can't be predicted: its examples count as errors.

  Returns:
    {'<protocol>/<metric>': value in [0, 1]}, such as 'knn/20/top1'.

  Raises:
    UserError: an unknown protocol, a split without labels, splits that name
      different classes, or features that aren't finite.
  """
  evaluators = {name: get_evaluator(name) for name in names}
  return {
    f'{name}/{metric}': value
    for name, evaluator in evaluators.items()
    for metric, value in evaluator(train, test).items()
  }
