"""Distributions over many prototypes, without ever holding their logits.

With the student's prototypes w_k and features s_i, z_ik = <s_i, w_k> / tau_s,
and the teacher's probabilities P_t(j)_k, the cross entropy of a pair is

  H(P_t(j), P_s(i)) = n_i - <e_j, s_i> / tau_s,
  n_i = logsumexp_k z_ik,  e_j = sum_k P_t(j)_k w_k,

so that pairs never meet the prototypes: e_j is attention whose queries are the
teacher's features, whose keys are its prototypes and whose values are the
student's. As in flash attention (Dao et al. 2022, Alg. 1) tiles of prototypes
are passed over with a running maximum, and the backward pass computes logits
anew:

  dL/dz_ik = P_ik (A_i + a_i (g_k - sum_l P_il g_l)),   A_i = dL/dn_i,
  dL/dw_k = sum_i dL/dz_ik s_i / tau_s + sum_j P_t(j)_k dL/de_j,

where g_k = dL/dm_k is of a bag's distribution m_k = sum_i a_i P_ik, which is
compared with its image's for one tile at a time, in a pass of its own.
"""

from __future__ import annotations

import jax

from cmd_jax.losses import (
  prototype_fused,
  prototype_passes,
  prototype_platforms,
)
from cmd_jax.losses import prototype_tiles as tiles
from cmd_jax.losses.prototype_tiles import (
  Attended,
  Levels,
  Settings,
  Teacher,
)


def attend(
  settings: Settings,
  prototypes: Levels,
  student: Levels,
  student_weights: tuple[jax.Array, ...],
  teacher: Teacher,
  teacher_weights: tuple[jax.Array, ...],
  so_far: Levels | None = None,
) -> Attended:
  """Both networks' distributions over the prototypes, as far as a loss asks.

  The equations are in the module's docstring. Memory: one tile of logits, and
  arrays that do not grow with K, unless `Settings.keeps`.

  Args:
    settings: see there.
    prototypes: the student's, `Levels` of objects with arrays [..., K] whose
      `kernel()` is [d, K]; None where there is no such head. With gradient.
    student: features, `Levels` of [G, d] and [N, G, d], with gradient.
    student_weights: a of the regions, [N, G] of each size, with gradient; 1
      where the bag is pooled by its maximum, empty without a bag.
    teacher: see there.
    teacher_weights: likewise, of the teacher's regions.
    so_far: of the prototypes' kind. If given, its cotangent is itself plus the
      prototypes' gradient, which is then none of theirs: gradients of several
      calls are added up without a pass over them.
  """
  inputs = tiles.Inputs(
    prototypes, so_far, student, student_weights, teacher, teacher_weights
  )
  if settings.kernels and prototype_platforms.serves(settings, inputs):
    return prototype_fused.attend(settings, inputs)
  return prototype_passes.attend(settings, inputs)
