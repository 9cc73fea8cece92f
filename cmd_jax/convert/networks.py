"""Which of the networks in a file is meant.

Programs keep an encoder under many names, and often twice: as it is trained,
and as a running average of that. What is an encoder shows in the names of its
first layer, whatever comes before them; which of two is the average shows in
the words before them. Where it does not show, nothing is chosen.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from cmd_jax.convert import network_words as words
from cmd_jax.convert.torch_globals import (
  INERT,
  NAMELESS,
  Tensor,
  UnreadableError,
)
from cmd_jax.files.safe_read import one_line

NETWORKS = ('student', 'teacher')
_MAX_NESTING = 5
# Of wrappers around a name.
_MAX_WRAPPERS = 8
# More encoders than any file has.
_MAX_ROOTS = 32

# An optimiser keeps numbers by the names of the weights, but no weights.
_NO_NETWORK = re.compile(r'optim|buffer|exp_avg|grad|adam|velocity|scal[ae]r')
# What is beside the weights of an average.
_BOOKKEEPING = set(
  'decay num_updates n_averaged initted step steps updates count'.split()
)

_T = TypeVar('_T')


# Nested dicts.


def find_state_dict(root: Any, network: str) -> dict[str, Tensor]:
  """The tensors of the state dict in nested dicts.

  Args:
    root: what torch.save wrote.
    network: 'student' or 'teacher', which to take where there are both.

  Returns:
    The tensors by name; none where no state dict was found.

  Raises:
    UnreadableError: several state dicts of which none is surely the one.
  """
  search = _Search()
  for _ in range(_MAX_NESTING):
    if not isinstance(root, dict):
      break
    own = {k: root[k] for k in _tensor_names(root)}
    found = {
      name: value
      for name, value in root.items()
      if value is not root and search.holds_network(name, value, _MAX_NESTING)
    }
    _check_readable(root, found or own, network)
    if not found:
      return own
    words.check_domains(found, 'state dicts')
    if _is_network(own, found):
      found[''] = own
    network_here = _swapped(root, found, network)
    root = found[_choose(found, network_here, search)]
  return {}


def _is_network(own: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
  """Whether the tensors beside state dicts are a network themselves."""
  return bool(words.roots_of(own)) or any(
    not own.keys().isdisjoint(x) for x in found.values()
  )


def _swapped(
  root: Mapping[str, Any], found: Collection[str], network: str
) -> str:
  """The network, or the other one where a program saved them in turn.

  mmengine's EMAHook puts the average where the model would be and the model
  under the name of the average. Source: EMAHook._swap_ema_state_dict.
  """
  meta = root.get('meta')
  by_mmengine = 'message_hub' in root or (
    isinstance(meta, dict) and 'mmengine_version' in meta
  )
  if by_mmengine and {'state_dict', 'ema_state_dict'} <= set(found):
    return NETWORKS[1 - NETWORKS.index(network)]
  return network


def _tensor_names(node: Mapping[str, Any]) -> list[str]:
  """The names of tensors, without those that stand for other keys."""
  return [
    name
    for name, value in node.items()
    if isinstance(value, Tensor) and not name.startswith(NAMELESS)
  ]


class _Search:
  """What is in nested dicts, each of which is looked at once."""

  def __init__(self):
    self._known: dict[tuple, bool] = {}

  def holds_network(self, name: str, node: Any, depth: int) -> bool:
    """Whether a dict under a name has the weights of a network in it."""
    if not isinstance(node, dict) or not depth or _NO_NETWORK.search(name):
      return False
    key = id(node), depth, words.is_container(name)
    if key not in self._known:
      self._known[key] = False
      self._known[key] = self._look(node, depth, whole=not key[2])
    return self._known[key]

  def holds_encoder(self, node: Any) -> bool:
    """Whether a dict has the first layer of an encoder in it."""
    return self.holds_network('?', node, _MAX_NESTING)

  def _look(self, node: dict, depth: int, whole: bool) -> bool:
    tensors = _tensor_names(node)
    if words.roots_of(tensors):
      return True
    if not whole and not _BOOKKEEPING.issuperset(tensors):
      return True
    return any(
      self.holds_network('?' if whole else k, v, depth - 1)
      for k, v in node.items()
      if not _NO_NETWORK.search(k)
    )


def _check_readable(
  root: Mapping[str, Any], found: Mapping[str, Any], network: str
) -> None:
  """Refuses a file whose network that is meant is there, but unreadable."""
  average = network == 'teacher'
  if not found or any(words.is_average(x) == average for x in found):
    return
  for name, value in root.items():
    if words.is_average(name) != average or not words.is_container(name):
      continue
    inside = value if isinstance(value, dict) else {'': value}
    nameless = any(
      isinstance(x, Tensor) and k.startswith(NAMELESS)
      for k, x in inside.items()
    )
    if nameless or any(
      x is INERT or _is_list_of_tensors(x) for x in inside.values()
    ):
      other = NETWORKS[average ^ 1]
      raise UnreadableError(
        f'has the {network} {one_line(name)!r} as an object or tensors without '
        f'names, which cannot be read: choose --config.init.network={other}, '
        'or save its state_dict() alone'
      )


def _is_list_of_tensors(value: Any) -> bool:
  return isinstance(value, list | tuple) and any(
    isinstance(x, Tensor) for x in value
  )


def _choose(found: Mapping[str, Any], network: str, search: _Search) -> str:
  labels = words.of_role(found, network)
  if len({id(found[label]) for label in labels}) == 1:
    return labels[0]
  # Beside an encoder there may be other networks, such as a projector.
  whole = [x for x in labels if search.holds_encoder(found[x])]
  if len(whole) != 1:
    shown = [label or 'tensors beside them' for label in labels]
    raise words.several_networks(shown, 'state dicts')
  return whole[0]


# Flat names.


def take_network(leaves: Mapping[str, _T], network: str) -> dict[str, _T]:
  """One network of flat names such as 'student.…' and 'teacher.…'.

  Args:
    leaves: anything by name; equal ones are the same tensor.
    network: 'student' or 'teacher', which to take where there are both.

  Returns:
    Those of the network that is meant, under their names, or all of a file
    that has one network.

  Raises:
    UnreadableError: several networks of which none is surely the one.
  """
  leaves = dict(leaves)
  roots = words.roots_of(leaves)
  if len(roots) > _MAX_ROOTS:
    raise words.several_networks(roots, 'networks')
  words.check_domains(roots, 'networks')
  prefixes = {name: _prefix_of(name, roots) for name in leaves}
  averages = {
    name
    for name, prefix in prefixes.items()
    if words.is_average(prefix) and name.rpartition('.')[2] not in _BOOKKEEPING
  }
  trained = {name for name in leaves if not words.is_average(prefixes[name])}
  if not averages or not trained:
    _check_underscores(leaves)
  elif network == 'student' and not _is_all(averages, trained):
    leaves = {name: x for name, x in leaves.items() if name in trained}
  else:
    names = _with_dots(averages, trained, prefixes)
    leaves = {names.get(n, n): x for n, x in leaves.items() if n in averages}
    if words.roots_of(trained) and not words.roots_of(leaves):
      raise UnreadableError(
        f'has an average ({words.listed(averages)}) that is no whole encoder: '
        'choose --config.init.network=student'
      )
  return _one_root(leaves, network)


def _is_all(averages: Collection[str], trained: Collection[str]) -> bool:
  """Whether what is beside an average is no network, such as a counter."""
  few = 2 * len(trained) < len(averages)
  return few and bool(words.roots_of(averages)) and not words.roots_of(trained)


def _prefix_of(name: str, roots: Collection[str]) -> str:
  """What comes before a name of a network: its root, or words of containers."""
  above = [root for root in roots if root and name.startswith(root)]
  if above:
    return max(above, key=len)
  segments = name.split('.')
  count = 0
  while count < len(segments) - 1 and words.is_container(segments[count]):
    count += 1
  return ''.join(f'{segment}.' for segment in segments[:count])


def _with_dots(
  averages: Collection[str],
  trained: Collection[str],
  prefixes: Mapping[str, str],
) -> dict[str, str]:
  """New names of averages whose buffers were named without the dots."""
  whole = {}
  for name in trained:
    segments = name.split('.')
    for start in range(min(prefixes[name].count('.'), _MAX_WRAPPERS) + 1):
      rest = '.'.join(segments[start:])
      whole.setdefault(rest.replace('.', ''), rest)
  names = {}
  for name in averages:
    prefix = prefixes[name]
    rest = name.removeprefix(prefix)
    if '.' not in rest and rest in whole:
      names[name] = prefix + whole[rest]
  return names


def _check_underscores(leaves: Collection[str]) -> None:
  """Refuses the buffers of a hook that leaves unclear which is the average.

  mmcv's EMAHook names them ema_backbone_... and exchanges both networks
  before some of the files that it writes.
  """
  flat = {name.replace('.', '_') for name in leaves if '.' in name}
  for name in leaves:
    if name.startswith('ema_') and name[4:] in flat:
      raise words.several_networks([name, 'the same without ema_'], 'networks')


def _one_root(leaves: dict[str, _T], network: str) -> dict[str, _T]:
  """The leaves without second names of the same encoder."""
  roots = words.roots_of(leaves)
  if len(roots) < 2:
    return leaves
  told = [root for root in roots if words.is_trained(root)]
  if network == 'teacher':
    # None of these is known to be the average.
    told = []
  kept = told[0] if len(told) == 1 else next(iter(roots))
  others = [root for root in roots if root != kept]
  first = leaves[roots[kept]]
  if len(told) != 1 and any(leaves[roots[x]] != first for x in others):
    raise words.several_networks(
      [x or 'names without a prefix' for x in roots], 'networks'
    )
  return {n: x for n, x in leaves.items() if _prefix_of(n, roots) not in others}
