"""Contrast of parts across two views (DetCon-B, Henaff et al. 2021)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cmd_jax.devices import sharding

# Takes a logit out of a softmax and leaves it finite even if all are out.
_EXCLUDED = -1e9


def _unit(x: jax.Array) -> jax.Array:
  """x / |x|; a zero vector stays zero and has no gradient."""
  square = jnp.sum(x * x, axis=-1, keepdims=True)
  is_zero = square <= 1e-24
  return jnp.where(is_zero, 0, x * jax.lax.rsqrt(jnp.where(is_zero, 1, square)))


def _same_part(
  prediction_ids: jax.Array, target_ids: jax.Array, view: int
) -> jax.Array:
  """[B, S, 2, S] bool: the targets of an image that are of a sample's part."""
  return prediction_ids[:, view, :, None, None] == target_ids[:, None]


def part_contrast(
  predictions: jax.Array,
  targets: jax.Array,
  prediction_ids: jax.Array,
  target_ids: jax.Array,
  *,
  temperature: float,
  local_negatives: bool = True,
  axis_name: str | None,
) -> jax.Array:
  """Cross-entropy of finding a part again in the other view of its image.

  With unit vectors q of the predictions and z of the targets, sample s of view
  a, whose positives P are the samples of the same part in the other view,
  costs (DetCon, Eq. 3; PARTICLE, losses.py `DetConBLoss`)

    1 / n_s (log sum_t exp(q_s z_t / tau) - mean_{t in P} q_s z_t / tau),

  where t goes over all samples of both views of the global batch except those
  of the same part in the same view of the same image, and n_s is the number of
  samples of that part in view a. A sample without positives costs nothing, yet
  counts in the mean over the samples. Both directions are added.

  Args:
    predictions: [B, 2, S, D] of the student.
    targets: [B, 2, S, D] of the teacher; they get no gradient.
    prediction_ids: [B, 2, S] int32, the part of each prediction.
    target_ids: [B, 2, S] int32, the part of each target.
    temperature: tau.
    local_negatives: whether t goes over the other parts of the same image.
    axis_name: axis over which the batch is spread, None if it is global.

  Returns:
    [B] nats; the mean over the global batch is the released loss.
  """
  predictions = _unit(predictions)
  targets = jax.lax.stop_gradient(_unit(targets))
  everything = sharding.all_gather(targets, axis_name)  # [G, 2, S, D]
  batch, _, num_samples, _ = predictions.shape
  position = sharding.axis_index(axis_name) * batch + jnp.arange(batch)
  # [B, G]: which image of the global batch is one's own.
  own = position[:, None] == jnp.arange(len(everything))

  def direction(view):
    query, ids = predictions[:, view], prediction_ids[:, view]
    same = _same_part(prediction_ids, target_ids, view)
    positives = same[:, :, 1 - view]
    same_view = jnp.arange(2)[:, None] == view
    excluded = same & same_view if local_negatives else ~same | same_view
    logits = jnp.einsum('bsd,gvtd->bsgvt', query, everything) / temperature
    logits = jnp.where(
      own[:, None, :, None, None] & excluded[:, :, None], _EXCLUDED, logits
    )
    total = jax.nn.logsumexp(logits.reshape(batch, num_samples, -1), axis=-1)
    match = jnp.einsum('bsd,btd->bst', query, targets[:, 1 - view])
    count = positives.sum(-1)
    match = jnp.sum(match * positives, axis=-1) / jnp.maximum(count, 1)
    repeats = jnp.sum(ids[:, :, None] == ids[:, None, :], axis=-1)
    per_sample = jnp.where(count > 0, total - match / temperature, 0) / repeats
    return per_sample.mean(-1)

  return direction(0) + direction(1)


def fraction_with_positives(
  prediction_ids: jax.Array, target_ids: jax.Array
) -> jax.Array:
  """Share of the samples that have a positive in the other view.

  Args:
    prediction_ids: [B, 2, S].
    target_ids: [B, 2, S].

  Returns:
    [B] in 0..1.
  """
  found = [
    _same_part(prediction_ids, target_ids, view)[:, :, 1 - view].any(-1)
    for view in range(2)
  ]
  return jnp.stack(found).mean((0, 2))
