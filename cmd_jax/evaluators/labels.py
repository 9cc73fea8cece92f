"""Classification with a share of the labels: `labels/{10,20,50,100}`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cmd_jax.evaluators.features import Features, usable
from cmd_jax.evaluators.linear import make_logreg


def make_label_share(
  percent: int, num_seeds: int = 3
) -> Callable[[Features, Features], dict[str, float]]:
  """`labels/<percent>`: `linear/logreg` of a share of the training labels.

  Of every class, round(percent/100 n) of its n training images are kept, at
  least one; regularisation is chosen among them alone. Of one seed, a smaller
  share is part of a larger one. The released programs of CMD that did this
  (eval_linear_ratio*.py) were not published.

  Args:
    percent: share of the labels, above 0 and at most 100.
    num_seeds: draws that are averaged; 100 per cent has no draw.

  Returns:
    An evaluator giving what `linear/logreg` gives, the mean over the draws, and
    `top1_std`, their standard deviation.

  Raises:
    ValueError: a number out of its range.
  """
  if not 0 < percent <= 100 or num_seeds < 1:
    raise ValueError(
      f'percent must be in (0, 100] and num_seeds positive, got {percent} and '
      f'{num_seeds}'
    )
  classify = make_logreg()

  def evaluate(train: Features, test: Features) -> dict[str, float]:
    train, test = usable(f'labels/{percent}', train, test)
    if percent == 100:
      return classify(train, test)
    draws = [
      classify(train.take(choose(train.labels, percent, seed)), test)
      for seed in range(num_seeds)
    ]
    scores = {name: _mean(draws, name) for name in draws[0]}
    return scores | {'top1_std': float(np.std([x['top1'] for x in draws]))}

  return evaluate


def choose(labels: np.ndarray, percent: float, seed: int) -> np.ndarray:
  """The examples whose labels are kept, in ascending order.

  Args:
    labels: [N].
    percent: of every class, at least one.
    seed: of the order in which a class's examples are taken.

  Returns:
    [n] numbers of examples.
  """
  shuffled = np.random.default_rng(seed).permutation(len(labels))
  kept = []
  for label in np.unique(labels):
    members = shuffled[labels[shuffled] == label]
    # Halves are rounded up, as people do and Python does not.
    count = max(int(percent * len(members) / 100 + 0.5), 1)
    kept.append(members[:count])
  return np.sort(np.concatenate(kept))


def _mean(draws: list[dict[str, float]], name: str) -> float:
  return float(np.mean([scores[name] for scores in draws]))
