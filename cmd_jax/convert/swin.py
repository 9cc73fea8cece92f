"""Swin transformers in the naming of timm, Microsoft and EsViT."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from cmd_jax.convert.entries import PATCHES, Entry, linear, norm
from cmd_jax.models.swin import SwinTransformer

_BUFFERS = ('relative_position_index', 'attn_mask')


def entries(encoder: SwinTransformer) -> list[Entry]:
  """The table of an encoder, in timm's naming."""
  keys, name = ('params', 'patch_embed'), 'patch_embed.proj'
  table = [
    Entry((*keys, 'kernel'), f'{name}.weight', PATCHES),
    Entry((*keys, 'bias'), f'{name}.bias'),
  ]
  table += norm('patch_norm', 'patch_embed.norm')
  for stage, depth in enumerate(encoder.depths):
    if stage:
      merge, name = f'stage_{stage}_merge', f'layers.{stage}.downsample'
      table += norm(f'{merge}/norm', f'{name}.norm')
      table += linear(f'{merge}/reduction', f'{name}.reduction', bias=False)
    for index in range(depth):
      block = f'stage_{stage}_block_{index}'
      name = f'layers.{stage}.blocks.{index}'
      bias_table = 'relative_position_bias_table'
      table += norm(f'{block}/norm1', f'{name}.norm1')
      table += linear(f'{block}/attn/qkv', f'{name}.attn.qkv')
      table += linear(f'{block}/attn/proj', f'{name}.attn.proj')
      table.append(
        Entry(
          ('params', block, 'attn', bias_table), f'{name}.attn.{bias_table}'
        )
      )
      table += norm(f'{block}/norm2', f'{name}.norm2')
      table += linear(f'{block}/mlp/fc1', f'{name}.mlp.fc1')
      table += linear(f'{block}/mlp/fc2', f'{name}.mlp.fc2')
  return table + norm('norm', 'norm')


def from_official(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Renames the parameters of Microsoft's and EsViT's Swin to timm's.

  There the merging after stage i is `layers.{i}.downsample`, here and in timm
  `layers.{i + 1}.downsample`, and index and mask buffers are stored. A state
  dict in timm's naming, known by having no `layers.0.downsample`, is left as it
  is.

  Args:
    tensors: state dict of a Swin without prefix.

  Returns:
    The same arrays under timm's names.
  """
  if not any(name.startswith('layers.0.downsample.') for name in tensors):
    return dict(tensors)
  return {
    re.sub(
      r'^layers\.(\d{1,4})\.downsample\.',
      lambda match: f'layers.{int(match[1]) + 1}.downsample.',
      name,
    ): value
    for name, value in tensors.items()
    if name.rpartition('.')[2] not in _BUFFERS
  }
