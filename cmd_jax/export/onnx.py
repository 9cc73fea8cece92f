"""An encoder as ONNX, converted from its jaxpr."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from jax.extend import core

import cmd_jax
from cmd_jax.api import Encoder
from cmd_jax.errors import UserError
from cmd_jax.export.function import (
  ATTENTION,
  EMBEDDING,
  PROBABILITIES,
  make_function,
)
from cmd_jax.export.onnx_graph import (
  OPSET,
  Graph,
  UnsupportedError,
  Value,
  is_symbolic,
)
from cmd_jax.export.onnx_operators import CONVERTERS

Function = Callable[[Any, jax.Array], dict[str, jax.Array]]
INPUT = 'images'
# What Protocol Buffers can hold is 2 GiB.
_MAX_BYTES = 2**31 - 2**20
# Primitives that call a function once, and the parameter that is the function.
_CALLS = {
  'jit': 'jaxpr',
  'custom_jvp_call': 'call_jaxpr',
  'custom_vjp_call': 'call_jaxpr',
}
# Constants are computed here and now unless that makes them much larger.
_MAX_FOLDED = 2**16


class _Conversion:
  """Walks through a jaxpr and builds the graph."""

  def __init__(self, graph: Graph):
    self.graph = graph
    self.unsupported: set[str] = set()

  def run(self, closed: core.ClosedJaxpr, inputs: list[Value]) -> list[Value]:
    """The values of a jaxpr's results."""
    jaxpr = closed.jaxpr
    values: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
    for var, const in zip(jaxpr.constvars, closed.consts, strict=True):
      # NumPy's float64 is float32 to JAX.
      values[var] = np.asarray(const, var.aval.dtype)

    def read(atom: Any) -> Value:
      if isinstance(atom, core.Literal):
        return np.asarray(atom.val, atom.aval.dtype)
      return values[atom]

    for eqn in jaxpr.eqns:
      results = self._convert(eqn, [read(atom) for atom in eqn.invars])
      values |= zip(eqn.outvars, results, strict=True)
    return [read(atom) for atom in jaxpr.outvars]

  def _convert(self, eqn: Any, inputs: list[Value]) -> list[Value]:
    name = eqn.primitive.name
    if name in _CALLS:
      return self.run(eqn.params[_CALLS[name]], inputs)
    if name == 'platform_index':
      # None is every platform that has no version of its own.
      return [np.int32(eqn.params['platforms'].index(None))]
    if name == 'cond' and eqn.params.get('branches_platforms'):
      which, *inputs = inputs
      return self.run(eqn.params['branches'][int(which)], inputs)
    if _can_fold(eqn, inputs):
      results = eqn.primitive.bind(*inputs, **eqn.params)
      results = results if eqn.primitive.multiple_results else [results]
      return [np.asarray(result) for result in results]
    try:
      if name not in CONVERTERS:
        raise UnsupportedError(name)
      results = CONVERTERS[name](self.graph, eqn, *inputs)
    except UnsupportedError as error:
      # The walk goes on, to name all of them at once.
      self.unsupported.add(str(error))
      results = [f'unsupported_{name}'] * len(eqn.outvars)
    return results if isinstance(results, list) else [results]


def _can_fold(eqn: Any, inputs: list[Value]) -> bool:
  if any(isinstance(value, str) for value in inputs):
    return False
  shapes = [var.aval.shape for var in eqn.outvars]
  if any(is_symbolic(dim) for shape in shapes for dim in shape):
    return False
  largest = max((value.size for value in inputs), default=0)
  return max(map(np.prod, shapes)) <= max(largest, _MAX_FOLDED)


def _name_constants(graph: Graph, variables: Any) -> Any:
  """Gives the constants of the graph the names of the variables."""

  def name(path, array):
    array = np.asarray(array)
    keys = [str(getattr(key, 'key', key)) for key in path]
    graph.name_constant(array, '.'.join(keys))
    return array

  return jax.tree_util.tree_map_with_path(name, variables)


def function_to_onnx(
  function: Function,
  variables: Any,
  image_shape: tuple[int, ...],
  outputs: tuple[str, ...],
) -> onnx.ModelProto:
  """Converts a function of a batch to ONNX, weights and all.

  Args:
    function: of variables and of a float32 array [B, *image_shape], for any B,
      whose results are arrays [B, ...] by name.
    variables: a tree of arrays, which become constants of their names.
    image_shape: of one image.
    outputs: the names of the results in the order of the model's outputs.

  Returns:
    The model, checked; its input is `images`.

  Raises:
    UserError: it computes something that has no counterpart here, or is too
      large for ONNX.
  """
  (batch,) = jax.export.symbolic_shape('batch')
  images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
  closed, results = jax.make_jaxpr(function, return_shape=True)(
    variables, images
  )
  graph = Graph(INPUT)
  conversion = _Conversion(graph)
  constants = jax.tree.leaves(_name_constants(graph, variables))
  values = conversion.run(closed, [*constants, INPUT])
  if conversion.unsupported:
    raise UserError(
      'the network computes what cannot be written as ONNX '
      f'({", ".join(sorted(conversion.unsupported))}): use --format=stablehlo'
    )
  named = jax.tree.unflatten(jax.tree.structure(results), values)
  for name, value in named.items():
    graph.nodes.append(
      onnx.helper.make_node(
        'Identity',
        [value if isinstance(value, str) else graph.constant(value)],
        [name],
        name=name,
      )
    )
  return _to_model(graph, images, {name: results[name] for name in outputs})


def _to_model(
  graph: Graph, images: Any, results: dict[str, Any]
) -> onnx.ModelProto:
  size = sum(len(tensor.raw_data) for tensor in graph.initializers)
  if size > _MAX_BYTES:
    raise UserError(
      f'the weights are {size / 2**30:.1f} GiB, and a file of ONNX holds 2: '
      'use --format=stablehlo'
    )

  def describe(name, like):
    shape = ['batch' if is_symbolic(dim) else dim for dim in like.shape]
    dtype = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(like.dtype))
    return onnx.helper.make_tensor_value_info(name, dtype, shape)

  opsets = [onnx.helper.make_opsetid('', OPSET)]
  model = onnx.helper.make_model(
    onnx.helper.make_graph(
      graph.nodes,
      'encoder',
      [describe(INPUT, images)],
      [describe(name, like) for name, like in results.items()],
      graph.initializers,
    ),
    opset_imports=opsets,
    # The oldest that has these operators, for older runtimes.
    ir_version=onnx.helper.find_min_ir_version_for(opsets),
    producer_name='cmd_jax',
    producer_version=cmd_jax.__version__,
  )
  onnx.checker.check_model(model, full_check=True)
  return model


def to_onnx(
  encoder: Encoder, *, attention: bool = False, dtype: str = 'float32'
) -> onnx.ModelProto:
  """Converts an encoder, weights and all, for batches of any size.

  It takes views [B, 3, H, W] float32, normalised, and gives float32.

  Args:
    encoder: the encoder.
    attention: see `function.make_function`.
    dtype: of the computation, 'float32' or 'float16'; in the latter norms,
      softmaxes and sums stay float32, and the file has half the size.

  Raises:
    UserError: attention is wanted of a network that has none, weights that are
      too large for float16, or as `function_to_onnx`.
  """
  if dtype == 'float16':
    _check_float16(encoder)
  function, variables = make_function(
    encoder, attention=attention, dtype=jnp.dtype(dtype)
  )

  def encode(variables, images):
    return function(variables, images.transpose(0, 2, 3, 1))

  side = encoder.preprocessing['view_px']
  outputs = [EMBEDDING]
  if encoder.classifier is not None:
    outputs.append(PROBABILITIES)
  if attention:
    outputs.append(ATTENTION)
  shape = (encoder.preprocessing.get('channels', 3), side, side)
  return function_to_onnx(encode, variables, shape, tuple(outputs))


def _check_float16(encoder: Encoder) -> None:
  """Refuses weights that would become infinite."""
  largest = max(
    float(np.abs(x).max(initial=0.0))
    for x in jax.tree.leaves(jax.device_get(encoder.variables))
  )
  if largest > float(np.finfo(np.float16).max):
    raise UserError(
      f'{encoder.source} has weights of up to {largest:.3g}, and float16 ends '
      'at 65504: leave out --dtype'
    )


def describe_onnx(model: onnx.ModelProto) -> dict[str, Any]:
  """What goes in and comes out, for `preprocessing.describe`."""

  def tensor(value):
    of = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(of.elem_type)
    shape = [d.dim_param or d.dim_value for d in of.shape.dim]
    return {'name': value.name, 'shape': shape, 'dtype': dtype.name}

  inputs = [tensor(value) | {'layout': 'NCHW'} for value in model.graph.input]
  return {
    'inputs': inputs,
    'outputs': list(map(tensor, model.graph.output)),
    'opset': model.opset_import[0].version,
    'ir_version': model.ir_version,
  }
