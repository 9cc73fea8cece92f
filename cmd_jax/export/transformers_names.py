"""State dicts of ViTs and ResNets in the names of the library transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from cmd_jax.models.positions import interpolate_positions
from cmd_jax.models.vit import VisionTransformer

Tensors = dict[str, np.ndarray]


class Family(NamedTuple):
  """A class of models of that library.

  Attributes:
    model_type: as config.json names it.
    name: what its classes begin with.
    prefix: of the encoder within its class for classification.
    classifier: name of the linear layer there; empty for a family without.
  """

  model_type: str
  name: str
  prefix: str
  classifier: str = 'classifier'


VIT = Family('vit', 'ViT', 'vit')
DINOV2 = Family('dinov2', 'Dinov2', 'dinov2')
REGISTERS = Family(
  'dinov2_with_registers', 'Dinov2WithRegisters', 'dinov2_with_registers'
)
# Its class for classification is of the newest versions alone.
DINOV3 = Family('dinov3_vit', 'DINOv3ViT', '', '')
RESNET = Family('resnet', 'ResNet', 'resnet', 'classifier.1')


def vit_tensors(
  module: VisionTransformer,
  params: Mapping[str, Any],
  family: Family,
  view_px: int,
) -> Tensors:
  """The state dict of a ViT.

  Args:
    module: the ViT, with a class token.
    params: its parameters, numpy arrays.
    family: in whose names.
    view_px: side of the images, to whose grid learned positions are resized.
  """
  dinov3 = family is DINOV3
  patches = np.asarray(params['patch_embed']['kernel'])
  channels = len(patches) // module.patch_px**2
  patches = patches.reshape(module.patch_px, module.patch_px, channels, -1)
  name = 'embeddings.patch_embeddings.' + ('' if dinov3 else 'projection.')
  tensors = {
    f'{name}weight': patches.transpose(3, 2, 0, 1),
    f'{name}bias': params['patch_embed']['bias'],
    'embeddings.cls_token': params['cls_token'],
  }
  if module.num_registers or dinov3:
    none = np.zeros((1, 0, module.width))
    tensors['embeddings.register_tokens'] = params.get('reg_token', none)
  if family is not VIT:
    # Nothing here masks patches, but the class has the parameter.
    shape = (1, 1, module.width) if dinov3 else (1, module.width)
    tensors['embeddings.mask_token'] = np.zeros(shape)
  if not dinov3:
    grid = (view_px // module.patch_px,) * 2
    positions = params['pos_embed']
    tensors['embeddings.position_embeddings'] = np.concatenate(
      [
        positions[:, :1],
        interpolate_positions(positions[:, 1:], grid, module.interpolation),
      ],
      axis=1,
    )
  for index in range(module.depth):
    block = params[f'block_{index}']
    name = f'layer.{index}.' if dinov3 else f'encoder.layer.{index}.'
    for key, value in _block_tensors(block, module, family).items():
      tensors[f'{name}{key}'] = value
  final = 'norm' if dinov3 else 'layernorm'
  tensors |= _norm(params['norm'], final)
  if family is VIT:
    tensors['pooler.dense.weight'] = np.eye(module.width)
    tensors['pooler.dense.bias'] = np.zeros(module.width)
  return tensors


def _linear(layer: Mapping[str, Any], name: str) -> Tensors:
  return {
    f'{name}.weight': np.asarray(layer['kernel']).T,
    f'{name}.bias': layer['bias'],
  }


def _norm(layer: Mapping[str, Any], name: str) -> Tensors:
  return {f'{name}.weight': layer['scale'], f'{name}.bias': layer['bias']}


def _block_tensors(
  block: Mapping[str, Any], module: VisionTransformer, family: Family
) -> Tensors:
  """A block of a ViT, named from the block on."""
  is_vit, dinov3 = family is VIT, family is DINOV3
  names = ('layernorm_before', 'layernorm_after')
  if not is_vit:
    names = ('norm1', 'norm2')
  tensors = _norm(block['norm1'], names[0]) | _norm(block['norm2'], names[1])
  attention = 'attention.' if dinov3 else 'attention.attention.'
  words = ('query', 'key', 'value')
  qkv = block['attn']['qkv']
  for i, word in enumerate(words):
    part = {
      name: np.split(np.asarray(value), 3, axis=-1)[i]
      for name, value in qkv.items()
    }
    word = f'{word[0]}_proj' if dinov3 else word
    tensors |= _linear(part, attention + word)
  out = 'attention.o_proj' if dinov3 else 'attention.output.dense'
  tensors |= _linear(block['attn']['proj'], out)
  tensors |= _mlp_tensors(block['mlp'], module, family)
  if not is_vit:
    for which in (1, 2):
      ones = {'gamma': np.ones(module.width)}
      scale = block.get(f'ls{which}', ones)['gamma']
      tensors[f'layer_scale{which}.lambda1'] = scale
  return tensors


def _mlp_tensors(
  mlp: Mapping[str, Any], module: VisionTransformer, family: Family
) -> Tensors:
  first, second = mlp['fc1'], mlp['fc2']
  if family is VIT:
    return _linear(first, 'intermediate.dense') | _linear(
      second, 'output.dense'
    )
  gated = module.ffn == 'swiglu'
  if family is not DINOV3:
    names = ('weights_in', 'weights_out') if gated else ('fc1', 'fc2')
    return _linear(first, f'mlp.{names[0]}') | _linear(
      second, f'mlp.{names[1]}'
    )
  tensors = _linear(second, 'mlp.down_proj')
  if not gated:
    return tensors | _linear(first, 'mlp.up_proj')
  for i, name in enumerate(('gate_proj', 'up_proj')):
    part = {
      key: np.split(np.asarray(value), 2, axis=-1)[i]
      for key, value in first.items()
    }
    tensors |= _linear(part, f'mlp.{name}')
  return tensors


def resnet_name(name: str) -> str:
  """The name there of a parameter that torchvision calls `name`."""
  *places, layer, leaf = name.split('.')
  if not places:
    kind = 'convolution' if layer == 'conv1' else 'normalization'
    return f'embedder.embedder.{kind}.{leaf}'
  stage, block = places[0].removeprefix('layer'), places[1]
  start = f'encoder.stages.{int(stage) - 1}.layers.{block}'
  if len(places) == 3:
    kind = 'convolution' if layer == '0' else 'normalization'
    return f'{start}.shortcut.{kind}.{leaf}'
  kind = 'convolution' if layer.startswith('conv') else 'normalization'
  number = int(layer.removeprefix('conv').removeprefix('bn')) - 1
  return f'{start}.layer.{number}.{kind}.{leaf}'
