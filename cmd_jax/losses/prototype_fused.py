"""The attention over prototypes with kernels for the regions.

The same function as `prototype_attention.attend`, whose equations it follows.
Images, a hundredth of the rows, go through its tiles; regions, and the bags
that are made of them, through the kernels of the platform.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.losses import prototype_blocks as blocks
from cmd_jax.losses import prototype_passes as reference
from cmd_jax.losses import prototype_tiles as tiles
from cmd_jax.losses.prototype_platforms import Functions, functions_of
from cmd_jax.losses.prototype_tiles import Attended, Levels, Settings


class _Size(NamedTuple):
  """The regions of one size of views, in blocks.

  Attributes:
    shape: how they are cut, by `Functions.make_shape`.
    num_views: G.
    rows: [blocks, N g, d].
    normalisers: [blocks, N g], in units of log 2.
    weights: a, [blocks, N g]; 0 without a bag.
  """

  shape: Any
  num_views: int
  rows: jax.Array
  normalisers: jax.Array
  weights: jax.Array


def _images_alone(
  settings: Settings, inputs: tiles.Inputs
) -> tuple[Settings, tiles.Inputs]:
  teacher = inputs.teacher
  return (
    settings._replace(student_bag=None, teacher_bag=None, keeps=False),
    tiles.Inputs(
      inputs.prototypes._replace(regions=None),
      inputs.so_far and inputs.so_far._replace(regions=None),
      inputs.student._replace(regions=()),
      (),
      teacher._replace(
        features=teacher.features._replace(regions=()),
        prototypes=teacher.prototypes._replace(regions=None),
        centres=teacher.centres._replace(regions=None),
      ),
      (),
    ),
  )


def _kernel(
  columns: jax.Array, centre: jax.Array | None, temperature: Any, dtype
) -> blocks.Kernel:
  scale = jnp.asarray(blocks.LOG2_E / temperature, jnp.float32)
  bias = jnp.zeros(columns.shape[1]) if centre is None else centre * scale
  return blocks.Kernel(
    columns.astype(dtype), bias[None].astype(jnp.float32), scale[None]
  )


def _kernels(settings: Settings, inputs: tiles.Inputs) -> tuple[Levels, Levels]:
  """Of student and teacher, of both levels."""
  dtype = inputs.student.regions[0].dtype
  teacher = inputs.teacher
  student = Levels(
    *(
      _kernel(x.kernel(), None, settings.temperature, dtype)
      for x in inputs.prototypes
    )
  )
  of_teacher = Levels(
    *(
      _kernel(x.kernel(), centre, teacher.temperature, dtype)
      for x, centre in zip(teacher.prototypes, teacher.centres, strict=True)
    )
  )
  return student, of_teacher


def _cut(
  functions: Functions,
  x: jax.Array,
  weights: jax.Array | None,
  kernel: blocks.Kernel,
  normalisers: jax.Array | None = None,
) -> _Size:
  """[N, G, d] regions and [N, G] weights in blocks."""
  tokens, num_views, _ = x.shape
  shape = functions.make_shape(tokens, num_views, kernel.columns.shape[1])
  rows = blocks.to_blocks(x, shape.views)
  if weights is None:
    given = jnp.zeros(rows.shape[:2])
  else:
    given = blocks.to_blocks(weights, shape.views)
  return _Size(shape, num_views, rows, normalisers, given)


def _sizes(
  functions: Functions, regions: tuple, weights: tuple, kernel: blocks.Kernel
) -> list[_Size]:
  """Cuts the regions of each size into blocks and normalises them."""
  weights = weights or (None,) * len(regions)
  sizes = [
    _cut(functions, *x, kernel) for x in zip(regions, weights, strict=True)
  ]
  return [
    x._replace(normalisers=functions.normalise(x.shape, x.rows, kernel))
    for x in sizes
  ]


def _images(
  sizes: list[_Size],
  rows: jax.Array,
  normalisers: jax.Array,
  kernel: blocks.Kernel,
  cotangents: tuple | None = None,
) -> list[blocks.Images]:
  """The images of each size's bags, which are ordered as the sizes are.

  Args:
    sizes: of the regions.
    rows: [G, d] of all sizes.
    normalisers: [G].
    kernel: their prototypes.
    cotangents: of the sums of each size, [G] each.
  """
  ends = np.cumsum([x.num_views for x in sizes])[:-1]
  columns = jnp.split(normalisers * blocks.LOG2_E, ends)
  found = []
  for index, (size, x) in enumerate(
    zip(sizes, jnp.split(rows, ends), strict=True)
  ):
    lanes = [columns[index], *(cotangents[index] if cotangents else ())]
    views = size.shape.views
    found.append(
      blocks.Images(
        blocks.to_blocks(x[None], views),
        blocks.to_blocks(blocks.to_lanes(*lanes)[None], views),
        kernel,
      )
    )
  return found


def _to_regions(size: _Size, x: jax.Array) -> jax.Array:
  return blocks.from_blocks(x, size.shape.tokens, size.num_views)


def _compare(
  functions: Functions,
  sizes: list[_Size],
  images: list | None,
  kernel: blocks.Kernel,
  values: jax.Array | None,
  bag: tiles.Bag | None,
) -> tuple[tuple, tuple, tuple]:
  """Sums, moments and expected of each size; () of what is not wanted."""
  sums, moments, expected = [], [], []
  if bag is None and values is None:
    return (), (), ()
  for index, size in enumerate(sizes):
    of_bags, of_rows, means = functions.compare(
      size.shape,
      size.rows,
      blocks.to_lanes(size.normalisers, size.weights),
      kernel,
      images and images[index],
      values,
      bag and bag.compare,
    )
    sums.append(tuple(x.reshape(-1)[: size.num_views] for x in of_bags))
    moments.append(tuple(_to_regions(size, x) for x in of_rows))
    expected.append(None if means is None else _to_regions(size, means))
  if bag is None:
    return (), (), tuple(expected)
  return tuple(sums), tuple(moments), tuple(expected)


def _forward(settings: Settings, inputs: tiles.Inputs):
  functions = functions_of(settings)
  alone = _images_alone(settings, inputs)
  attended, residuals = reference.forward(*alone)
  normalisers = residuals[0]
  of_student, of_teacher = _kernels(settings, inputs)
  student = _sizes(
    functions,
    inputs.student.regions,
    inputs.student_weights,
    of_student.regions,
  )
  teacher = _sizes(
    functions,
    inputs.teacher.features.regions,
    inputs.teacher_weights,
    of_teacher.regions,
  )

  def compare(sizes, rows, normalisers, kernel, values, bag):
    images = bag and _images(
      sizes, rows.image[0], normalisers.image[0], kernel.image
    )
    return _compare(functions, sizes, images, kernel.regions, values, bag)

  sums, moments, _ = compare(
    student,
    inputs.student,
    normalisers.student,
    of_student,
    None,
    settings.student_bag,
  )
  values = of_student.regions.columns.T
  teacher_sums, teacher_moments, expected = compare(
    teacher,
    inputs.teacher.features,
    normalisers.teacher,
    of_teacher,
    values,
    settings.teacher_bag,
  )
  regions = tuple(
    _to_regions(x, x.normalisers) * math.log(2.0) for x in student
  )
  result = Attended(
    attended.normalisers._replace(regions=regions),
    attended.expected._replace(regions=expected),
    attended.entropy,
    sums,
    teacher_sums,
  )
  kept = tuple([x.normalisers for x in sizes] for sizes in (student, teacher))
  return result, (residuals, kept, moments, teacher_moments)


def _pull_back_student(
  settings: Settings,
  inputs: tiles.Inputs,
  sizes: list[_Size],
  kernel: Levels,
  of_images: jax.Array,
  of_normalisers: tuple,
  cotangents: tuple,
) -> tuple[jax.Array, tuple]:
  """[d, K], and [N, G, d] of each size.

  Args:
    settings: of the call.
    inputs: of the call.
    sizes: of the student.
    kernel: the student's.
    of_images: the images' normalisers.
    of_normalisers: A_i - a_i sum_k P_ik g_k, [N, G] of each size.
    cotangents: of the bags' sums.
  """
  bag, tau = settings.student_bag, settings.temperature
  functions = functions_of(settings)
  images = bag and _images(
    sizes, inputs.student.image[0], of_images, kernel.image, cotangents
  )
  columns = jnp.zeros(kernel.regions.columns.shape, jnp.float32)
  of_rows = []
  for index, size in enumerate(sizes):
    a = blocks.to_blocks(of_normalisers[index], size.shape.views)
    lanes = (size.normalisers, size.weights, a / tau, size.weights / tau)
    found, columns = functions.pull_back(
      size.shape,
      size.rows,
      blocks.to_lanes(*lanes),
      kernel.regions,
      images and images[index],
      columns,
      bag and bag.compare,
    )
    of_rows.append(_to_regions(size, found).astype(size.rows.dtype))
  return columns, tuple(of_rows)


def _pull_back_regions(
  settings: Settings,
  inputs: tiles.Inputs,
  saved: tuple,
  of_normalisers: tuple,
  cotangents: Attended,
) -> tuple[jax.Array, tuple]:
  """[d, K] by student and expected, and [N, G, d] of each size."""
  residuals, (kept, kept_of_teacher), _, _ = saved
  functions = functions_of(settings)
  kernel, of_teacher = _kernels(settings, inputs)
  weights = inputs.student_weights or (None,) * len(kept)
  sizes = [
    _cut(functions, x, a, kernel.regions, normalisers)
    for x, a, normalisers in zip(
      inputs.student.regions, weights, kept, strict=True
    )
  ]
  columns, of_rows = _pull_back_student(
    settings,
    inputs,
    sizes,
    kernel,
    residuals[0].student.image[0],
    of_normalisers,
    cotangents.student_bag,
  )
  for x, normalisers, expected in zip(
    inputs.teacher.features.regions,
    kept_of_teacher,
    cotangents.expected.regions,
    strict=True,
  ):
    size = _cut(functions, x, None, of_teacher.regions, normalisers)
    columns = functions.pull_back_expected(
      size.shape,
      size.rows,
      blocks.to_blocks(expected, size.shape.views),
      blocks.to_lanes(size.normalisers),
      of_teacher.regions,
      columns,
    )
  return columns, of_rows


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(settings: Settings, inputs: tiles.Inputs) -> Attended:
  """See `prototype_attention.attend`; for inputs that `serves` says yes to."""
  return _forward(settings, inputs)[0]


def _attend_fwd(settings: Settings, inputs: tiles.Inputs):
  attended, saved = _forward(settings, inputs)
  return attended, (inputs, saved)


def _attend_bwd(settings: Settings, saved: tuple, cotangents: Attended):
  inputs, saved = saved
  residuals, _, student_moments, teacher_moments = saved
  of_weights, of_normalisers, of_teacher_weights = reference.of_bags(
    settings, inputs, cotangents, student_moments, teacher_moments
  )
  of_images, of_image_rows = reference.backward(
    *_images_alone(settings, inputs),
    residuals,
    of_normalisers._replace(regions=()),
    cotangents._replace(
      expected=cotangents.expected._replace(regions=()),
      student_bag=(),
      teacher_bag=(),
    ),
  )
  columns, of_rows = _pull_back_regions(
    settings, inputs, saved, of_normalisers.regions, cotangents
  )
  like, pull_back = jax.vjp(lambda x: x.kernel(), inputs.prototypes.regions)
  (of_regions,) = pull_back(columns.astype(like.dtype))
  if inputs.so_far is not None:
    of_regions = jax.tree.map(jnp.add, of_regions, inputs.so_far.regions)
  return reference.gradients_of_inputs(
    settings,
    inputs,
    of_images._replace(regions=of_regions),
    of_image_rows._replace(regions=of_rows),
    of_weights,
    of_teacher_weights,
  )


attend.defvjp(_attend_fwd, _attend_bwd)
