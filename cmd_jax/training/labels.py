"""What a run needs of the labels of its images."""

from __future__ import annotations

import numpy as np

from cmd_jax.data.canvas import Canvases
from cmd_jax.data.pipeline.load import Data
from cmd_jax.errors import UserError
from cmd_jax.evaluators import validation


def score_to_keep_by(score: str, data: Data, with_labels: bool) -> str:
  """Which score chooses the best checkpoint; '' if none does.

  Args:
    score: config.checkpoint.keep_best; 'auto' for that of a classifier, or
      rank1 where there are labels to ask for.
    data: of the run.
    with_labels: whether the method learns labels, and has a classifier.

  Raises:
    UserError: one that needs labels, or a classifier, that are not there.
  """
  if score == 'auto' and with_labels:
    return 'top1'
  if score not in ('', 'auto') and (score == 'top1') != with_labels:
    raise UserError(
      f'config.checkpoint.keep_best is {score!r}: methods that learn labels '
      "have 'top1' alone, and the others knn, rank1 and rankme"
    )
  if with_labels or score != 'auto' and not validation.CHOOSING.get(score):
    return score
  asked = data.validation is not None
  if not asked:
    asked = validation.can_ask(np.asarray(data.pretrain.labels))
  is_labelled = bool(asked and (data.pretrain.labels >= 0).any())
  if score == 'auto':
    return 'rank1' if is_labelled else ''
  if not is_labelled:
    raise UserError(
      f'config.checkpoint.keep_best is {score!r}, which needs labels, and '
      f'{data.name} has no class with two labelled training images: use '
      "'rankme', or add class folders or a labels.csv"
    )
  return score


def count_classes(split: Canvases) -> tuple[int, ...]:
  """Labelled images of each class of a split."""
  labels = np.asarray(split.labels)
  counts = np.bincount(labels[labels >= 0], minlength=len(split.class_names))
  return tuple(counts.tolist())
