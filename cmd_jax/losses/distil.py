"""What a student's features lack of those of a frozen teacher."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cosine_distance(student: jax.Array, teacher: jax.Array) -> jax.Array:
  """1 - cos(s, t), half the squared distance of vectors of length 1.

  AM-RADIO (Ranzinger et al. 2024, section 3.3) matches the embeddings of images
  by it.

  Args:
    student: [..., D] of length 1.
    teacher: [..., D] of length 1.

  Returns:
    [...], from 0 to 2.
  """
  return 1 - jnp.sum(student * teacher, -1)


def similarity_kl(
  student: jax.Array, teacher: jax.Array, *, temperature: float
) -> jax.Array:
  """KL(p_t, p_s) of the similarities of a vector with anchors.

  p_x(a) = exp(x a / tau) / sum_b exp(x b / tau)

  With the teacher's embeddings of other images and of the same one as anchors a
  it is SEED's loss (Fang et al. 2021, equations 4 to 6) less the teacher's
  entropy, with one tau for both networks as in LightlyTrain.

  Args:
    student: [..., A], cosines of the student's vector and the anchors.
    teacher: [..., A], of the teacher's.
    temperature: tau.

  Returns:
    [...] nats.
  """
  of_teacher, of_student = (
    jax.nn.log_softmax(x / temperature, axis=-1) for x in (teacher, student)
  )
  return jnp.sum(jnp.exp(of_teacher) * (of_teacher - of_student), -1)
