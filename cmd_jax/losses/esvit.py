"""Region-to-region distillation (EsViT, Li et al. 2022)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cmd_jax.losses import dino


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


def matched_cross_entropy(
  teacher_probs: jax.Array, student_log_probs: jax.Array, match: jax.Array
) -> jax.Array:
  """H(P_t(u)_{j*(i)}, P_s(v)_i) of every student token.

  The loop that the gather replaces:
    for u, v, i: result[u, v, i] = -sum_k P_t[u, match[u, v, i], k]
                                           * log P_s[v, i, k]

  Args:
    teacher_probs: [B, T, M, K], without gradient.
    student_log_probs: [B, V, N, K].
    match: [B, T, V, N] from `match_tokens`.

  Returns:
    [B, T, V, N] nats.
  """
  batch, num_student, num_tokens, _ = student_log_probs.shape
  per_teacher = []
  for u in range(teacher_probs.shape[1]):
    index = match[:, u].reshape(batch, num_student * num_tokens, 1)
    target = jnp.take_along_axis(teacher_probs[:, u], index, axis=1)
    target = target.reshape(student_log_probs.shape)
    per_teacher.append(-jnp.sum(target * student_log_probs, axis=-1))
  return jnp.stack(per_teacher, axis=1)


def region_loss(
  teacher_probs: jax.Array,
  teacher_features: jax.Array,
  student_log_probs: tuple[jax.Array, ...],
  student_features: tuple[jax.Array, ...],
  student_weights: tuple[jax.Array, ...],
) -> jax.Array:
  """Mean over the pairs u != v of sum_i a_i H(P_t(u)_{j*(i)}, P_s(v)_i).

  L_R of CMD; with uniform a it is EsViT's region term (main_esvit.py
  `DDINOLoss.forward`).

  Args:
    teacher_probs: [B, T, M, K], without gradient.
    teacher_features: [B, T, M, D] of the encoder.
    student_log_probs: [B, V, N, K] of each group of views of one size; the
      first group holds the teacher's views.
    student_features: [B, V, N, D] of the encoder, likewise.
    student_weights: [B, V, N] weights a that add up to 1 over N, likewise.

  Returns:
    [B] nats.
  """
  num_teacher = teacher_probs.shape[1]
  total, count = 0.0, 0
  for group, (log_probs, features, weights) in enumerate(
    zip(student_log_probs, student_features, student_weights, strict=True)
  ):
    match = match_tokens(features, teacher_features)
    per_token = matched_cross_entropy(teacher_probs, log_probs, match)
    per_pair = jnp.einsum('buvn,bvn->buv', per_token, weights)
    num_student = log_probs.shape[1]
    if group == 0:
      per_pair = per_pair * dino.pair_mask(num_teacher, num_student)
      count += dino.num_pairs(num_teacher, num_student)
    else:
      count += num_teacher * num_student
    total += per_pair.sum((1, 2))
  return total / count
