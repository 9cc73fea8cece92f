"""An ONNX graph in the making, by the onnx package's helpers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from jax import export

# Of ONNX 1.13: from here on all reductions take their axes as an input.
OPSET = 18
_SMALL_BYTES = 64

# What an equation of a jaxpr computes from: a constant, or the name of a
# tensor.
Value = np.ndarray | str


class UnsupportedError(Exception):
  """An operation that has no counterpart here; the message names it."""


def is_symbolic(dim: Any) -> bool:
  """Whether a dimension is the batch's, which is not known yet."""
  return export.is_symbolic_dim(dim)


def merged_shape(shape: Sequence[Any]) -> np.ndarray:
  """A shape for ONNX's Reshape, where -1 is the one symbolic dimension."""
  if sum(map(is_symbolic, shape)) > 1:
    raise UnsupportedError('a shape with two unknown dimensions')
  return np.array([-1 if is_symbolic(d) else d for d in shape], np.int64)


def _identity(array: np.ndarray) -> Any:
  """Tells constants apart: small ones by what they hold."""
  if array.nbytes > _SMALL_BYTES:
    return id(array)
  return array.dtype.str, array.shape, array.tobytes()


class Graph:
  """Nodes and constants of a graph with one input.

  Attributes:
    nodes: in the order of computation.
    initializers: the constants.
  """

  def __init__(self, input_name: str):
    """Begins with nothing but the input, whose first axis is the batch."""
    self.nodes: list[onnx.NodeProto] = []
    self.initializers: list[onnx.TensorProto] = []
    self._input = input_name
    self._batch: str | None = None
    self._names: dict[Any, tuple[np.ndarray, str]] = {}
    self._used: set[str] = set()

  def name_constant(self, array: np.ndarray, name: str) -> None:
    """Adds a constant under a name of its own if it is ever used."""
    self._names[_identity(array)] = array, name

  def constant(self, array: np.ndarray) -> str:
    """The name of a constant, which is added if it is new."""
    # Kept alive, so that no other array gets its identity.
    known = self._names.setdefault(
      _identity(array), (array, f'constant_{len(self._names)}')
    )
    name = known[1]
    if name not in self._used:
      self._used.add(name)
      self.initializers.append(
        onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
      )
    return name

  def add(self, operator: str, *inputs: Value, **attributes: Any) -> str:
    """Adds a node and returns the name of what it computes."""
    (name,) = self.add_many(operator, 1, *inputs, **attributes)
    return name

  def add_many(
    self, operator: str, num_outputs: int, *inputs: Value, **attributes: Any
  ) -> list[str]:
    """As `add`, for a node with several outputs."""
    number = len(self.nodes)
    names = [
      f'{operator.lower()}_{number}' + (f'_{i}' if i else '')
      for i in range(num_outputs)
    ]
    tensors = [x if isinstance(x, str) else self.constant(x) for x in inputs]
    node = onnx.helper.make_node(
      operator, tensors, names, name=names[0], **attributes
    )
    self.nodes.append(node)
    return names

  def batch_size(self) -> str:
    """A tensor [1] that holds the length of the batch."""
    if self._batch is None:
      self._batch = self.add('Shape', self._input, start=0, end=1)
    return self._batch

  def transpose(self, x: Value, order: Sequence[int]) -> Value:
    """Permutes the axes; constants at once."""
    order = list(map(int, order))
    if order == sorted(order):
      return x
    if isinstance(x, np.ndarray):
      return x.transpose(order)
    return self.add('Transpose', x, perm=order)

  def reshape(self, x: Value, shape: Sequence[Any]) -> Value:
    """Reshapes to a shape with at most one symbolic dimension."""
    return self.add('Reshape', x, merged_shape(shape))
