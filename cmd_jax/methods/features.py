"""The features of student and teacher of a batch, and how they compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.losses import blockwise, prototype_attention
from cmd_jax.losses.esvit import match_tokens
from cmd_jax.losses.prototype_tiles import (
  Attended,
  Bag,
  Levels,
  Settings,
  Teacher,
)
from cmd_jax.methods.networks import Prototypes, ViewFeatures
from cmd_jax.models.heads import prototype_logits
from cmd_jax.models.layers import wide


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


class BagTerms(NamedTuple):
  """How the image's distribution is compared with that of its regions.

  Attributes:
    compare: see `prototype_tiles.Bag`.
    pooling: 'attention', 'mean', 'sum' or 'max' over the regions.
    of_student: whether a term looks at the student's bags.
    of_teacher: likewise, at the teacher's.
    compare_logits: (image's logits / tau_s [..., k], their sum over the regions
      [..., k]) -> sum over these prototypes [...], with gradient by both; None
      where no term looks at it.
  """

  compare: Callable[..., tuple[jax.Array, ...]]
  pooling: str
  of_student: bool
  of_teacher: bool
  compare_logits: Callable[[jax.Array, jax.Array], jax.Array] | None = None


class Comparison(NamedTuple):
  """Everything the terms of the loss are made of; nothing is K long.

  Expected prototypes e are the mean of the student's prototypes under the
  teacher's distribution. Their product with s / tau_s is the mean logit, so
  that a cross entropy is the normaliser less that product.

  Attributes:
    student_images: [B, V, d], s / tau_s over all views.
    image_normalisers: [B, V], their logsumexp over all prototypes.
    student_regions: [B, V, N, d] for each view size; empty without a region
      head.
    region_normalisers: [B, V, N] likewise.
    expected_images: e of the teacher's views, [B, T, d].
    expected_regions: [B, T, N, d]; None without a region head.
    teacher_entropy: of the teacher's views, [B, T] nats.
    student_bag: what `BagTerms.compare` says of all views, [B, V] each.
    teacher_bag: likewise, [B, T] each.
    logit_bag: what `BagTerms.compare_logits` says, [B, V]; None without it.
    attention: [B, V, N] for each view size.
    matches: see `TeacherFeatures`.
  """

  student_images: jax.Array
  image_normalisers: jax.Array
  student_regions: tuple[jax.Array, ...]
  region_normalisers: tuple[jax.Array, ...]
  expected_images: jax.Array
  expected_regions: jax.Array | None
  teacher_entropy: jax.Array
  student_bag: tuple[jax.Array, ...]
  teacher_bag: tuple[jax.Array, ...]
  logit_bag: jax.Array | None
  attention: tuple[jax.Array, ...]
  matches: tuple[jax.Array, ...]


def count_rows(student: StudentFeatures, teacher: TeacherFeatures) -> int:
  """Rows of logits of an example, of both networks."""
  rows = (
    student.image_bottlenecks,
    student.region_bottlenecks,
    teacher.image_bottleneck,
    teacher.region_bottleneck,
  )
  return sum(math.prod(x.shape[1:-1]) for x in jax.tree.leaves(rows))


def _given(x: jax.Array | None) -> tuple[jax.Array, ...]:
  return () if x is None else (x,)


def _merge(levels: Levels) -> Levels:
  """[B, V, d] of each size -> [G, d], [B, V, N, d] of each -> [N, B V, d].

  With tokens first, sums over them add whole rows of prototypes.
  """
  images = [x.reshape(-1, x.shape[-1]) for x in levels.image]
  return Levels(
    (jnp.concatenate(images),), tuple(map(_tokens_first, levels.regions))
  )


def _tokens_first(x: jax.Array) -> jax.Array:
  """[B, V, N, ...] -> [N, B V, ...]."""
  x = jnp.moveaxis(x, 2, 0)
  return x.reshape(len(x), x.shape[1] * x.shape[2], *x.shape[3:])


def _tokens_last(x: jax.Array, batch_size: int) -> jax.Array:
  """Undoes `_tokens_first`."""
  x = x.reshape(len(x), batch_size, x.shape[1] // batch_size, *x.shape[2:])
  return jnp.moveaxis(x, 0, 2)


def _join_views(sizes: Sequence[jax.Array], batch_size: int) -> jax.Array:
  """[B V, ...] of each size of views -> [B, V, ...] of all."""
  views = [x.reshape(batch_size, -1, *x.shape[1:]) for x in sizes]
  return jnp.concatenate(views, axis=1)


def _join_bags(bags: tuple, batch_size: int) -> tuple[jax.Array, ...]:
  """Sums [G] of each size -> [B, V] of each sum."""
  return tuple(_join_views(x, batch_size) for x in zip(*bags, strict=True))


def _split(levels: Levels, like: Levels) -> Levels:
  """Undoes `_merge`, for any number of axes; images of all sizes in one."""
  batch_size = len(like.image[0])
  ends = np.cumsum([batch_size * x.shape[1] for x in like.image])[:-1]
  return Levels(
    _join_views(jnp.split(levels.image[0], ends), batch_size),
    tuple(_tokens_last(x, batch_size) for x in levels.regions),
  )


def _bag_weights(
  pooling: str, regions: tuple[jax.Array, ...], attention: tuple
) -> tuple[jax.Array, ...]:
  """[N, G] of each size, for [N, G, d] regions and [B, V, N] attention."""
  if pooling == 'attention':
    return tuple(map(_tokens_first, attention))
  return tuple(
    jnp.full(x.shape[:-1], 1 / len(x) if pooling == 'mean' else 1.0)
    for x in regions
  )


def _compare_logits(
  bags: BagTerms | None,
  prototypes: Prototypes,
  student: StudentFeatures,
  temperature: float,
  size: int,
) -> jax.Array | None:
  """[B, V], see `BagTerms`: the sum of logits is the logit of the sum."""
  if bags is None or bags.compare_logits is None:
    return None
  dtype = student.image_bottlenecks[0].dtype
  images = jnp.concatenate(student.image_bottlenecks, axis=1)
  sums = jnp.concatenate(
    [x.astype(wide(dtype)).sum(2) for x in student.region_bottlenecks], axis=1
  )

  def of_tile(prototypes, features):
    images, sums = features
    image, region = (x.kernel().astype(dtype) for x in prototypes)
    return bags.compare_logits(
      prototype_logits(images.astype(dtype), image) / temperature,
      prototype_logits(sums, region) / temperature,
    )

  # Gradients of the images, too, are added up in float32.
  rows = (images.astype(sums.dtype), sums)
  return blockwise.sum_over_prototypes(of_tile, size, prototypes, rows)


def _attend(
  prototypes: Prototypes,
  context: TeacherContext,
  student: tuple[Levels, tuple],
  teacher: tuple[Levels, tuple],
  bags: BagTerms | None,
  settings: Settings,
  so_far: Prototypes | None,
) -> Attended:
  """See `prototype_attention.attend`; sets the bags among the settings.

  Args:
    prototypes: the student's.
    context: of the teacher.
    student: features as `_merge` makes them, and the regions' attention.
    teacher: likewise.
    bags: see `compare`.
    settings: but for the bags.
    so_far: see `compare`.
  """
  weights, teacher_weights = (), ()
  if bags is not None:
    bag = Bag(bags.compare, bags.pooling == 'max')
    if bags.of_student:
      weights = _bag_weights(bags.pooling, student[0].regions, student[1])
      settings = settings._replace(student_bag=bag)
    if bags.of_teacher:
      teacher_weights = _bag_weights(
        bags.pooling, teacher[0].regions, teacher[1]
      )
      settings = settings._replace(teacher_bag=bag)
  return prototype_attention.attend(
    settings,
    Levels(*prototypes),
    student[0],
    weights,
    Teacher(
      teacher[0],
      Levels(*context.prototypes),
      Levels(context.centres['image'], context.centres.get('region')),
      context.temperature,
    ),
    teacher_weights,
    None if so_far is None else Levels(*so_far),
  )


def compare(
  prototypes: Prototypes,
  context: TeacherContext,
  student: StudentFeatures,
  teacher: TeacherFeatures,
  *,
  student_temperature: float,
  bags: BagTerms | None,
  plan: blockwise.Plan,
  so_far: Prototypes | None = None,
) -> Comparison:
  """Compares both networks' distributions, softmax(logits / tau).

  Args:
    prototypes: the student's.
    context: of the teacher.
    student: the student's features.
    teacher: the teacher's features.
    student_temperature: tau_s.
    bags: how bags of regions are compared; None where no term does.
    plan: how many prototypes are seen at a time.
    so_far: sum of the prototypes' gradients, see `prototype_attention.attend`.
  """
  batch_size = len(student.image_bottlenecks[0])
  of_student = Levels(student.image_bottlenecks, student.region_bottlenecks)
  of_teacher = Levels(
    _given(teacher.image_bottleneck), _given(teacher.region_bottleneck)
  )
  attended = _attend(
    prototypes,
    context,
    (_merge(of_student), student.attention),
    (_merge(of_teacher), _given(student.teacher_attention)),
    bags,
    Settings(
      student_temperature,
      None,
      None,
      plan.prototypes,
      plan.keeps,
      plan.kernels,
    ),
    so_far,
  )
  logit_bag = _compare_logits(
    bags, prototypes, student, student_temperature, plan.prototypes
  )
  scaled = jax.tree.map(
    lambda x: x.astype(wide(x.dtype)) / student_temperature, of_student
  )
  normalisers = _split(attended.normalisers, of_student)
  expected = _split(attended.expected, of_teacher)
  return Comparison(
    jnp.concatenate(scaled.image, axis=1),
    normalisers.image,
    scaled.regions,
    normalisers.regions,
    expected.image,
    expected.regions[0] if expected.regions else None,
    attended.entropy.reshape(batch_size, -1),
    _join_bags(attended.student_bag, batch_size),
    _join_bags(attended.teacher_bag, batch_size),
    logit_bag,
    student.attention,
    teacher.matches,
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
