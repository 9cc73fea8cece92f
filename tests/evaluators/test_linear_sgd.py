from __future__ import annotations

import jax
import numpy as np
import pytest

from cmd_jax.evaluators import Features
from cmd_jax.evaluators.linear_sgd import _fit, make_esvit4


def _split(count: int, seed: int) -> Features:
  rng = np.random.default_rng(seed)
  centres = np.random.default_rng(9).normal(size=(6, 12))
  labels = (np.arange(count) % 6).astype(np.int32)
  vectors = centres[labels] + 0.3 * rng.normal(size=(count, 12))
  names = tuple(map(str, range(count)))
  return Features(vectors.astype(np.float32), labels, tuple('abcdef'), names)


def test_classes_far_apart_are_learned_and_nothing_is_random():
  train, test = _split(66, 0), _split(30, 1)
  evaluator = make_esvit4(num_epochs=60, batch_size=16, learning_rate=1.0)
  got = evaluator(train, test)
  assert got['top1'] > 0.9 and got['top5'] >= got['top1']
  assert evaluator(train, test) == got
  # A rate of nearly 0 leaves the initial weights.
  untrained = make_esvit4(num_epochs=60, batch_size=16, learning_rate=1e-9)
  assert untrained(train, test)['top1'] < 0.6


def test_a_step_is_that_of_momentum_sgd_with_a_cosine():
  """Two epochs of one step each, by hand in float64."""
  train = _split(12, 0)
  got = _fit(
    train.vectors,
    train.labels,
    jax.random.key(0),
    0.5,
    num_classes=6,
    num_epochs=2,
    batch_size=12,
    momentum=0.9,
  )
  init_rng, _ = jax.random.split(jax.random.key(0))
  weights = 0.01 * np.asarray(jax.random.normal(init_rng, (12, 6)), np.float64)
  bias = np.zeros(6)
  velocity = [np.zeros_like(weights), np.zeros_like(bias)]
  x, truth = train.vectors.astype(np.float64), np.eye(6)[train.labels]
  for epoch in range(2):
    logits = x @ weights + bias
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    residual = (probs - truth) / 12
    rate = 0.5 * (1 + np.cos(np.pi * epoch / 2)) / 2
    for number, grad in enumerate((x.T @ residual, residual.sum(0))):
      velocity[number] = 0.9 * velocity[number] + grad
    weights = weights - rate * velocity[0]
    bias = bias - rate * velocity[1]
  np.testing.assert_allclose(got[0], weights, atol=1e-5)
  np.testing.assert_allclose(got[1], bias, atol=1e-5)


def test_refuses_bad_arguments():
  for changes in (dict(num_epochs=0), dict(batch_size=0)):
    with pytest.raises(ValueError, match='must be positive'):
      make_esvit4(**changes)
