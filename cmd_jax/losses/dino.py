"""Image-to-image distillation (DINO, Caron et al. 2021) and its centring.

Views are ordered so that the teacher's T views are the first of the student's
V views. A pair (u, v) with u = v compares a view with itself and is left out.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cmd_jax.devices import chunking, sharding

# What the logits of some examples may take in `sinkhorn_centre`.
LOGIT_BYTES = 64 * 2**20


def pair_mask(num_teacher: int, num_student: int) -> jax.Array:
  """[T, V] bool: True for the pairs of different views."""
  return ~jnp.eye(num_teacher, num_student, dtype=bool)


def num_pairs(num_teacher: int, num_student: int) -> int:
  """Number of pairs (u, v) with u != v."""
  return num_teacher * num_student - min(num_teacher, num_student)


def image_loss(
  teacher: jax.Array, student: jax.Array, normalisers: jax.Array
) -> jax.Array:
  """Mean over the pairs u != v of H(P_t(u), P_s(v)).

  L_I of CMD; DINO's loss (main_dino.py `DINOLoss.forward`), which the mean over
  the batch follows. H(P_t, P_s) = n - sum_k P_t,k z_k with z the student's
  logits and n their normaliser. The sum is a product of vectors, of P_t with z
  or, as z is linear, of expected prototypes with the student's features.

  Args:
    teacher: [B, T, D]: the prototypes expected under the teacher's
      distribution, or that distribution.
    student: [B, V, D]: features over tau_s, or logits.
    normalisers: [B, V], logsumexp of the logits.

  Returns:
    [B] nats.
  """
  num_teacher, num_student = teacher.shape[1], student.shape[1]
  mask = pair_mask(num_teacher, num_student)
  products = jnp.einsum(
    'bud,bvd->buv', teacher, student, precision=jax.lax.Precision.HIGHEST
  )
  total = jnp.sum((normalisers[:, None] - products) * mask, axis=(1, 2))
  return total / num_pairs(num_teacher, num_student)


def update_centre(
  centre: jax.Array,
  logits: jax.Array,
  *,
  momentum: float,
  axis_name: str | None,
) -> jax.Array:
  """Exponential moving average of the teacher's mean logits.

  c <- m c + (1 - m) mean(logits), the mean over the global batch (DINO,
  Eq. 4).

  Args:
    centre: [K].
    logits: [..., K] of the teacher.
    momentum: m.
    axis_name: axis over which the batch is spread, None if it is global.

  Returns:
    [K].
  """
  mean = logits.reshape(-1, logits.shape[-1]).mean(0)
  mean = sharding.pmean(mean, axis_name)
  return momentum * centre + (1 - momentum) * mean


def sinkhorn_centre(
  features: jax.Array,
  prototypes: jax.Array,
  temperature: jax.Array,
  *,
  num_iterations: int = 3,
  axis_name: str | None = None,
  mesh: Mesh | None = None,
) -> jax.Array:
  """The centre with which all prototypes are used equally, without gradient.

  Sinkhorn-Knopp normalisation over the global batch (SwAV, Caron et al. 2020,
  Sec. 3.1; used for DINO in DINOv2): columns and rows of exp(logits / tau) are
  scaled in turn, rows last. The scales of the columns are all that is needed:
  as -tau times their logarithm they are a centre, and the softmax
  scales the rows. At first every row is shifted by its own maximum, which is
  not in the published algorithm: its rows weigh differently in the first
  scaling of the columns, and the small recipe learns far less by it
  (benchmarks/README.md).

  Args:
    features: [B, ..., d] of the teacher's head.
    prototypes: [d, K].
    temperature: scalar tau.
    num_iterations: number of alternations, at least 1.
    axis_name: axis over which the batch is spread, None if it is global.
    mesh: the devices over which a global batch is spread.

  Returns:
    [K].
  """

  def of_device(shared, features, axis_name):
    prototypes, temperature = shared
    rows = math.prod(features.shape[1:-1])
    num_bytes = 4 * rows * prototypes.shape[1]
    size = chunking.examples_in_a_block(len(features), num_bytes, LOGIT_BYTES)
    features = features.reshape(-1, size * rows, features.shape[-1])

    def scaled(block, log_scale):
      logits = jnp.dot(
        block,
        prototypes.astype(block.dtype),
        preferred_element_type=jnp.promote_types(block.dtype, jnp.float32),
      )
      return logits / temperature + log_scale

    def scale_columns(log_total, log_scale, scale_rows):
      def add(log_total, block):
        log_rows = scale_rows(scaled(block, log_scale))
        log_sum = jax.nn.logsumexp(log_rows, axis=0)
        return jnp.logaddexp(log_total, log_sum), None

      log_total, _ = jax.lax.scan(add, log_total, features)
      return log_scale - sharding.logsumexp(log_total, axis_name)

    num_prototypes = prototypes.shape[1]
    nothing = jnp.full(num_prototypes, -jnp.inf)
    log_scale = scale_columns(
      nothing,
      jnp.zeros(num_prototypes),
      lambda rows: rows - rows.max(-1, keepdims=True),
    )
    for _ in range(num_iterations - 1):
      log_scale = scale_columns(nothing, log_scale, jax.nn.log_softmax)
    return -temperature * log_scale, ()

  spread = sharding.on_each_device(of_device, mesh, axis_name)
  centre, _ = spread((prototypes, temperature), features)
  return jax.lax.stop_gradient(centre)


def entropy(probs: jax.Array) -> jax.Array:
  """Entropy over the last axis in nats; 0 log 0 = 0."""
  return -jnp.sum(jax.scipy.special.xlogy(probs, probs), axis=-1)
