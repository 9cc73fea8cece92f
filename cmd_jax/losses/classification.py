"""Cross-entropy of classes that labels name."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def smooth_targets(
  labels: jax.Array, num_classes: int, smoothing: float
) -> jax.Array:
  """One-hot targets of which a share goes to all classes evenly.

  Szegedy et al. 2016, "Rethinking the Inception architecture", equation 7 of
  section 7: (1 - e) y + e / C.

  Args:
    labels: [B] int, classes from 0.
    num_classes: C.
    smoothing: e, from 0 to 1.

  Returns:
    [B, C], rows add up to 1.
  """
  one_hot = jax.nn.one_hot(labels, num_classes)
  return (1 - smoothing) * one_hot + smoothing / num_classes


def mix_up(
  images: jax.Array, targets: jax.Array, share: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Mixes every example with another one of the batch.

  Zhang et al. 2018, "mixup: Beyond empirical risk minimization": x = l x_i +
  (1 - l) x_j, and the targets likewise. The other is the one as far from the
  end as an example is from the start.

  Args:
    images: [B, ...].
    targets: [B, C].
    share: [B], l of each example.

  Returns:
    The images and the targets, mixed.
  """

  def mix(x):
    factor = share.reshape(-1, *(1,) * (x.ndim - 1)).astype(x.dtype)
    return factor * x + (1 - factor) * x[::-1]

  return mix(images), mix(targets)


def cross_entropy(
  logits: jax.Array, targets: jax.Array, class_weights: jax.Array
) -> jax.Array:
  """Weighted cross-entropy, -sum_c w_c t_c log p_c.

  Args:
    logits: [B, V, C] of V views of each example.
    targets: [B, C].
    class_weights: [C].

  Returns:
    [B], the mean over the views.
  """
  log_probs = jax.nn.log_softmax(logits)
  weighted = (targets * class_weights)[:, None]
  return -jnp.sum(weighted * log_probs, axis=-1).mean(1)
