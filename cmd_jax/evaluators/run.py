"""The protocols by name, and a frozen network scored under some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import linen as nn

from cmd_jax.data.sources.base import UNLABELLED
from cmd_jax.errors import UserError
from cmd_jax.evaluators import (
  attention_hit,
  knn,
  labels,
  linear,
  linear_sgd,
  part_segmentation,
  retrieval,
)
from cmd_jax.evaluators.base import Evaluator, Splits
from cmd_jax.evaluators.frozen_network import FrozenNetwork
from cmd_jax.files.safe_read import one_line
from cmd_jax.models.pooling import check_pooling

# (name of the protocol, config.eval) -> evaluator.
Factory = Callable[[str, Mapping[str, Any]], Evaluator]


def _of_vectors(
  read: Callable, make: Callable[..., Callable], **arguments: Any
) -> Factory:
  """The factory of what scores vectors.

  Args:
    read: (network, split) -> `Features`.
    make: makes (features of train, features of test) -> {metric: value}.
    **arguments: of `make`.
  """

  def factory(name: str, settings: Mapping[str, Any]) -> Evaluator:
    del settings
    score = make(**arguments)

    def run(network: FrozenNetwork, splits: Splits) -> dict[str, float]:
      return score(*(read(network, split) for split in splits))

    return Evaluator(name, run)

  return factory


def _of_embeddings(make: Callable[..., Callable], **arguments: Any) -> Factory:
  """The factory of what scores embeddings; see `_of_vectors`."""
  return _of_vectors(
    lambda network, x: network.embeddings(x), make, **arguments
  )


def _of_last_blocks(make: Callable[..., Callable], **arguments: Any) -> Factory:
  """The factory of what scores the last blocks; see `_of_vectors`."""
  return _of_vectors(
    lambda network, x: network.last_blocks(x), make, **arguments
  )


def _as_searched(make: Callable[..., Callable], **arguments: Any) -> Factory:
  """The factory of what scores embeddings made as config.eval.search says."""

  def factory(name: str, settings: Mapping[str, Any]) -> Evaluator:
    fields = settings['search']
    of_vectors = _of_vectors(
      lambda network, x: network.embeddings(x, **fields), make, **arguments
    )

    def check(encoder: nn.Module, splits: Splits) -> None:
      del splits
      check_pooling(encoder, fields['pooling'], 'config.eval.search.pooling')

    return of_vectors(name, settings)._replace(check=check)

  return factory


def _of_network(make: Callable[..., Evaluator], section: str = '') -> Factory:
  """The factory of what asks the network for more than vectors.

  Args:
    make: makes the evaluator.
    section: name of the sub-dict of config.eval that has its arguments; empty
      for none.
  """
  return lambda _, settings: make(**(settings[section] if section else {}))


EVALUATORS: dict[str, Factory] = {
  'knn/20': _of_embeddings(knn.make_knn, k=20),
  'linear/logreg': _of_embeddings(linear.make_logreg),
  'linear/esvit4': _of_last_blocks(linear_sgd.make_esvit4),
  'labels/10': _of_embeddings(labels.make_label_share, percent=10),
  'labels/20': _of_embeddings(labels.make_label_share, percent=20),
  'labels/50': _of_embeddings(labels.make_label_share, percent=50),
  'labels/100': _of_embeddings(labels.make_label_share, percent=100),
  'retrieval/test-vs-train': _of_embeddings(retrieval.make_retrieval),
  'retrieval/test-vs-train-centred': _of_embeddings(retrieval.make_centred),
  'retrieval/search': _as_searched(retrieval.make_as_searched),
  'retrieval/loo-test': _of_embeddings(retrieval.make_loo),
  'retrieval/cmd-ratio9': _of_embeddings(retrieval.make_cmd_ratio9),
  'parts/hit': _of_network(attention_hit.make_attention_hit, 'parts_hit'),
  'seg/pascub5': _of_network(part_segmentation.make_pascub5, 'segmentation'),
}


# What each scores, in words for whoever reads a table of scores.
_WORDS = {
  'knn/20': 'the 20 nearest training images vote for the class',
  'linear/logreg': 'a logistic regression on frozen features names the class',
  'linear/esvit4': 'a linear layer on the last four blocks names the class, as '
  'in DINO and EsViT',
  'labels/10': 'linear/logreg given 10 % of the labels',
  'labels/20': 'linear/logreg given 20 % of the labels',
  'labels/50': 'linear/logreg given 50 % of the labels',
  'labels/100': 'linear/logreg given all labels',
  'retrieval/test-vs-train': 'training images ranked by their likeness to a '
  'test image: rank1, rank5: one of its class is first, among the first five; '
  'mAP: how far those of its class come before the others',
  'retrieval/test-vs-train-centred': 'the same after the mean of the training '
  'features is taken off',
  'retrieval/search': 'training images ranked for a test image as cmd-jax '
  'search does',
  'retrieval/loo-test': 'the other test images ranked by their likeness to one',
  'retrieval/cmd-ratio9': "retrieval as in CMD's released program",
  'parts/hit': 'how often the network looks at the annotated parts',
  'seg/pascub5': 'parts segmented from few examples, five folds: miou is the '
  'overlap with the true parts',
}


def explain_protocols(metrics: Iterable[str]) -> dict[str, str]:
  """A sentence on each protocol, in the order in which they come.

  Args:
    metrics: names '<protocol>/<metric>'; those of unknown protocols, of older
      runs, are passed over.
  """
  names = dict.fromkeys(metric.rpartition('/')[0] for metric in metrics)
  return {name: _WORDS[name] for name in names if name in _WORDS}


def check_protocol(name: str) -> None:
  """Raises UserError for a protocol that doesn't exist, with those that do."""
  if name not in EVALUATORS:
    raise UserError(
      f'evaluator {name!r}: unknown protocol; choose from '
      f'{", ".join(sorted(EVALUATORS))}'
    )


def make_evaluators(
  names: Sequence[str], settings: Mapping[str, Any] | None = None
) -> tuple[Evaluator, ...]:
  """Makes the evaluators of protocols.

  Args:
    names: keys of `EVALUATORS`.
    settings: config.eval, whose sub-dicts are the arguments of some of them.

  Raises:
    UserError: there is no such protocol, and the message lists those there are;
      or settings that cannot be.
  """
  for name in names:
    check_protocol(name)
  return tuple(EVALUATORS[name](name, settings or {}) for name in names)


def why_not_scored(splits: Splits) -> str | None:
  """Why what needs labels can't be scored, None if it can."""
  for what, split in (('training', splits.train), ('test', splits.test)):
    if split is None or np.all(split.labels == UNLABELLED):
      return (
        f'no labelled {what} images in {splits.train.name}: the encoder is '
        'trained, not scored'
      )
  return None


def remark_on_labels(splits: Splits) -> str | None:
  """Says that one class makes every score perfect; None if there are more."""
  labels = np.unique(
    np.concatenate([x.labels for x in splits if x is not None])
  )
  labels = labels[labels != UNLABELLED]
  if why_not_scored(splits) or len(labels) != 1:
    return None
  (label,) = labels
  return (
    f'all labelled images are of one class, '
    f'{one_line(splits.train.class_names[label])}: every score that needs '
    'labels is 100 whatever the encoder does, and says nothing'
  )


def _are_labelled(network: FrozenNetwork, splits: Splits) -> bool:
  # What turns out to be unreadable loses its label: all must have been read.
  return why_not_scored(splits) is None and all(
    np.any(network.embeddings(split).labels != UNLABELLED) for split in splits
  )


def evaluate(
  evaluators: Sequence[Evaluator], network: FrozenNetwork, splits: Splits
) -> dict[str, float]:
  """Scores a frozen network under several protocols.

  Args:
    evaluators: from `make_evaluators`.
    network: the network.
    splits: the images; unlabelled ones among them are left out of what needs
      labels. A class that train lacks can't be predicted: its examples count as
      errors.

  Returns:
    {'<protocol>/<metric>': value in [0, 1]}, such as 'knn/20/top1'; of
    unlabelled splits, what needs no labels.

  Raises:
    UserError: splits that name different classes, or features that aren't
      finite.
  """
  scores = {}
  for evaluator in evaluators:
    if evaluator.needs_labels and not _are_labelled(network, splits):
      continue
    for metric, value in evaluator.run(network, splits).items():
      scores[f'{evaluator.name}/{metric}'] = value
  return scores
