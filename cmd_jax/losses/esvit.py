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
  teacher: jax.Array, match: jax.Array, mask: np.ndarray
) -> jax.Array:
  """What each student token learns: the teacher's of its matches, summed.

  The loop that the gathers replace:
    for u, v, i: result[v, i] += mask[u, v] * teacher[u, match[u, v, i]]

  Args:
    teacher: [B, T, M, D].
    match: [B, T, V, N] from `match_tokens`.
    mask: [T, V] bool, the pairs of views that are compared.

  Returns:
    [B, V, N, D].
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
      teacher[:, u], index.reshape(batch, -1, 1), axis=1
    )
    return rows.reshape(batch, -1, num_tokens, rows.shape[-1])

  targets = [
    sum(gather(int(u), views) for u in teachers) for teachers, views in groups
  ]
  return jnp.concatenate(targets, axis=1) if len(targets) > 1 else targets[0]


def region_loss(
  teacher: jax.Array,
  student: tuple[jax.Array, ...],
  normalisers: tuple[jax.Array, ...],
  matches: tuple[jax.Array, ...],
  weights: tuple[jax.Array, ...],
) -> jax.Array:
  """Mean over the pairs u != v of sum_i a_i H(P_t(u)_{j*(i)}, P_s(v)_i).

  L_R of CMD; with uniform a it is EsViT's region term (main_esvit.py
  `DDINOLoss.forward`). The cross entropy is that of `dino.image_loss`.

  Args:
    teacher: [B, T, M, D]: the prototypes expected under the teacher's
      distribution, or that distribution.
    student: [B, V, N, D] of each group of views of one size: features over
      tau_s, or logits; the first group holds the teacher's views.
    normalisers: [B, V, N] logsumexp of the logits, likewise.
    matches: [B, T, V, N] from `match_tokens`, likewise.
    weights: [B, V, N] weights a that add up to 1 over N, likewise.

  Returns:
    [B] nats.
  """
  num_teacher = teacher.shape[1]
  total, count = 0.0, 0
  for group, (rows, normaliser, match, weight) in enumerate(
    zip(student, normalisers, matches, weights, strict=True)
  ):
    num_student = rows.shape[1]
    mask = np.ones((num_teacher, num_student), bool)
    if group == 0:
      mask &= ~np.eye(num_teacher, num_student, dtype=bool)
    targets = matched_targets(teacher, match, mask)
    per_token = mask.sum(0)[:, None] * normaliser - (targets * rows).sum(-1)
    total += (per_token * weight).sum((1, 2))
    count += mask.sum()
  return total / count
