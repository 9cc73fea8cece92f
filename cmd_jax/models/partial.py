"""Training a part of an encoder: its last blocks, or low-rank adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from cmd_jax.errors import UserError
from cmd_jax.models.layers import torch_default_init

# Modules whose linear layers get adapters.
_ADAPTED = ('attn', 'mlp')

IsFrozen = Callable[[tuple[str, ...]], bool]


def make_is_frozen(
  encoder: nn.Module, *, train_last_blocks: int, lora_rank: int
) -> IsFrozen:
  """Tells which parameters of a network training leaves as they are.

  Args:
    encoder: the encoder.
    train_last_blocks: number of blocks, counted from the end, that are trained
      together with what comes after the first of them; 0 freezes the encoder,
      -1 trains all of it.
    lora_rank: rank of the adapters; with any, the encoder itself is frozen.

  Returns:
    path of a parameter, such as ('encoder', 'norm', 'scale') -> bool. Heads and
    adapters are never frozen.

  Raises:
    UserError: a number out of range, both at once, or adapters for an encoder
      without attention.
  """
  num_blocks = len(encoder.block_names)
  if not -1 <= train_last_blocks <= num_blocks:
    raise UserError(
      f'config.optim.train_last_blocks is {train_last_blocks}: choose 0 to '
      f'{num_blocks}, the blocks of the encoder, or -1 for all of it'
    )
  if lora_rank < 0:
    raise UserError(
      f'config.lora.rank is {lora_rank}: it must be at least 0 (no adapters)'
    )
  if lora_rank and train_last_blocks != -1:
    raise UserError(
      f'config.lora.rank is {lora_rank} and config.optim.train_last_blocks is '
      f'{train_last_blocks}: set one of them, the other to 0 and -1'
    )
  if train_last_blocks == -1 and not lora_rank:
    return lambda path: False
  trained = ()
  if train_last_blocks > 0:
    names = encoder.layer_names
    trained = names[names.index(encoder.block_names[-train_last_blocks]) :]
  return lambda path: path[0] == 'encoder' and path[1] not in trained


def moves_tokens(encoder: nn.Module, is_frozen: IsFrozen) -> bool:
  """Whether anything that is trained of an encoder changes its tokens.

  The tokens of an EfficientNet may be of a map before its last blocks, so that
  no objective of tokens reaches these.

  Args:
    encoder: the encoder.
    is_frozen: of `make_is_frozen`.
  """
  names = getattr(encoder, 'token_layer_names', encoder.layer_names)
  return not all(is_frozen(('encoder', name)) for name in names)


def make_layer_scale(
  encoder: nn.Module, *, encoder_scale: float, layer_decay: float
) -> Callable[[tuple[str, ...]], float]:
  """Learning rates of an encoder's layers as fractions of the heads'.

  The n-th of d blocks, from 1, has encoder_scale layer_decay^(d + 1 - n), what
  is before them encoder_scale layer_decay^(d + 1), what is after them
  encoder_scale, and the heads 1 (BEiT, optim_factory.py
  `LayerDecayValueAssigner`, for encoder_scale = 1).

  Args:
    encoder: the encoder.
    encoder_scale: of the encoder's last layers.
    layer_decay: from one block to the one before it.

  Returns:
    path of a parameter, such as ('encoder', 'norm', 'scale') -> factor.
  """
  depth = len(encoder.block_names)
  of_layer = {name: 1.0 for name in encoder.layer_names}
  for index, name in enumerate(encoder.block_names):
    of_layer[name] = layer_decay ** (depth - index)
  before = layer_decay ** (depth + 1)

  def scale_of(path: tuple[str, ...]) -> float:
    if path[0] != 'encoder':
      return 1.0
    return encoder_scale * of_layer.get(path[1], before)

  return scale_of


def freeze(params: Mapping[str, Any], is_frozen: IsFrozen) -> dict[str, Any]:
  """The parameters, without gradient where they are frozen."""
  return unflatten_dict(
    {
      path: jax.lax.stop_gradient(leaf) if is_frozen(path) else leaf
      for path, leaf in flatten_dict(params).items()
    }
  )


def share_frozen(
  teacher: Mapping[str, Any], student: Mapping[str, Any], is_frozen: IsFrozen
) -> dict[str, Any]:
  """The teacher's variables, the student's where they never move.

  They are equal there; as the same arrays, what frozen layers compute of the
  views that both networks see is computed once.
  """
  of_student = flatten_dict(student)
  return unflatten_dict(
    {
      path: of_student[path] if is_frozen(path) else leaf
      for path, leaf in flatten_dict(teacher).items()
    }
  )


def keep_frozen(
  new: Mapping[str, Any], old: Mapping[str, Any], is_frozen: IsFrozen
) -> dict[str, Any]:
  """Running batch statistics, the old ones where the layer is frozen."""
  before = flatten_dict(old)
  return unflatten_dict(
    {
      path: before[path] if is_frozen(path) else leaf
      for path, leaf in flatten_dict(new).items()
    }
  )


def init_lora(
  rng: jax.Array, encoder_params: Mapping[str, Any], rank: int
) -> dict[str, Any]:
  """Adapters of the linear layers of attention and MLP (Hu et al. 2022).

  Args:
    rng: random key.
    encoder_params: parameters of the encoder.
    rank: r.

  Returns:
    The nested dict of the adapted layers with `a` [in, r], drawn uniformly,
    and `b` [r, out], zeros, so that nothing changes at first.

  Raises:
    UserError: no layer to adapt, or a rank above that of a layer.
  """
  kernels = {
    path[:-1]: leaf.shape
    for path, leaf in flatten_dict(encoder_params).items()
    if path[-1] == 'kernel' and set(path) & set(_ADAPTED)
  }
  if not kernels:
    raise UserError(
      f'config.lora.rank is {rank}, but the encoder has no attention to adapt: '
      'set it to 0, or use config.optim.train_last_blocks'
    )
  narrowest = min(min(shape) for shape in kernels.values())
  if rank > narrowest:
    raise UserError(
      f'config.lora.rank is {rank}, but the narrowest layer that it adapts is '
      f'{narrowest} wide: set it to {narrowest} or less, 8 say'
    )
  lora = {}
  for index, (path, (fan_in, fan_out)) in enumerate(sorted(kernels.items())):
    key = jax.random.fold_in(rng, index)
    lora[*path, 'a'] = torch_default_init(fan_in)(key, (fan_in, rank))
    lora[*path, 'b'] = jnp.zeros((rank, fan_out))
  return unflatten_dict(lora)


def merge_lora(
  encoder_params: Mapping[str, Any], lora: Mapping[str, Any], scale: float
) -> dict[str, Any]:
  """The encoder's parameters with W + scale * A B in place of W.

  Args:
    encoder_params: parameters of the encoder.
    lora: from `init_lora`.
    scale: alpha / r.
  """
  merged = flatten_dict(encoder_params)
  adapters = flatten_dict(lora)
  for path in {path[:-1] for path in adapters}:
    a, b = adapters[*path, 'a'], adapters[*path, 'b']
    kernel = (*path, 'kernel')
    merged[kernel] = merged[kernel] + scale * jnp.dot(a, b, precision='highest')
  return unflatten_dict(merged)
