"""The names of an encoder without what programs wrap it in."""

from __future__ import annotations

import collections
import os
from collections.abc import Mapping
from typing import Any, TypeVar

from cmd_jax.convert.network_words import is_container, roots_of

_MAX_WRAPPERS = 8
# What programs put between the parts of a network.
_BETWEEN = set(
  'module _orig_mod _checkpoint_wrapped_module _fsdp_wrapped_module '
  '_forward_module _fpw_module'.split()
)
# The first layers of encoders. Where they are outside of 'encoder.', that is
# a part of the encoder, as in the library transformers.
_STEMS = (
  *('patch_embed.', 'conv1.', 'conv_proj.', 'embeddings.', 'embedder.'),
  '_conv_stem.',
)

_T = TypeVar('_T')


def strip_prefixes(tensors: Mapping[str, _T]) -> dict[str, _T]:
  """Takes off what programs wrap an encoder in.

  Whatever comes before the first layer of the only encoder is taken off. Of
  others, a prefix of the words of wrappers comes off if at least half of the
  names have it; then the next. The other names, such as those of heads, stay,
  and so does a name that would become that of another tensor. 'encoder.' comes
  off only if the first layer of an encoder is below it.

  Args:
    tensors: anything by name.

  Returns:
    The same in the same order under shorter names.
  """
  tensors = _without_between(tensors)
  roots = roots_of(tensors)
  if len(roots) == 1 and '' not in roots:
    tensors = _without_root(tensors, *roots)
  for _ in range(_MAX_WRAPPERS):
    prefix = _find_wrapper(tensors)
    if prefix is None:
      break
    taken = {*tensors, ''}
    tensors = {
      name if (short := name.removeprefix(prefix)) in taken else short: tensor
      for name, tensor in tensors.items()
    }
  return tensors


def _without_between(tensors: Mapping[str, _T]) -> dict[str, _T]:
  """Takes wrappers of parts, as of compiled blocks, out of the names."""
  renamed = {}
  for name, tensor in tensors.items():
    first, *rest = name.split('.')
    short = '.'.join([first, *(x for x in rest if x not in _BETWEEN)])
    if short != name and (short in tensors or short in renamed):
      short = name
    renamed[short] = tensor
  return renamed


def _without_root(tensors: Mapping[str, _T], root: str) -> dict[str, _T]:
  inside = {n.removeprefix(root) for n in tensors if n.startswith(root)}
  renamed = {}
  for full, tensor in tensors.items():
    name = full
    if name.startswith(root):
      name = name.removeprefix(root)
    else:
      # A head has the outer wrappers too.
      segments = name.split('.')
      shared = os.path.commonprefix([segments[:-1], root.split('.')])
      name = '.'.join(segments[len(shared) :])
    if name in renamed or (name in inside and not full.startswith(root)):
      # Of another network, as of a text encoder: never mixed into this one.
      name = f'(outside of {root}) {full}'
    renamed[name] = tensor
  return renamed


def _find_wrapper(tensors: Mapping[str, Any]) -> str | None:
  firsts = collections.Counter(
    name.partition('.')[0] for name in tensors if '.' in name
  )
  for first, count in firsts.items():
    if 2 * count < len(tensors) or not is_container(first):
      continue
    prefix = f'{first}.'
    below = [
      name.removeprefix(prefix) for name in tensors if name.startswith(prefix)
    ]
    if {*tensors, ''} >= set(below):
      continue
    if prefix != 'encoder.' or any(name.startswith(_STEMS) for name in below):
      return prefix
  return None
