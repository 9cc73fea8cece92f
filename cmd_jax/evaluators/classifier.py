"""A linear classifier over embeddings: its probabilities, and how far to go by.

Probabilities are calibrated by one temperature, and what is below a threshold
of the largest one is called "not among the classes"; both are chosen on images
that were not trained on, never on the test split.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from cmd_jax.evaluators.features import Features

# Share of the validation images, of known classes, that the threshold keeps.
KEPT = 0.95
# Bins of the calibration error, as in Guo et al. 2017.
_NUM_BINS = 15
# The temperature is sought from e^-3 to e^3, to a relative 1e-6.
_LARGEST_LOG = 3.0
_SECTIONS = 33
_GOLDEN = (5**0.5 - 1) / 2


class Classifier(NamedTuple):
  """A linear layer over embeddings, and how its logits are read.

  Attributes:
    kernel: [D, C] float32.
    bias: [C] float32.
    class_names: C names.
    temperature: what logits are divided by.
    threshold: least probability of the most probable class by which an image is
      among the classes.
  """

  kernel: np.ndarray
  bias: np.ndarray
  class_names: tuple[str, ...]
  temperature: float = 1.0
  threshold: float = 0.0

  def describe(self) -> dict[str, Any]:
    """What must be known of it beside its arrays, for JSON."""
    return {
      'class_names': list(self.class_names),
      'temperature': self.temperature,
      'threshold': self.threshold,
    }

  def logits(self, vectors: np.ndarray) -> np.ndarray:
    """[N, C] logits of [N, D] embeddings, before the temperature."""
    return vectors @ self.kernel + self.bias

  def probabilities(self, vectors: np.ndarray) -> np.ndarray:
    """[N, C] calibrated probabilities of [N, D] embeddings."""
    return softmax(self.logits(vectors) / self.temperature)


def softmax(logits: np.ndarray) -> np.ndarray:
  """[N, C] probabilities of [N, C] logits."""
  exponents = np.exp(logits - logits.max(1, keepdims=True))
  return exponents / exponents.sum(1, keepdims=True)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
  logits = logits.astype(np.float64)
  logits -= logits.max(1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
  """Mean of -log p of the true class, of [N, C] logits and [N] labels."""
  of_label = _log_softmax(logits)[np.arange(len(labels)), labels]
  return float(-of_label.mean())


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
  """The temperature of the largest likelihood (Guo et al. 2017, section 4.2).

  Where all images are right it would be 0, and every probability 1. As Platt
  (1999, section 2.2) has it, the true class counts (N + 1) / (N + 2) instead of
  1, and the others share what is left.

  Args:
    logits: [N, C].
    labels: [N].

  Returns:
    T of softmax(logits / T), from e^-3 to e^3: the likelihood is unimodal in it
    and is searched by golden section.
  """
  count, num_classes = logits.shape
  targets = np.full(logits.shape, 1 / (count + 2) / max(num_classes - 1, 1))
  targets[np.arange(count), labels] = (count + 1) / (count + 2)

  def loss(log_temperature):
    return -np.sum(targets * _log_softmax(logits / np.exp(log_temperature)))

  low, high = -_LARGEST_LOG, _LARGEST_LOG
  for _ in range(_SECTIONS):
    reach = _GOLDEN * (high - low)
    if loss(high - reach) < loss(low + reach):
      high = low + reach
    else:
      low = high - reach
  return float(np.exp((low + high) / 2))


def expected_calibration_error(
  confidences: np.ndarray, hits: np.ndarray
) -> float:
  """How far confidence is from accuracy (Guo et al. 2017, equation 3).

  Args:
    confidences: [N] probability of the class that is taken.
    hits: [N] whether it is the true one.

  Returns:
    The mean distance of accuracy and confidence over 15 bins of equal width,
    weighted by their images.
  """
  # A bin has its upper edge and not its lower one.
  bins = np.clip(np.ceil(confidences * _NUM_BINS).astype(int) - 1, 0, None)
  gaps = np.bincount(bins, hits - confidences.astype(np.float64))
  return float(np.abs(gaps).sum() / len(hits))


def calibrate(classifier: Classifier, validation: Features) -> Classifier:
  """Chooses temperature and threshold.

  Args:
    classifier: whose logits are looked at.
    validation: images that it was not trained on; unlabelled ones are left out.

  Returns:
    The classifier, whose threshold keeps `KEPT` of these images.
  """
  known = validation.take(np.flatnonzero(validation.labels >= 0))
  logits = classifier.logits(known.vectors)
  classifier = classifier._replace(
    temperature=fit_temperature(logits, known.labels)
  )
  confidences = classifier.probabilities(known.vectors).max(1)
  threshold = np.quantile(confidences, 1 - KEPT, method='lower')
  return classifier._replace(threshold=float(threshold))


def _of_classes(
  class_names: tuple[str, ...], labels: np.ndarray, taken: np.ndarray
) -> dict[str, Any]:
  """Recall and precision of each class, and what is taken for what."""
  table, confusion = {}, {}
  for label, name in enumerate(class_names):
    of_class = labels == label
    count, named = int(of_class.sum()), int((taken == label).sum())
    right = int((of_class & (taken == label)).sum())
    table[name] = {
      'images': count,
      'recall': right / count if count else None,
      'precision': right / named if named else None,
    }
    others, counts = np.unique(taken[of_class], return_counts=True)
    if count:
      confusion[name] = {
        class_names[other]: int(n) for other, n in zip(others, counts)
      }
  return {'per_class': table, 'confusion': confusion}


def score(classifier: Classifier, features: Features) -> dict[str, Any]:
  """Scores a calibrated classifier on labelled images.

  Args:
    classifier: from `calibrate`.
    features: of the images; unlabelled ones are left out.

  Returns:
    `images`; `top1`; `mean_class_recall` over the classes that there are; `nll`
    and `ece`, and both without the temperature as `nll_uncalibrated` and
    `ece_uncalibrated`; `kept`, the share above the threshold, and `kept_top1`,
    their accuracy; `per_class`, by name; `confusion`, by true name and then by
    the name that was given, in images, without zeros. Empty without labels.
  """
  known = features.take(np.flatnonzero(features.labels >= 0))
  labels = known.labels
  if not len(labels):
    return {}
  logits = classifier.logits(known.vectors)
  taken = logits.argmax(1)
  hits = taken == labels
  scores = {'images': len(labels), 'top1': float(hits.mean())}
  recalls = [hits[labels == label].mean() for label in np.unique(labels)]
  scores['mean_class_recall'] = float(np.mean(recalls))
  for suffix, temperature in (
    ('', classifier.temperature),
    ('_uncalibrated', 1.0),
  ):
    scaled = logits / temperature
    scores[f'nll{suffix}'] = negative_log_likelihood(scaled, labels)
    scores[f'ece{suffix}'] = expected_calibration_error(
      softmax(scaled).max(1), hits
    )
  kept = classifier.probabilities(known.vectors).max(1) >= classifier.threshold
  scores['kept'] = float(kept.mean())
  scores['kept_top1'] = float(hits[kept].mean()) if kept.any() else None
  return scores | _of_classes(classifier.class_names, labels, taken)


def from_entry(
  params: Mapping[str, Any], entry: Mapping[str, Any]
) -> Classifier:
  """A classifier of saved parameters and an entry of results.json.

  Args:
    params: `kernel` and `bias`.
    entry: `class_names`, `temperature` and `threshold`.

  Raises:
    KeyError: something is missing.
  """
  return Classifier(
    np.asarray(params['kernel'], np.float32),
    np.asarray(params['bias'], np.float32),
    tuple(entry['class_names']),
    float(entry['temperature']),
    float(entry['threshold']),
  )
