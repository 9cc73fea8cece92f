"""How the parameters of a module correspond to a torch state dict.

Every architecture has a table of entries in the naming of timm, the common
ground of all importers: other namings are renamed to it first. A table is a
bijection, so that weights survive the way in and out bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np


class Layout(NamedTuple):
  """How an array of torch becomes ours, and back; no arithmetic."""

  from_torch: Callable[[np.ndarray], np.ndarray]
  to_torch: Callable[[np.ndarray], np.ndarray]


def _patches_to_torch(kernel: np.ndarray) -> np.ndarray:
  side = round((kernel.shape[0] / 3) ** 0.5)
  return kernel.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


AS_IS = Layout(lambda w: w, lambda w: w)
# Linear weights: (out, in) there, [in, out] here.
LINEAR = Layout(np.transpose, np.transpose)
# Convolutions: (out, in, kh, kw) there, [kh, kw, in, out] here.
CONV = Layout(
  lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1)
)
# A convolution of 1x1 is a linear layer here: (out, in, 1, 1), [in, out].
POINTWISE = Layout(
  lambda w: w[:, :, 0, 0].T, lambda w: w.T[:, :, np.newaxis, np.newaxis]
)
# A convolution of square patches of 3 channels is a linear layer here,
# [kh * kw * 3, out].
PATCHES = Layout(
  lambda w: w.transpose(2, 3, 1, 0).reshape(-1, w.shape[0]), _patches_to_torch
)


class Entry(NamedTuple):
  """One parameter or running statistic.

  Attributes:
    path: keys of the nested dict of variables, e.g. ('params', 'norm',
      'scale') or ('batch_stats', 'bn1', 'mean').
    name: its name in the state dict.
    layout: how the array changes.
  """

  path: tuple[str, ...]
  name: str
  layout: Layout = AS_IS


def linear(path: str, name: str, bias: bool = True) -> list[Entry]:
  """Entries of a linear layer; `path` is separated by slashes."""
  keys = ('params', *path.split('/'))
  entries = [Entry((*keys, 'kernel'), f'{name}.weight', LINEAR)]
  return entries + [Entry((*keys, 'bias'), f'{name}.bias')] * bias


def norm(path: str, name: str) -> list[Entry]:
  """Entries of a layer normalisation."""
  keys = ('params', *path.split('/'))
  return [
    Entry((*keys, 'scale'), f'{name}.weight'),
    Entry((*keys, 'bias'), f'{name}.bias'),
  ]


def batch_norm(path: str, name: str) -> list[Entry]:
  """Entries of a batch normalisation, running statistics included."""
  keys = ('batch_stats', *path.split('/'))
  return norm(path, name) + [
    Entry((*keys, 'mean'), f'{name}.running_mean'),
    Entry((*keys, 'var'), f'{name}.running_var'),
  ]


def get_path(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
  """The leaf of a nested dict."""
  for key in path:
    tree = tree[key]
  return tree


def from_torch(
  entries: Iterable[Entry], tensors: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """Variables out of a state dict.

  Args:
    entries: table of the module.
    tensors: state dict; names that no entry has are left alone.

  Returns:
    Nested dict of arrays, with the collections as its first keys.

  Raises:
    KeyError: a name is missing.
  """
  variables = {}
  for entry in entries:
    *keys, last = entry.path
    node = variables
    for key in keys:
      node = node.setdefault(key, {})
    node[last] = np.ascontiguousarray(
      entry.layout.from_torch(tensors[entry.name])
    )
  return variables


def to_torch(
  entries: Iterable[Entry], variables: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """A state dict out of variables; the inverse of `from_torch`."""
  return {
    entry.name: np.ascontiguousarray(
      entry.layout.to_torch(np.asarray(get_path(variables, entry.path)))
    )
    for entry in entries
  }
