"""Region-to-region distillation (EsViT, Li et al. 2022)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def match_tokens(
  student_features: jax.Array, teacher_features: jax.Array
) -> jax.Array:
  """Finds each student token's most similar teacher token.

  j*(i) = argmax_j cos(h^s_i, h^t_j); the first one on ties.

  Args:
    student_features: [B, V, N, D] of the encoder.
    teacher_features: [B, T, M, D] of the encoder.

  Returns:
    [B, T, V, N] int32 index in 0..M-1.
  """

  def unit(x):
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.maximum(norm, 1e-12)

  similarity = jnp.einsum(
    'bvnd,btmd->btvnm',
    unit(jax.lax.stop_gradient(student_features)),
    unit(jax.lax.stop_gradient(teacher_features)),
  )
  return jnp.argmax(similarity, axis=-1).astype(jnp.int32)


def matched_targets(
  teacher_probs: jax.Array, match: jax.Array, mask: np.ndarray
) -> jax.Array:
  """What each student token learns: its matches' distributions, summed.

  The loop that the gathers replace:
    for u, v, i: result[v, i] += mask[u, v] * P_t[u, match[u, v, i]]

  Args:
    teacher_probs: [B, T, M, K].
    match: [B, T, V, N] from `match_tokens`.
    mask: [T, V] bool, the pairs of views that are compared.

  Returns:
    [B, V, N, K].
  """
  batch, _, num_student, num_tokens = match.shape
  if mask.all():
    # All views of a size at once.
    groups = [(range(len(mask)), slice(0, num_student))]
  else:
    groups = [
      (np.flatnonzero(mask[:, v]), slice(v, v + 1)) for v in range(num_student)
    ]

  def gather(u, views):
    index = match[:, u, views]
    rows = jnp.take_along_axis(
      teacher_probs[:, u], index.reshape(batch, -1, 1), axis=1
    )
    return rows.reshape(batch, -1, num_tokens, rows.shape[-1])

  targets = [
    sum(gather(int(u), views) for u in teachers) for teachers, views in groups
  ]
  return jnp.concatenate(targets, axis=1) if len(targets) > 1 else targets[0]


def region_loss(
  teacher_probs: jax.Array,
  student_logits: tuple[jax.Array, ...],
  student_normalisers: tuple[jax.Array, ...],
  matches: tuple[jax.Array, ...],
  student_weights: tuple[jax.Array, ...],
  fraction: float = 1.0,
) -> jax.Array:
  """Mean over the pairs u != v of sum_i a_i H(P_t(u)_{j*(i)}, P_s(v)_i).

  L_R of CMD; with uniform a it is EsViT's region term (main_esvit.py
  `DDINOLoss.forward`). H(P_t, P_s) = n - sum_k P_t,k z_k with z the student's
  logits and n their normaliser, as P_t adds up to 1.

  Args:
    teacher_probs: [B, T, M, K], without gradient.
    student_logits: [B, V, N, K] of each group of views of one size; the first
      group holds the teacher's views.
    student_normalisers: [B, V, N] of them over all prototypes, likewise.
    matches: [B, T, V, N] from `match_tokens`, likewise.
    student_weights: [B, V, N] weights a that add up to 1 over N, likewise.
    fraction: of the prototypes that is here; all fractions add up.

  Returns:
    [B] nats.
  """
  num_teacher = teacher_probs.shape[1]
  total, count = 0.0, 0
  for group, (logits, normalisers, match, weights) in enumerate(
    zip(
      student_logits, student_normalisers, matches, student_weights, strict=True
    )
  ):
    num_student = logits.shape[1]
    mask = np.ones((num_teacher, num_student), bool)
    if group == 0:
      mask &= ~np.eye(num_teacher, num_student, dtype=bool)
    targets = matched_targets(teacher_probs, match, mask)
    per_token = fraction * mask.sum(0)[:, None] * normalisers - (
      targets * logits
    ).sum(-1)
    total += (per_token * weights).sum((1, 2))
    count += mask.sum()
  return total / count
