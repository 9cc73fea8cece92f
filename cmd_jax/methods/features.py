"""The features of student and teacher of a batch, and how they compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cmd_jax.losses.blockwise import Scores
from cmd_jax.losses.esvit import match_tokens
from cmd_jax.methods.networks import Prototypes, ViewFeatures
from cmd_jax.models.heads import prototype_logits


class StudentFeatures(NamedTuple):
  """The student's features of each example, prototypes aside; with gradient.

  Tuples have an element for each view size, the teacher's first; they are empty
  where there is no such head.

  Attributes:
    image_bottlenecks: [B, V, d] of the image head, of length 1.
    region_bottlenecks: [B, V, N, d] of the region head.
    attention: [B, V, N] of the MIL head.
    teacher_attention: [B, T, N] of the student's MIL head on the teacher's
      tokens; None
      without one.
  """

  image_bottlenecks: tuple[jax.Array, ...]
  region_bottlenecks: tuple[jax.Array, ...]
  attention: tuple[jax.Array, ...]
  teacher_attention: jax.Array | None


class TeacherFeatures(NamedTuple):
  """The teacher's features of each example, without gradient.

  Attributes:
    embedding: [B, T, D] of the image.
    image_bottleneck: [B, T, d]; None without an image head.
    region_bottleneck: [B, T, N, d]; None without a region head.
    matches: [B, T, V, N] for each view size: the teacher's token that is most
      like each of the student's; empty without a region head.
  """

  embedding: jax.Array
  image_bottleneck: jax.Array | None
  region_bottleneck: jax.Array | None
  matches: tuple[jax.Array, ...]


class TeacherContext(NamedTuple):
  """What the comparison needs of the teacher besides, without gradient.

  Attributes:
    prototypes: the teacher's.
    centres: [K] of each of the teacher's heads, by 'image' and 'region'.
    temperature: tau_t, scalar.
  """

  prototypes: Prototypes
  centres: Mapping[str, jax.Array]
  temperature: jax.Array


class Logits(NamedTuple):
  """A network's logits over its temperature, for all or some prototypes.

  Attributes:
    image: [B, V, K] over all views; None without an image head.
    regions: [B, V, N, K] for each view size; empty without a region head.
  """

  image: jax.Array | None
  regions: tuple[jax.Array, ...]


class Comparison(NamedTuple):
  """Everything the terms of the loss are made of, for all or some prototypes.

  Attributes:
    fraction: of the prototypes that is here.
    student: the student's logits over tau_s.
    normalisers: their logsumexp over all prototypes, [B, V] and [B, V, N].
    student_image_log_probs: [B, V, K] over all views.
    student_region_log_probs: [B, V, N, K] for each view size.
    teacher_image_probs: [B, T, K].
    teacher_region_probs: [B, T, N, K]; None without a region head.
    attention: [B, V, N] for each view size.
    teacher_attention: [B, T, N]; None without MIL head.
    matches: see `TeacherFeatures`.
  """

  fraction: float
  student: Logits
  normalisers: Logits
  student_image_log_probs: jax.Array
  student_region_log_probs: tuple[jax.Array, ...]
  teacher_image_probs: jax.Array
  teacher_region_probs: jax.Array | None
  attention: tuple[jax.Array, ...]
  teacher_attention: jax.Array | None
  matches: tuple[jax.Array, ...]


def compute_scores(
  prototypes: Prototypes,
  context: TeacherContext,
  student: StudentFeatures,
  teacher: TeacherFeatures,
  *,
  student_temperature: float,
) -> Scores:
  """Computes both networks' `Logits` over all or some prototypes.

  Args:
    prototypes: the student's.
    context: of the teacher.
    student: the student's features.
    teacher: the teacher's features.
    student_temperature: tau_s.
  """

  def of_network(prototypes, images, regions, scale):
    image, regions = None, tuple(regions)
    if images and prototypes.image is not None:
      image = scale(
        'image',
        prototype_logits(
          jnp.concatenate(images, axis=1), prototypes.image.kernel()
        ),
      )
    if regions:
      kernel = prototypes.region.kernel()
      regions = tuple(
        scale('region', prototype_logits(x, kernel)) for x in regions
      )
    return Logits(image, regions)

  def of_student(_, logits):
    return logits / student_temperature

  def of_teacher(name, logits):
    return (logits - context.centres[name]) / context.temperature

  def given(x):
    return () if x is None else (x,)

  return Scores(
    of_network(
      prototypes,
      student.image_bottlenecks,
      student.region_bottlenecks,
      of_student,
    ),
    of_network(
      context.prototypes,
      given(teacher.image_bottleneck),
      given(teacher.region_bottleneck),
      of_teacher,
    ),
  )


def compare(
  scores: Scores,
  normalisers: Scores,
  student: StudentFeatures,
  teacher: TeacherFeatures,
  *,
  num_prototypes: int,
) -> Comparison:
  """Adds the distributions, softmax(logits / tau).

  Args:
    scores: `Logits` of both networks for all or some prototypes.
    normalisers: their logsumexp over all prototypes.
    student: the student's features.
    teacher: the teacher's features.
    num_prototypes: K.
  """

  def log_probs(logits, normaliser):
    return logits - normaliser[..., None]

  log_p = jax.tree.map(log_probs, scores.student, normalisers.student)
  probs = jax.tree.map(
    lambda *x: jnp.exp(log_probs(*x)), scores.teacher, normalisers.teacher
  )
  return Comparison(
    fraction=scores.student.image.shape[-1] / num_prototypes,
    student=scores.student,
    normalisers=normalisers.student,
    student_image_log_probs=log_p.image,
    student_region_log_probs=log_p.regions,
    teacher_image_probs=probs.image,
    teacher_region_probs=probs.regions[0] if probs.regions else None,
    attention=student.attention,
    teacher_attention=student.teacher_attention,
    matches=teacher.matches,
  )


def gather_features(
  student: Sequence[ViewFeatures], teacher: ViewFeatures
) -> tuple[StudentFeatures, TeacherFeatures]:
  """What both networks say, by whether it has a gradient.

  Args:
    student: for each view size.
    teacher: for the teacher's views.
  """
  matches = ()
  if teacher.region_bottleneck is not None:
    matches = tuple(
      match_tokens(view.features, teacher.features) for view in student
    )

  def given(name):
    values = (getattr(view, name) for view in student)
    return tuple(x for x in values if x is not None)

  return (
    StudentFeatures(
      given('image_bottleneck'),
      given('region_bottleneck'),
      given('attention'),
      None,
    ),
    TeacherFeatures(
      teacher.embedding,
      teacher.image_bottleneck,
      teacher.region_bottleneck,
      matches,
    ),
  )
