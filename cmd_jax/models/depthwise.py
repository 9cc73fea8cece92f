"""Depthwise convolution: a small kernel of its own for each channel.

XLA's CPU backend runs a convolution with a group for each channel many times as
slowly as the same multiplications and additions of shifted maps
(benchmarks/README.md); other platforms have kernels for it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from cmd_jax.models.layers import wide

Padding = tuple[tuple[int, int], tuple[int, int]]


def same_padding(
  sides: tuple[int, ...], kernel_px: int, stride: int
) -> Padding:
  """TensorFlow's 'SAME': what is odd goes below and to the right.

  Args:
    sides: H and W of the map.
    kernel_px: side of the kernel.
    stride: step.

  Returns:
    Rows above and below, columns left and right.
  """
  totals = (
    max((-(-side // stride) - 1) * stride + kernel_px - side, 0)
    for side in sides
  )
  rows, columns = ((total // 2, total - total // 2) for total in totals)
  return rows, columns


def grouped_convolution(
  x: jax.Array, kernel: jax.Array, stride: int
) -> jax.Array:
  """XLA's convolution with a group for each channel; shapes as `depthwise`."""
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    same_padding(x.shape[1:3], len(kernel), stride),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=x.shape[-1],
  )


def _padded(x: jax.Array, padding: Padding) -> jax.Array:
  return jnp.pad(x, ((0, 0), *padding, (0, 0)))


def _taps(kernel: jax.Array) -> Iterator[tuple[int, int, jax.Array]]:
  """Row, column and [C] weights of every place of the kernel."""
  for row in range(kernel.shape[0]):
    for column in range(kernel.shape[1]):
      yield row, column, kernel[row, column, 0]


def _steps(start: int, count: int, stride: int) -> slice:
  return slice(start, start + (count - 1) * stride + 1, stride)


def _shifted_sum(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """k * k shifted copies of the map, each times its weights, added up."""
  dtype = wide(x.dtype)
  height, width = (-(-side // stride) for side in x.shape[1:3])
  padded = _padded(x, same_padding(x.shape[1:3], len(kernel), stride))
  padded, kernel = padded.astype(dtype), kernel.astype(dtype)
  total = 0
  for row, column, weights in _taps(kernel):
    rows, columns = _steps(row, height, stride), _steps(column, width, stride)
    total += padded[:, rows, columns] * weights
  return total.astype(x.dtype)


def _input_gradient(
  gradient: jax.Array, x: jax.Array, kernel: jax.Array, stride: int
) -> jax.Array:
  """The gradient of the map: the transposed sum, one phase at a time.

  Row stride * q + p of the padded map met the kernel's rows p, p + stride, ...
  alone. Zeros between the rows of the gradient would do for all phases at once,
  but at several times the cost.
  """
  dtype = wide(x.dtype)
  padding = same_padding(x.shape[1:3], len(kernel), stride)
  # So many rows of the kernel at most meet a row of the map.
  reach = -(-len(kernel) // stride)
  height, width = (side + reach - 1 for side in gradient.shape[1:3])
  margin = (reach - 1, reach - 1)
  gradient = _padded(gradient.astype(dtype), (margin, margin))
  phases = [[0] * stride for _ in range(stride)]
  for row, column, weights in _taps(kernel.astype(dtype)):
    rows = _steps(reach - 1 - row // stride, height, 1)
    columns = _steps(reach - 1 - column // stride, width, 1)
    phases[row % stride][column % stride] += (
      gradient[:, rows, columns] * weights
    )
  padded = jnp.stack([jnp.stack(phase, 3) for phase in phases], 2)
  padded = padded.reshape(len(x), height * stride, width * stride, x.shape[-1])
  # Where a last row of the map met no kernel, there is none here either.
  missing = [
    (0, max(0, before + side - there))
    for (before, _), side, there in zip(
      padding, x.shape[1:3], padded.shape[1:3], strict=True
    )
  ]
  rows, columns = (
    _steps(before, side, 1)
    for (before, _), side in zip(padding, x.shape[1:3], strict=True)
  )
  return _padded(padded, tuple(missing))[:, rows, columns].astype(x.dtype)


def _kernel_gradient(
  gradient: jax.Array, x: jax.Array, kernel: jax.Array, stride: int
) -> jax.Array:
  """The gradient of the kernel, row of the result by row.

  XLA's CPU backend sums over all axes but the last one number at a time;
  additions of whole rows are as fast as the sums of `_shifted_sum`.
  """
  dtype = wide(x.dtype)
  side = len(kernel)
  batch, height, width, channels = gradient.shape
  padded = _padded(x, same_padding(x.shape[1:3], side, stride))

  def add_row(index, totals):
    line = jax.lax.dynamic_index_in_dim(gradient, index, 1, keepdims=False)
    line = line.astype(dtype)
    lines = jax.lax.dynamic_slice_in_dim(padded, index * stride, side, 1)
    lines = lines.astype(dtype)
    return tuple(
      total + lines[:, row, _steps(column, width, stride)] * line
      for total, (row, column, _) in zip(totals, _taps(kernel), strict=True)
    )

  zeros = jnp.zeros((batch, width, channels), dtype)
  totals = jax.lax.fori_loop(0, height, add_row, (zeros,) * side**2)
  sums = jnp.stack([total.sum((0, 1)) for total in totals])
  return sums.reshape(kernel.shape).astype(kernel.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def shifted_products(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """The same as a sum of shifted maps times weights; shapes as `depthwise`.

  Its gradient is written out: JAX's own of this sum takes twice as long, see
  `_kernel_gradient`.
  """
  return _shifted_sum(x, kernel, stride)


def _forward(
  x: jax.Array, kernel: jax.Array, stride: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _shifted_sum(x, kernel, stride), (x, kernel)


def _backward(
  stride: int, kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
  return (
    _input_gradient(gradient, *kept, stride),
    _kernel_gradient(gradient, *kept, stride),
  )


shifted_products.defvjp(_forward, _backward)


def depthwise(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  """Each channel convolved with its own kernel, padded as TensorFlow's 'SAME'.

  Args:
    x: [B, h, w, C].
    kernel: [k, k, 1, C], k at least as large as the stride.
    stride: step.

  Returns:
    [B, ceil(h / stride), ceil(w / stride), C] in the dtype of `x`, summed in at
    least float32.
  """
  return jax.lax.platform_dependent(
    x,
    kernel,
    cpu=lambda x, kernel: shifted_products(x, kernel, stride),
    default=lambda x, kernel: grouped_convolution(x, kernel, stride),
  )
