"""Calibration and scores of a classifier, against what is known of them."""

import numpy as np
import pytest

from cmd_jax.evaluators import classifier as lib
from cmd_jax.evaluators.features import Features

_NAMES = ('robin', 'tit', 'wren')


def _features(vectors, labels):
  return Features(
    np.float32(vectors),
    np.asarray(labels, np.int32),
    _NAMES,
    tuple(map(str, range(len(labels)))),
  )


def _identity():
  return lib.Classifier(np.eye(3, dtype=np.float32), np.zeros(3), _NAMES)


def test_the_temperature_of_labels_drawn_by_it_is_found():
  rng = np.random.default_rng(0)
  logits = 3 * rng.normal(size=(20_000, 3))
  labels = (logits + rng.gumbel(size=logits.shape)).argmax(1)
  assert lib.fit_temperature(logits, labels) == pytest.approx(1, abs=0.04)
  assert lib.fit_temperature(2.5 * logits, labels) == pytest.approx(
    2.5, abs=0.1
  )


def test_perfect_images_do_not_make_it_certain():
  labels = np.arange(3).repeat(4)
  logits = np.eye(3)[labels]
  temperature = lib.fit_temperature(logits, labels)
  # The likelihood of (N + 1) / (N + 2), with 12 images.
  probabilities = lib.softmax(logits / temperature)
  assert probabilities.max() == pytest.approx(13 / 14, abs=1e-4)


def test_calibration_error_of_two_bins():
  confidences = np.array([0.5, 0.5, 0.95, 0.95])
  hits = np.array([True, False, True, False])
  # Half the images are right in both: 0 off in one, 0.45 in the other.
  error = lib.expected_calibration_error(confidences, hits)
  assert error == pytest.approx(0.45 / 2)
  # An edge belongs to the bin below it, so that these two are in one.
  error = lib.expected_calibration_error(np.array([1 / 15, 0.05]), hits[:2])
  assert error == pytest.approx(0.5 - (1 / 15 + 0.05) / 2)


def test_the_threshold_keeps_what_it_says():
  rng = np.random.default_rng(1)
  labels = rng.integers(0, 3, 400)
  vectors = 2 * np.eye(3)[labels] + rng.normal(size=(400, 3))
  features = _features(vectors, labels)
  calibrated = lib.calibrate(_identity(), features)
  confidences = calibrated.probabilities(features.vectors).max(1)
  kept = np.mean(confidences >= calibrated.threshold)
  assert lib.KEPT <= kept < lib.KEPT + 0.01
  scores = lib.score(calibrated, features)
  assert scores['kept'] == kept
  assert scores['ece'] < 0.06
  assert scores['nll'] <= scores['nll_uncalibrated'] + 1e-4


def test_classes_and_confusions():
  vectors = np.eye(3)[[0, 0, 1, 0]]
  scores = lib.score(_identity(), _features(vectors, [0, 0, 0, 1]))
  assert scores['images'] == 4
  assert scores['top1'] == 0.5
  assert scores['mean_class_recall'] == pytest.approx((2 / 3 + 0) / 2)
  assert scores['confusion'] == {
    'robin': {'robin': 2, 'tit': 1},
    'tit': {'robin': 1},
  }
  assert scores['per_class']['robin'] == {
    'images': 3,
    'recall': 2 / 3,
    'precision': 2 / 3,
  }
  assert scores['per_class']['wren'] == {
    'images': 0,
    'recall': None,
    'precision': None,
  }


def test_unlabelled_images_do_not_count():
  features = _features(np.eye(3)[[0, 1]], [0, -1])
  assert lib.score(_identity(), features)['top1'] == 1
  assert lib.score(_identity(), _features(np.eye(3)[[0]], [-1])) == {}
