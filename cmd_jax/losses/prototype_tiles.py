"""What a tile of prototypes gives to the attention over prototypes.

The equations are in `prototype_attention`, which passes over the tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from cmd_jax.losses.blockwise import cut_block


class Levels(NamedTuple):
  """Something of images and something of their regions.

  Of arrays there is a tuple: of one [G, ...] of all images, ordered by the
  sizes of their views, and of [N, G, ...] of the regions for each size, tokens
  first, G being the views of all examples.
  """

  image: Any
  regions: Any


class Teacher(NamedTuple):
  """The teacher's side of the attention, without gradient.

  Attributes:
    features: `Levels` of [G, d] and [N, G, d].
    prototypes: `Levels` of objects whose `kernel()` is [d, K].
    centres: `Levels` of [K].
    temperature: tau_t, scalar.
  """

  features: Levels
  prototypes: Levels
  centres: Levels
  temperature: jax.Array


class Bag(NamedTuple):
  """How the distribution of a bag of regions is compared with its image's.

  Attributes:
    compare: (image's probabilities [G, k], bag's [G, k]) -> tuple of sums over
      these prototypes [G]; the sums have a gradient by the bag alone.
    by_maximum: whether the bag is the maximum over its regions instead of their
      weighted sum.
  """

  compare: Callable[[jax.Array, jax.Array], tuple[jax.Array, ...]]
  by_maximum: bool = False


class Settings(NamedTuple):
  """What is known when the program is compiled.

  Attributes:
    temperature: tau_s.
    student_bag: of the student's regions; None without.
    teacher_bag: likewise.
    prototypes: of a tile, a divisor of K.
    keeps: whether the first pass keeps the logits for the others, which takes
      memory and saves their products.
    kernels: 'tpu' or 'gpu' for Pallas kernels of that platform where they
      serve, '' for XLA's.
    interpret: whether kernels are run step by step, on any device.
  """

  temperature: float
  student_bag: Bag | None
  teacher_bag: Bag | None
  prototypes: int
  keeps: bool = False
  kernels: str = ''
  interpret: bool = False


class Attended(NamedTuple):
  """What a loss over prototypes is made of.

  Attributes:
    normalisers: n of the student's rows, `Levels` of [G] and [N, G].
    expected: e of the teacher's rows, `Levels` of [G, d] and [N, G, d].
    entropy: of the teacher's images, [G] nats, without gradient.
    student_bag: for each size of views what `Bag.compare` says, [G] each.
    teacher_bag: likewise.
  """

  normalisers: Levels
  expected: Levels
  entropy: jax.Array | None
  student_bag: tuple[tuple[jax.Array, ...], ...]
  teacher_bag: tuple[tuple[jax.Array, ...], ...]


class Inputs(NamedTuple):
  """Arguments of `attend`."""

  prototypes: Levels
  so_far: Levels | None
  student: Levels
  student_weights: tuple[jax.Array, ...]
  teacher: Teacher
  teacher_weights: tuple[jax.Array, ...]


class Logits(NamedTuple):
  """Of both networks, or what there is of each row of them."""

  student: Levels
  teacher: Levels


class Running(NamedTuple):
  """Sums over the prototypes that were seen, relative to their maximum.

  Attributes:
    peak: largest logit.
    total: sum of exp(logit - peak).
    expected: sum of exp(logit - peak) w; None for the student's.
    weighted: sum of exp(logit - peak) (logit - peak); None but for the images
      of the teacher.
  """

  peak: jax.Array
  total: jax.Array
  expected: jax.Array | None
  weighted: jax.Array | None


def wide(dtype: jnp.dtype) -> jnp.dtype:
  """The type of sums of numbers of a type, at least float32."""
  return jnp.promote_types(dtype, jnp.float32)


def times(rows: jax.Array, matrix: jax.Array, axis: int) -> jax.Array:
  """Products of [..., x] with a matrix along one of its axes, in `wide`."""
  return lax.dot_general(
    rows,
    matrix.astype(rows.dtype),
    (((rows.ndim - 1,), (axis,)), ((), ())),
    preferred_element_type=wide(rows.dtype),
  )


def outer(rows: jax.Array, values: jax.Array) -> jax.Array:
  """[d, k], the sum over all rows of [..., d] times [..., k]."""
  axes = tuple(range(rows.ndim - 1))
  return lax.dot_general(
    rows,
    values.astype(rows.dtype),
    ((axes, axes), ((), ())),
    preferred_element_type=wide(rows.dtype),
  )


def of_levels(fn: Callable, *levels: Levels) -> Levels:
  """Applies a function to every array, given what its level has in common.

  Args:
    fn: (common to the level, array, ...) -> anything.
    *levels: the first with one object a level, the others with tuples.
  """
  common, *arrays = levels
  return Levels(
    *(
      tuple(fn(shared, *x) for x in zip(*each, strict=True))
      for shared, *each in zip(common, *arrays, strict=True)
    )
  )


def kernels_of(prototypes: Levels) -> Levels:
  """[d, k] of each level; None where there is no such head."""
  return Levels(*(None if x is None else x.kernel() for x in prototypes))


def logits_of(
  settings: Settings, inputs: Inputs, number: jax.Array, kernels: Levels
) -> Logits:
  """Of a tile; logits are divided by their temperatures."""
  teacher = inputs.teacher
  prototypes, centres = cut_block(
    (teacher.prototypes, teacher.centres), number, settings.prototypes
  )

  def of_student(kernel, rows):
    return times(rows, kernel, 0) / settings.temperature

  def of_teacher(shared, rows):
    kernel, centre = shared
    return (times(rows, kernel, 0) - centre) / teacher.temperature

  shared = Levels(*zip(kernels_of(prototypes), centres, strict=True))
  return Logits(
    of_levels(of_student, kernels, inputs.student),
    of_levels(of_teacher, shared, teacher.features),
  )


def start(rows: jax.Array, expects: bool, weighs: bool) -> Running:
  """Of no prototypes, for [..., d] rows."""
  sums = jnp.zeros(rows.shape[:-1], wide(rows.dtype))
  return Running(
    sums - jnp.inf,
    sums,
    jnp.zeros(rows.shape, sums.dtype) if expects else None,
    sums if weighs else None,
  )


def add_tile(
  kernel: jax.Array | None, running: Running, logits: jax.Array
) -> Running:
  """Adds a tile of prototypes, for all that `running` has."""
  peak = jnp.maximum(running.peak, logits.max(-1))
  rescale = jnp.exp(running.peak - peak)
  logits = logits - peak[..., None]
  probs = jnp.exp(logits)
  expected, weighted = running.expected, running.weighted
  if expected is not None:
    more = times(probs.astype(kernel.dtype), kernel, 1)
    expected = expected * rescale[..., None] + more
  if weighted is not None:
    # At first there is nothing to move, and no peak to move it from.
    moved = jnp.where(running.total > 0, running.peak - peak, 0)
    weighted = rescale * (weighted + running.total * moved)
    weighted += (probs * logits).sum(-1)
  total = running.total * rescale + probs.sum(-1)
  return Running(peak, total, expected, weighted)


def _pool(bag: Bag, weights: jax.Array, probs: jax.Array):
  """A bag's distribution [G, k], and whose it is: [N, G, k], or 1 for all."""
  if not bag.by_maximum:
    return (weights[..., None] * probs).sum(0), 1.0
  peak = probs.max(0)
  is_peak = probs == peak
  return peak, is_peak / is_peak.sum(0)


def probabilities(logits: Levels, normalisers: Levels) -> Levels:
  """The softmax over all prototypes."""
  return of_levels(
    lambda _, x, normaliser: jnp.exp(x - normaliser[..., None]),
    Levels(None, None),
    logits,
    normalisers,
  )


def _by_size(levels: Levels) -> Levels:
  """Images apart by the sizes of their views, as the regions are."""
  ends = np.cumsum([x.shape[1] for x in levels.regions])[:-1]
  return Levels(jnp.split(levels.image[0], ends), levels.regions)


def compare_bags(bag: Bag | None, weights: tuple, probs: Levels) -> tuple:
  """Of a tile, for each size: sums [G], and sum_k P_ik g_k [N, G] of each."""
  if bag is None:
    return ()

  def compare(weights, image, regions):
    pooled, share = _pool(bag, weights, regions)
    sums, pull_back = jax.vjp(lambda x: bag.compare(image, x), pooled)
    moments = []
    for index in range(len(sums)):
      unit = tuple(jnp.full_like(x, i == index) for i, x in enumerate(sums))
      (gradient,) = pull_back(unit)
      moments.append((regions * share * gradient).sum(-1))
    return sums, tuple(moments)

  return tuple(map(compare, weights, *_by_size(probs)))


def logit_gradients(
  settings: Settings,
  inputs: Inputs,
  probs: Levels,
  of_normalisers: Levels,
  cotangents: Attended,
) -> Levels:
  """dL/dz of the student's rows, for a tile.

  Args:
    settings: of the call.
    inputs: of the call.
    probs: of the tile, the student's.
    of_normalisers: A_i - a_i sum_l P_il g_l.
    cotangents: of the result.
  """
  bag = settings.student_bag

  def differentiate(weights, image, regions, of_normalisers, cotangent):
    pooled, share = _pool(bag, weights, regions)
    _, pull_back = jax.vjp(lambda x: bag.compare(image, x), pooled)
    (of_bag,) = pull_back(cotangent)
    return regions * (
      of_normalisers[..., None] + weights[..., None] * share * of_bag
    )

  if bag is None:
    return of_levels(
      lambda _, x, of: x * of[..., None],
      Levels(None, None),
      probs,
      of_normalisers,
    )
  return Levels(
    tuple(
      x * of[..., None]
      for x, of in zip(probs.image, of_normalisers.image, strict=True)
    ),
    tuple(
      map(
        differentiate,
        inputs.student_weights,
        *_by_size(probs),
        of_normalisers.regions,
        cotangents.student_bag,
      )
    ),
  )
