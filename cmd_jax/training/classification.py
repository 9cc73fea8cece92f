"""The classifier of a run that learns labels: scored, calibrated, described."""

from __future__ import annotations

from typing import Any

import numpy as np

from cmd_jax.devices import sharding
from cmd_jax.errors import UserError
from cmd_jax.evaluators import FrozenNetwork
from cmd_jax.evaluators.classifier import (
  KEPT,
  Classifier,
  calibrate,
  negative_log_likelihood,
  score,
)
from cmd_jax.evaluators.features import Features
from cmd_jax.training.experiment import Experiment
from cmd_jax.training.state import TrainState

# Of results.json, and of the parameters.
ENTRY = 'classifier'


def classifier_of(
  experiment: Experiment, params: dict[str, Any] | None
) -> Classifier | None:
  """The classifier of a network, not calibrated.

  Args:
    experiment: the run's.
    params: `kernel` and `bias`; None for a method without.
  """
  if params is None:
    return None
  return Classifier(
    np.asarray(params['kernel'], np.float32),
    np.asarray(params['bias'], np.float32),
    experiment.data.pretrain.class_names,
  )


def classifier_of_state(
  experiment: Experiment, state: TrainState
) -> Classifier | None:
  """The classifier of the scored network of a state; None without."""
  is_teacher = experiment.evaluation.network == 'teacher'
  params = state.teacher_params if is_teacher else state.params
  if ENTRY not in params:
    return None
  return classifier_of(
    experiment, sharding.gather(params[ENTRY], experiment.mesh)
  )


def quick_scores(
  classifier: Classifier, validation: Features
) -> dict[str, float]:
  """What may choose a checkpoint: `top1` and `nll` of the validation images."""
  known = validation.take(np.flatnonzero(validation.labels >= 0))
  logits = classifier.logits(known.vectors)
  return {
    'top1': float(np.mean(logits.argmax(1) == known.labels)),
    'nll': negative_log_likelihood(logits, known.labels),
  }


def score_classifier(
  experiment: Experiment,
  network: FrozenNetwork,
  classifier: Classifier | None,
  step: int,
) -> dict[str, Any]:
  """Calibrates a classifier and scores it on the test split.

  Args:
    experiment: the run's.
    network: the encoder that the classifier was trained with.
    classifier: not calibrated; None for a method without.
    step: of the checkpoint.

  Returns:
    Nothing without a classifier, and else the entry `classifier` of
    results.json: `class_names`, `temperature`, `threshold`, `threshold_keeps`,
    `step`, and the scores of `evaluators.classifier.score` as `validation`, in
    short, and as `test`.

  Raises:
    UserError: embeddings that are not finite.
  """
  if classifier is None:
    return {}
  validation = network.embeddings(experiment.data.validation)
  if not np.isfinite(validation.vectors).all():
    raise UserError(
      'the fine-tuned encoder gives features that are not finite: lower '
      '--config.optim.base_learning_rate'
    )
  classifier = calibrate(classifier, validation)
  chosen = score(classifier, validation)
  for name in ('per_class', 'confusion'):
    chosen.pop(name)
  test = {}
  if experiment.data.test is not None:
    test = score(classifier, network.embeddings(experiment.data.test))
  entry = classifier.describe() | {
    'threshold_keeps': KEPT,
    'step': step,
    'validation': {'split': experiment.data.validation.name, **chosen},
    'test': test,
  }
  return {ENTRY: entry}


def summary_of(entry: dict[str, Any]) -> str:
  """What a person reads of `score_classifier`, a line for each split."""
  lines = []
  for split in ('validation', 'test'):
    scores = entry[split]
    if scores:
      lines.append(
        f'classifier, {split}: {100 * scores["top1"]:.1f} % of '
        f'{scores["images"]} right, calibration error '
        f'{100 * scores["ece"]:.1f} % ({100 * scores["ece_uncalibrated"]:.1f} '
        f'% before the temperature), {100 * scores["kept"]:.1f} % taken for '
        'one of the classes'
      )
  return '\n'.join(lines)
