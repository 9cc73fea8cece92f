"""ViTs as Google's own programs save them, .npz files of Flax parameters.

Source: vit_jax/models_vit.py of google-research/vision_transformer and
big_vision/models/vit.py of google-research/big_vision, whose blocks may be
stacked along a leading axis, and whose encoder may be one of two towers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TypeVar

import jax.numpy as jnp
import numpy as np

from cmd_jax.errors import UserError

FAMILY = 'ViT (Google)'
# The names by which the family is known.
NAMES = (
  'embedding.kernel',
  'Transformer.encoder_norm.scale',
  'Transformer.encoderblock*',
)
# What the encoders here are normalised by, and x / 0.5 - 1 of these programs.
_IMAGENET_MEAN = np.array((0.485, 0.456, 0.406))
_IMAGENET_STD = np.array((0.229, 0.224, 0.225))
_MEAN, _STD = 0.5, 0.5

_STACKED = 'Transformer.encoderblock.'
# As many as `architecture` allows an encoder; a stack of nothing may be longer.
_MAX_BLOCKS = 1000
# Positions without parameters are made for the grid of these images.
_USUAL_PX = 224
_PATCHES_PX = range(4, 65)
_MAX_WIDTH = 2**14

_RENAMED = (
  (r'^embedding\.', 'patch_embed.proj.'),
  (r'^cls$', 'cls_token'),
  (r'^(Transformer\.)?(posembed_input\.)?pos_embedding$', 'pos_embed'),
  (r'^Transformer\.encoder_norm\.', 'norm.'),
  (r'^Transformer\.encoderblock_(\d+)\.', r'blocks.\1.'),
  (r'\.MultiHeadDotProductAttention_[01]\.(query|key|value)\.', r'.attn.\1.'),
  (r'\.MultiHeadDotProductAttention_[01]\.out\.', '.attn.proj.'),
  (r'\.attn\.(q|k|v)[a-z]+\.', r'.attn.\1_proj.'),
  # The parts of a block are numbered together in the older program.
  (r'\.LayerNorm_0\.', '.norm1.'),
  (r'\.LayerNorm_[12]\.', '.norm2.'),
  (r'\.MlpBlock_[03]\.Dense_0\.', '.mlp.fc1.'),
  (r'\.MlpBlock_[03]\.Dense_1\.', '.mlp.fc2.'),
)
# Attention pooling, which early files have without a name of its own.
_POOLING = re.compile(
  r'(MAPHead_0\.)?'
  r'(probe|(MlpBlock|MultiHeadDotProductAttention|LayerNorm)_0\..*)'
)

_T = TypeVar('_T')


def parameters(leaves: Mapping[str, _T]) -> dict[str, _T]:
  """The parameters of a file that has the state of the optimiser too.

  Args:
    leaves: anything by name, such as 'params.embedding.kernel' and
      'opt.0.mu.embedding.kernel', or 'opt.target.embedding.kernel' as older
      files have it. Those of other programs are returned as they are.
  """
  for first in ('params.', 'opt.target.', 'optimizer.target.'):
    found = {
      name.removeprefix(first): leaf
      for name, leaf in leaves.items()
      if name.startswith(first)
    }
    if any(name.endswith(NAMES[0]) for name in found):
      return found
  return dict(leaves)


def _unstacked(
  tensors: Mapping[str, np.ndarray],
) -> Iterator[tuple[str, np.ndarray]]:
  """Every tensor of stacked blocks as one a block."""
  for name, tensor in tensors.items():
    if not name.startswith(_STACKED):
      yield name, tensor
      continue
    if len(tensor) > _MAX_BLOCKS:
      raise UserError(
        f'{len(tensor)} blocks are more than any encoder has: give another file'
      )
    rest = name.removeprefix(_STACKED)
    for index, part in enumerate(tensor):
      yield f'Transformer.encoderblock_{index}.{rest}', part


def _to_torch(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray]:
  """A renamed tensor in the layout of torch, and the name it has there."""
  if name.endswith('.scale'):
    return name.removesuffix('scale') + 'weight', tensor
  if re.search(r'\.attn\.[qkv]_proj\.bias$', name):
    return name, tensor.reshape(-1)
  if not re.match(r'(blocks|patch_embed)\..*\.kernel$', name):
    return name, tensor
  if name.startswith('patch_embed.'):
    tensor = tensor.transpose(3, 2, 0, 1)
  elif '.attn.proj.' in name:
    # [heads, channels, D]
    tensor = tensor.reshape(-1, tensor.shape[-1]).T
  else:
    # [D, heads, channels] of attention, [D, hidden] of an MLP.
    tensor = tensor.reshape(len(tensor), -1).T
  return name.removesuffix('kernel') + 'weight', tensor


def _fold_normalisation(tensors: dict[str, np.ndarray]) -> None:
  """Turns an embedding of (x - 0.5) / 0.5 into one of our normalised images.

  The patches are cut without padding, so that this is exact: with our
  z = (x - mean) / std they see 2 std z + 2 mean - 1.
  """
  kernel, bias = (tensors[f'patch_embed.proj.{x}'] for x in ('weight', 'bias'))
  if (
    kernel.ndim != 4
    or kernel.shape[1] != 3
    or bias.shape != kernel.shape[:1]
    or not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (kernel, bias))
  ):
    # That it fits no encoder is told by its shape or its dtype.
    return
  # What is not finite is told later, for it is refused.
  with np.errstate(all='ignore'):
    kernel, bias = kernel.astype(np.float64), bias.astype(np.float64)
    shift = (_IMAGENET_MEAN - _MEAN) / _STD
    bias = bias + np.einsum('ochw,c->o', kernel, shift)
    kernel = kernel * (_IMAGENET_STD / _STD)[:, None, None]
    tensors['patch_embed.proj.weight'] = kernel.astype(np.float32)
    tensors['patch_embed.proj.bias'] = bias.astype(np.float32)


def _sine_cosine(side: int, width: int) -> np.ndarray:
  """`posemb_sincos_2d` of big_vision, [1, side * side, width] float32."""
  if width % 4 or width < 8:
    raise ValueError(f'sine-cosine positions of width {width}')
  frequency = 10_000.0 ** -(np.arange(width // 4) / (width // 4 - 1))
  y, x = np.mgrid[:side, :side].reshape(2, -1, 1) * frequency
  parts = (np.sin(x), np.cos(x), np.sin(y), np.cos(y))
  return np.concatenate(parts, axis=1, dtype=np.float32)[np.newaxis]


def _add_positions(tensors: dict[str, np.ndarray]) -> list[str]:
  """Positions of a file that has none, or too many of them; notes."""
  has_class = 'cls_token' in tensors
  if 'pos_embed' not in tensors:
    width, _, _, patch_px = tensors['patch_embed.proj.weight'].shape
    if patch_px not in _PATCHES_PX or not 0 < width <= _MAX_WIDTH:
      raise ValueError(f'no positions, and patches of {patch_px} pixels')
    side = _USUAL_PX // patch_px
    tensors['pos_embed'] = _sine_cosine(side, width)
    return [
      'the file has no positions: those of sines and cosines were taken, for '
      f'images of {side * patch_px} pixels'
    ]
  count = tensors['pos_embed'].shape[1]
  if not has_class and round((count - 1) ** 0.5) ** 2 == count - 1:
    tensors['pos_embed'] = tensors['pos_embed'][:, 1:]
    return ['the file has a position for a class token that it has not']
  return []


def to_timm(
  tensors: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], int, list[str]]:
  """Renames Google's parameters to those of timm, in torch's layouts.

  The normalisation of the images is folded into the patch embedding. Queries,
  keys and values remain apart, and what is no part of the encoder keeps its
  name.

  Args:
    tensors: of one encoder, by names with dots.

  Returns:
    The tensors, the attention heads of a block, and notes.

  Raises:
    UserError: more blocks than any encoder has.
    LookupError: a part is missing.
    ValueError: a part has another shape.
  """
  renamed = {}
  num_heads = 0
  notes = [
    'its images are scaled to [-1, 1]: the patch embedding was changed to take '
    "images normalised by ImageNet's means and deviations"
  ]
  for name, tensor in _unstacked(tensors):
    if _POOLING.fullmatch(name):
      renamed[name] = tensor
      continue
    for pattern, replacement in _RENAMED:
      name = re.sub(pattern, replacement, name)
    if name.endswith('.attn.q_proj.kernel'):
      _, num_heads, _ = tensor.shape
    name, tensor = _to_torch(name, tensor)
    if name in renamed:
      raise ValueError(f'two tensors for {name[:200]}')
    renamed[name] = tensor
  if any(_POOLING.fullmatch(name) for name in renamed):
    notes.append(
      'its attention pooling was left out: the embedding of an image is the '
      'mean of its patches'
    )
  _fold_normalisation(renamed)
  return renamed, num_heads, notes + _add_positions(renamed)
