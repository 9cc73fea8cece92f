"""Cross-entropy of classes, against the formula written a second way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.losses import classification


def test_targets_are_smoothed_as_the_equation_says():
  targets = classification.smooth_targets(jnp.array([2, 0]), 4, 0.2)
  np.testing.assert_allclose(
    targets, [[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]], atol=1e-7
  )


def test_cross_entropy_and_its_gradient():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(3, 2, 4)).astype(np.float32)
  targets = rng.dirichlet(np.ones(4), 3).astype(np.float32)
  weights = np.float32([1, 0.5, 2, 0])
  values, gradient = jax.value_and_grad(
    lambda x: classification.cross_entropy(x, targets, weights).sum()
  )(logits)
  wanted, slope = 0.0, np.zeros_like(logits)
  for b in range(3):
    for v in range(2):
      p = np.exp(logits[b, v]) / np.exp(logits[b, v]).sum()
      for c in range(4):
        factor = weights[c] * targets[b, c] / 2
        wanted -= factor * np.log(p[c])
        slope[b, v] += factor * (p - np.eye(4)[c])
  assert float(values) == pytest.approx(wanted, rel=1e-5)
  np.testing.assert_allclose(gradient, slope, atol=1e-6)


def test_mixing_mixes_images_and_targets_alike():
  images = np.arange(3.0)[:, None, None] * np.ones((3, 2, 2))
  targets = np.eye(3)
  share = np.array([1.0, 0.5, 0.25])
  mixed, mixed_targets = classification.mix_up(images, targets, share)
  np.testing.assert_allclose(mixed[:, 0, 0], [0.0, 1.0, 0.25 * 2])
  np.testing.assert_allclose(
    mixed_targets, [[1, 0, 0], [0, 1, 0], [0.75, 0, 0.25]]
  )
