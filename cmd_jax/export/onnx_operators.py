"""What our encoders compute, primitive by primitive, in ONNX's operators.

A converter takes the graph, an equation of the jaxpr and the values from which
that computes, and returns the names of the results.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from cmd_jax.export.onnx_graph import (
  Graph,
  UnsupportedError,
  Value,
  is_symbolic,
)

Converter = Callable[..., Value | list[str]]
CONVERTERS: dict[str, Converter] = {}

_ELEMENTWISE = {
  'add': 'Add',
  'sub': 'Sub',
  'mul': 'Mul',
  'div': 'Div',
  'max': 'Max',
  'min': 'Min',
  'neg': 'Neg',
  'exp': 'Exp',
  'erf': 'Erf',
  'tanh': 'Tanh',
  'logistic': 'Sigmoid',
}


def _elementwise(operator: str) -> Converter:
  return lambda graph, eqn, *values: graph.add(operator, *values)


CONVERTERS |= {
  primitive: _elementwise(operator)
  for primitive, operator in _ELEMENTWISE.items()
}


def _converter(*primitives: str) -> Callable[[Converter], Converter]:
  def register(function: Converter) -> Converter:
    CONVERTERS.update(dict.fromkeys(primitives, function))
    return function

  return register


def _refuse_unless(condition: bool, what: str) -> None:
  if not condition:
    raise UnsupportedError(what)


@_converter('square')
def _square(graph: Graph, eqn: Any, x: Value) -> str:
  return graph.add('Mul', x, x)


@_converter('integer_pow')
def _integer_pow(graph: Graph, eqn: Any, x: Value) -> str:
  exponent = eqn.params['y']
  _refuse_unless(0 < exponent < 9, f'integer_pow of {exponent}')
  power = x
  for _ in range(exponent - 1):
    power = graph.add('Mul', power, x)
  return power


@_converter('rsqrt')
def _rsqrt(graph: Graph, eqn: Any, x: Value) -> str:
  return graph.add('Reciprocal', graph.add('Sqrt', x))


@_converter('stop_gradient')
def _identity(graph: Graph, eqn: Any, x: Value) -> Value:
  return x


@_converter('reduce_sum')
def _reduce_sum(graph: Graph, eqn: Any, x: Value) -> str:
  axes = np.array(eqn.params['axes'], np.int64)
  return graph.add('ReduceSum', x, axes, keepdims=0)


@_converter('reduce_max')
def _reduce_max(graph: Graph, eqn: Any, x: Value) -> str:
  axes = np.array(eqn.params['axes'], np.int64)
  return graph.add('ReduceMax', x, axes, keepdims=0)


@_converter('reshape', 'squeeze')
def _reshape(graph: Graph, eqn: Any, x: Value) -> Value:
  return graph.reshape(x, eqn.outvars[0].aval.shape)


@_converter('transpose')
def _transpose(graph: Graph, eqn: Any, x: Value) -> Value:
  return graph.transpose(x, eqn.params['permutation'])


@_converter('broadcast_in_dim')
def _broadcast_in_dim(graph: Graph, eqn: Any, x: Value) -> Value:
  shape = eqn.params['shape']
  axes = list(map(int, eqn.params['broadcast_dimensions']))
  aligned = [1] * len(shape)
  for axis, dim in zip(axes, eqn.invars[0].aval.shape):
    aligned[axis] = dim
  if len(aligned) > len(axes):
    x = graph.reshape(x, aligned)
  if aligned == list(shape):
    return x
  # ONNX's Expand leaves an axis as it is where the shape has a 1.
  wanted = [
    1 if new == old else new for old, new in zip(aligned, shape, strict=True)
  ]
  parts = [
    graph.batch_size() if is_symbolic(d) else np.array([d], np.int64)
    for d in wanted
  ]
  if any(map(is_symbolic, wanted)):
    return graph.add('Expand', x, graph.add('Concat', *parts, axis=0))
  return graph.add('Expand', x, np.array(wanted, np.int64))


@_converter('concatenate')
def _concatenate(graph: Graph, eqn: Any, *values: Value) -> str:
  return graph.add('Concat', *values, axis=int(eqn.params['dimension']))


@_converter('split')
def _split(graph: Graph, eqn: Any, x: Value) -> list[str]:
  sizes = np.array(eqn.params['sizes'], np.int64)
  axis = int(eqn.params['axis'])
  return graph.add_many('Split', len(sizes), x, sizes, axis=axis)


@_converter('slice')
def _slice(graph: Graph, eqn: Any, x: Value) -> Value:
  params = eqn.params
  dims = eqn.invars[0].aval.shape
  steps = params['strides'] or (1,) * len(dims)
  cuts = [
    (axis, start, limit, step)
    for axis, (dim, start, limit, step) in enumerate(
      zip(dims, params['start_indices'], params['limit_indices'], steps)
    )
    if (start, limit, step) != (0, dim, 1)
  ]
  _refuse_unless(
    not any(is_symbolic(limit) for _, _, limit, _ in cuts),
    'slice of the batch',
  )
  axes, starts, ends, strides = np.array(cuts, np.int64).reshape(-1, 4).T
  return graph.add('Slice', x, starts, ends, axes, strides)


@_converter('pad')
def _pad(graph: Graph, eqn: Any, x: Value, fill: Value) -> str:
  low, high, interior = zip(*eqn.params['padding_config'])
  _refuse_unless(
    min(*low, *high) >= 0 and not any(interior), 'pad within or below zero'
  )
  return graph.add('Pad', x, np.array([*low, *high], np.int64), fill)


@_converter('select_n')
def _select_n(graph: Graph, eqn: Any, which: Value, *cases: Value) -> str:
  _refuse_unless(
    len(cases) == 2 and eqn.invars[0].aval.dtype == bool,
    'select_n among more than two',
  )
  return graph.add('Where', which, cases[1], cases[0])


@_converter('convert_element_type')
def _convert_element_type(graph: Graph, eqn: Any, x: Value) -> str:
  dtype = onnx.helper.np_dtype_to_tensor_dtype(eqn.outvars[0].aval.dtype)
  return graph.add('Cast', x, to=dtype)


@_converter('dot_general')
def _dot_general(graph: Graph, eqn: Any, left: Value, right: Value) -> str:
  (left_sum, right_sum), batch = eqn.params['dimension_numbers']
  left_batch, right_batch = map(list, batch)
  left_rank, right_rank = (len(x.aval.shape) for x in eqn.invars)

  def others(rank, *axes):
    return [
      a for a in range(rank) if a not in [int(x) for y in axes for x in y]
    ]

  left_free = others(left_rank, left_sum, left_batch)
  right_free = others(right_rank, right_sum, right_batch)
  free_of_right_alone = len(right_sum) == len(right_free) == 1
  if free_of_right_alone and (len(left_free) == 1 or not left_batch):
    return graph.add(
      'MatMul',
      graph.transpose(left, [*left_batch, *left_free, *left_sum]),
      graph.transpose(right, [*right_batch, *right_sum, *right_free]),
    )
  letters = iter(string.ascii_lowercase)
  left_names = [next(letters) for _ in range(left_rank)]
  right_names = [next(letters) for _ in range(right_rank)]
  for left_axes, right_axes in (left_sum, right_sum), (left_batch, right_batch):
    for left_axis, right_axis in zip(left_axes, right_axes, strict=True):
      right_names[right_axis] = left_names[left_axis]
  result = [left_names[axis] for axis in [*left_batch, *left_free]]
  result += [right_names[axis] for axis in right_free]
  terms = map(''.join, (left_names, right_names, result))
  return graph.add('Einsum', left, right, equation='{},{}->{}'.format(*terms))


@_converter('conv_general_dilated')
def _conv(graph: Graph, eqn: Any, x: Value, kernel: Value) -> Value:
  params = eqn.params
  _refuse_unless(
    set(params['lhs_dilation']) == {1} and params['batch_group_count'] == 1,
    'conv_general_dilated that is transposed or groups the batch',
  )
  layout = params['dimension_numbers']
  low, high = zip(*params['padding'])
  y = graph.add(
    'Conv',
    graph.transpose(x, layout.lhs_spec),
    graph.transpose(kernel, layout.rhs_spec),
    strides=params['window_strides'],
    pads=[*low, *high],
    dilations=params['rhs_dilation'],
    group=params['feature_group_count'],
  )
  return graph.transpose(y, np.argsort(layout.out_spec))


@_converter('reduce_window_max')
def _max_pool(graph: Graph, eqn: Any, x: Value) -> Value:
  params = eqn.params
  window = params['window_dimensions']
  axes = [axis for axis, side in enumerate(window) if side > 1]
  rest = [axis for axis, side in enumerate(window) if side == 1]
  untouched = [
    (params['window_strides'][a], tuple(params['padding'][a])) for a in rest
  ]
  _refuse_unless(
    set(params['base_dilation']) == {1}
    and set(untouched) == {(1, (0, 0))}
    and len(axes) == 2,
    'reduce_window_max of other than images',
  )

  def of_axes(name):
    return [params[name][axis] for axis in axes]

  shape = eqn.invars[0].aval.shape
  y = graph.transpose(x, [*rest, *axes])
  # ONNX pools images alone: the batch and the channels, whatever else is there.
  y = graph.reshape(
    y,
    [
      shape[0],
      int(np.prod([shape[a] for a in rest[1:]])),
      *(shape[a] for a in axes),
    ],
  )
  low, high = zip(*of_axes('padding'))
  y = graph.add(
    'MaxPool',
    y,
    kernel_shape=of_axes('window_dimensions'),
    strides=of_axes('window_strides'),
    pads=[*low, *high],
    dilations=of_axes('window_dilation'),
  )
  result = eqn.outvars[0].aval.shape
  y = graph.reshape(y, [result[axis] for axis in [*rest, *axes]])
  return graph.transpose(y, np.argsort([*rest, *axes]))
