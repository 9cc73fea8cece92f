"""The passes over tiles of prototypes, written for XLA on any platform.

The equations are in `prototype_attention`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cmd_jax.losses import prototype_tiles as tiles
from cmd_jax.losses.blockwise import add_to_block, cut_block
from cmd_jax.losses.prototype_tiles import (
  Attended,
  Levels,
  Settings,
)


def _numbers(settings: Settings, inputs: tiles.Inputs) -> jax.Array:
  num_prototypes = jax.tree.leaves(inputs.prototypes)[0].shape[-1]
  return jnp.arange(num_prototypes // settings.prototypes)


def _normalise(
  settings: Settings, inputs: tiles.Inputs
) -> tuple[tiles.Logits, Any]:
  """The first pass: `Running` of every row, and the logits if they are kept."""
  teacher = inputs.teacher.features

  def step(running, number):
    kernels = tiles.kernels_of(
      cut_block(inputs.prototypes, number, settings.prototypes)
    )
    logits = tiles.logits_of(settings, inputs, number, kernels)
    values = Levels(
      *(
        None if kernel is None or not rows else kernel.astype(rows[0].dtype)
        for kernel, rows in zip(kernels, teacher, strict=True)
      )
    )
    nothing = Levels(None, None)
    running = tiles.Logits(
      tiles.of_levels(tiles.add_tile, nothing, running.student, logits.student),
      tiles.of_levels(tiles.add_tile, values, running.teacher, logits.teacher),
    )
    return running, logits if settings.keeps else None

  start = tiles.Logits(
    jax.tree.map(lambda x: tiles.start(x, False, False), inputs.student),
    Levels(
      tuple(tiles.start(x, True, True) for x in teacher.image),
      tuple(tiles.start(x, True, False) for x in teacher.regions),
    ),
  )
  return lax.scan(step, start, _numbers(settings, inputs))


def _compare(
  settings: Settings, inputs: tiles.Inputs, normalisers: tiles.Logits, kept: Any
) -> tuple:
  """The second pass: `compare_bags` of all prototypes, of both networks."""

  def of_tile(number, logits):
    if logits is None:
      kernels = tiles.kernels_of(
        cut_block(inputs.prototypes, number, settings.prototypes)
      )
      logits = tiles.logits_of(settings, inputs, number, kernels)
    return tuple(
      map(
        tiles.compare_bags,
        (settings.student_bag, settings.teacher_bag),
        (inputs.student_weights, inputs.teacher_weights),
        map(tiles.probabilities, logits, normalisers),
      )
    )

  def step(total, tile):
    return jax.tree.map(jnp.add, total, of_tile(*tile)), None

  blocks = (_numbers(settings, inputs), kept)
  like = jax.eval_shape(of_tile, *jax.tree.map(lambda x: x[0], blocks))
  start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
  total, _ = lax.scan(step, start, blocks)
  return total


def _entropy(running: tiles.Running) -> jax.Array:
  return jnp.log(running.total) - running.weighted / running.total


def _is_running(x: Any) -> bool:
  return isinstance(x, tiles.Running)


def forward(settings: Settings, inputs: tiles.Inputs) -> tuple[Attended, tuple]:
  """The result, and what the backward pass needs besides the inputs.

  That is the normalisers, the moments, and the logits if they are kept.
  """
  running, kept = _normalise(settings, inputs)
  normalisers = jax.tree.map(
    lambda x: x.peak + jnp.log(x.total), running, is_leaf=_is_running
  )
  student_bag, teacher_bag = _compare(settings, inputs, normalisers, kept)
  attended = Attended(
    normalisers.student,
    jax.tree.map(
      lambda x: x.expected / x.total[..., None],
      running.teacher,
      is_leaf=_is_running,
    ),
    _entropy(*running.teacher.image) if running.teacher.image else None,
    tuple(sums for sums, _ in student_bag),
    tuple(sums for sums, _ in teacher_bag),
  )
  moments = tuple(
    tuple(moments for _, moments in bag) for bag in (student_bag, teacher_bag)
  )
  return attended, (normalisers, moments, kept)


def _weighted_moments(cotangents: tuple, moments: tuple) -> tuple:
  """sum_k P_ik dL/dm_k of each size [N, G]; it is dL/da_i, too."""
  return tuple(
    sum(c * m for c, m in zip(of_sums, of_size, strict=True))
    for of_sums, of_size in zip(cotangents, moments, strict=True)
  )


def _kernel_gradients(
  kernels: Levels,
  student: Levels,
  gradients: Levels,
  teacher: Levels,
  cotangents: Levels,
) -> Levels:
  """[d, k] of each level of a tile, by its logits and by the expected.

  Args:
    kernels: the student's.
    student: features.
    gradients: of the products of features and kernels.
    teacher: probabilities.
    cotangents: of the expected prototypes.
  """

  def of_level(kernel, rows, gradients, teacher, cotangents):
    if kernel is None:
      return None
    # Rows of no views leave zeros.
    return sum(map(tiles.outer, rows, gradients), jnp.zeros_like(kernel)) + sum(
      tiles.outer(x.astype(rows[0].dtype), p)
      for x, p in zip(cotangents, teacher, strict=True)
    )

  return Levels(
    *map(of_level, kernels, student, gradients, teacher, cotangents)
  )


def backward(
  settings: Settings,
  inputs: tiles.Inputs,
  residuals: tuple,
  of_normalisers: Levels,
  cotangents: Attended,
) -> tuple[Levels, Levels]:
  """The last pass: gradients of the prototypes and of the student's rows."""
  normalisers, _, kept = residuals

  def of_tile(number, logits):
    block = cut_block(inputs.prototypes, number, settings.prototypes)
    kernels, pull_back = jax.vjp(tiles.kernels_of, block)
    if logits is None:
      logits = tiles.logits_of(settings, inputs, number, kernels)
    probs, teacher = map(tiles.probabilities, logits, normalisers)
    scaled = jax.tree.map(
      lambda x: x / settings.temperature,
      tiles.logit_gradients(
        settings, inputs, probs, of_normalisers, cotangents
      ),
    )
    of_rows = tiles.of_levels(
      lambda kernel, rows, x: tiles.times(x.astype(rows.dtype), kernel, 1),
      kernels,
      inputs.student,
      scaled,
    )

    of_kernels = _kernel_gradients(
      kernels, inputs.student, scaled, teacher, cotangents.expected
    )
    return pull_back(of_kernels)[0], of_rows

  def step(carry, tile):
    of_prototypes, of_rows = carry
    block, more = of_tile(*tile)
    return (
      add_to_block(of_prototypes, block, tile[0]),
      jax.tree.map(jnp.add, of_rows, more),
    ), None

  so_far = inputs.so_far
  if so_far is None:
    so_far = jax.tree.map(jnp.zeros_like, inputs.prototypes)
  start = jax.tree.map(
    lambda x: jnp.zeros(x.shape, tiles.wide(x.dtype)), inputs.student
  )
  blocks = (_numbers(settings, inputs), kept)
  (of_prototypes, of_rows), _ = lax.scan(step, (so_far, start), blocks)
  like = jax.tree.map(lambda x, y: x.astype(y.dtype), of_rows, inputs.student)
  return of_prototypes, like


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(settings: Settings, inputs: tiles.Inputs) -> Attended:
  """See `prototype_attention.attend`."""
  return forward(settings, inputs)[0]


def _attend_fwd(settings: Settings, inputs: tiles.Inputs):
  attended, residuals = forward(settings, inputs)
  return attended, (inputs, residuals)


def of_bags(
  settings: Settings,
  inputs: tiles.Inputs,
  cotangents: Attended,
  student_moments: tuple,
  teacher_moments: tuple,
) -> tuple[tuple, Levels, tuple]:
  """dL/da of the student, A_i - a_i sum_k P_ik g_k, and dL/da of the teacher.

  Args:
    settings: of the call.
    inputs: of the call.
    cotangents: of the result.
    student_moments: sum_k P_ik g_k [N, G] of each sum of each size.
    teacher_moments: likewise.
  """
  of_weights = _weighted_moments(cotangents.student_bag, student_moments)
  of_normalisers = cotangents.normalisers
  if settings.student_bag is not None:
    regions = tuple(
      a - weights * x
      for a, weights, x in zip(
        of_normalisers.regions, inputs.student_weights, of_weights, strict=True
      )
    )
    of_normalisers = of_normalisers._replace(regions=regions)
  of_teacher = _weighted_moments(cotangents.teacher_bag, teacher_moments)
  return of_weights, of_normalisers, of_teacher


def gradients_of_inputs(
  settings: Settings,
  inputs: tiles.Inputs,
  of_prototypes: Levels,
  of_student: Levels,
  of_weights: tuple,
  of_teacher_weights: tuple,
) -> tuple[tiles.Inputs]:
  """What a backward pass returns, `so_far` being in `of_prototypes`."""

  def learned(bag, of_weights):
    # Nothing is weighted where the maximum is taken.
    return None if bag is None or bag.by_maximum else of_weights

  none_before = inputs.so_far is None
  return (
    tiles.Inputs(
      of_prototypes if none_before else None,
      None if none_before else of_prototypes,
      of_student,
      learned(settings.student_bag, of_weights),
      None,
      learned(settings.teacher_bag, of_teacher_weights),
    ),
  )


def _attend_bwd(settings: Settings, saved: tuple, cotangents: Attended):
  inputs, residuals = saved
  of_weights, of_normalisers, of_teacher_weights = of_bags(
    settings, inputs, cotangents, *residuals[1]
  )
  of_prototypes, of_student = backward(
    settings, inputs, residuals, of_normalisers, cotangents
  )
  return gradients_of_inputs(
    settings, inputs, of_prototypes, of_student, of_weights, of_teacher_weights
  )


attend.defvjp(_attend_fwd, _attend_bwd)
