"""Mean intersection over union of part segmentations, as PARTICLE scores it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.errors import UserError

FOLDS = 5


class FoldScores(NamedTuple):
  """What `cross_validate` finds.

  Attributes:
    miou: [5] mean IoU on the images outside each fold.
    checkpoint: [5] the checkpoint that each fold chose.
  """

  miou: np.ndarray
  checkpoint: np.ndarray


def overlaps(
  predicted: jax.Array, masks: jax.Array, num_classes: int
) -> tuple[jax.Array, jax.Array]:
  """Counts the pixels that two segmentations share, class by class.

  Args:
    predicted: [N, H, W] class of every pixel.
    masks: [N, H, W] true class.
    num_classes: K.

  Returns:
    Intersections and unions, [N, K] int32 pixels.
  """
  pairs = []
  # One class at a time: [N, H, W, K] would be the largest array of all.
  for number in range(num_classes):
    ours, theirs = predicted == number, masks == number
    pairs.append([(ours & theirs).sum((1, 2)), (ours | theirs).sum((1, 2))])
  counts = jnp.array(pairs, jnp.int32)
  return counts[:, 0].T, counts[:, 1].T


def mean_iou(intersections: np.ndarray, unions: np.ndarray) -> float:
  """Mean IoU, pooled: 1/K sum_k (sum_i I_ik) / (sum_i U_ik + 1e-8).

  As the released evaluation/test_miou.py has it: the mean takes in the
  background, and classes that occur neither in the masks nor in the predictions
  count as 0.

  Args:
    intersections: [N, K] pixels.
    unions: [N, K] pixels.

  Returns:
    A number in [0, 1].
  """
  shared = intersections.sum(axis=0, dtype=np.float64)
  return float((shared / (unions.sum(axis=0) + 1e-8)).mean())


def cross_validate(
  intersections: np.ndarray, unions: np.ndarray, folds: int = FOLDS
) -> FoldScores:
  """Lets every fold choose a checkpoint and scores it on the other images.

  Folds are floor(N / folds) consecutive images; what remains is in none of
  them, and scored by all. The first of equally good checkpoints is taken. The
  released evaluation/test_miou.py is the same, but for a fold on which all
  checkpoints score 0: it repeats the score of the fold before.

  Args:
    intersections: [checkpoints, N, K] pixels.
    unions: [checkpoints, N, K] pixels.
    folds: their number.

  Returns:
    The scores.

  Raises:
    UserError: there are fewer images than folds.
  """
  count = intersections.shape[1]
  size = count // folds
  if size == 0:
    raise UserError(
      f'part segmentation: {count} test image(s) make no {folds} folds; give '
      f'at least {folds}'
    )
  pairs = list(zip(intersections, unions, strict=True))
  scores, chosen = [], []
  for fold in range(folds):
    inside = np.arange(count) // size == fold
    validation = [mean_iou(i[inside], u[inside]) for i, u in pairs]
    best = int(np.argmax(validation))
    chosen.append(best)
    scores.append(mean_iou(*(array[~inside] for array in pairs[best])))
  return FoldScores(np.array(scores), np.array(chosen))
