"""What a run needs of the labels of its images."""

from __future__ import annotations

import numpy as np

from cmd_jax.data.canvas import Canvases
from cmd_jax.data.pipeline.load import Data
from cmd_jax.errors import UserError
from cmd_jax.evaluators import validation


def check_keep_best(score: str, data: Data, with_labels: bool) -> None:
  """Refuses to choose by labels, or by a classifier, that are not there.

  Args:
    score: config.checkpoint.keep_best.
    data: of the run.
    with_labels: whether the method learns labels, and has a classifier.

  Raises:
    UserError: what to do instead.
  """
  if score and (score == 'top1') != with_labels:
    raise UserError(
      f'config.checkpoint.keep_best is {score!r}: methods that learn labels '
      "have 'top1' alone, and the others knn, rank1 and rankme"
    )
  if with_labels or not score or not validation.CHOOSING[score]:
    return
  asked = data.validation is not None
  if not asked:
    asked = validation.choose_sample(data.pretrain.labels).asks.any()
  if not asked or not (data.pretrain.labels >= 0).any():
    raise UserError(
      f'config.checkpoint.keep_best is {score!r}, which needs labels, and '
      f'{data.name} has no class with two labelled training images: use '
      "'rankme', or add class folders or a labels.csv"
    )


def count_classes(split: Canvases) -> tuple[int, ...]:
  """Labelled images of each class of a split."""
  labels = np.asarray(split.labels)
  counts = np.bincount(labels[labels >= 0], minlength=len(split.class_names))
  return tuple(counts.tolist())
