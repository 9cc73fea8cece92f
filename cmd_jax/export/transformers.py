"""An encoder as a folder that the library transformers loads.

Names and configs are those of files published for that library, which its
versions 4 and 5 both read; it is not needed to write them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from cmd_jax.api import Encoder
from cmd_jax.convert import architecture, save
from cmd_jax.errors import UserError
from cmd_jax.export import transformers_names as names
from cmd_jax.models.resnet import STEM_CHANNELS, ResNet
from cmd_jax.models.vit import VisionTransformer

# The number of that resampling in Pillow.
_BICUBIC = 3
_ACTIVATIONS = {'exact': 'gelu', 'tanh': 'gelu_pytorch_tanh'}


class Converted(NamedTuple):
  """What the folder holds.

  Attributes:
    config: config.json.
    tensors: model.safetensors.
    preprocessor: preprocessor_config.json.
    embedding: how the image embedding is got from a model's output, in Python.
    notes: what could not be kept, a sentence each.
  """

  config: dict[str, Any]
  tensors: names.Tensors
  preprocessor: dict[str, Any]
  embedding: str
  notes: tuple[str, ...]


def convert(encoder: Encoder) -> Converted:
  """Converts an encoder for images of the size of its view.

  Learned positions are resized to the grid of the view beforehand, so that it
  computes what is evaluated. Classifiers of fine-tuned runs come with it,
  calibrated, where the library has a class that computes the same.

  Args:
    encoder: a ViT with a class token, or a ResNet.

  Raises:
    UserError: a network for which that library has no class.
  """
  module = encoder.module
  if isinstance(module, VisionTransformer):
    return _convert_vit(encoder, module)
  if isinstance(module, ResNet):
    return _convert_resnet(encoder, module)
  name, _ = architecture.table_of(module)
  raise UserError(
    f'--format=transformers is of ViTs and ResNets, and {encoder.source} is of '
    f'the architecture {name}: use --format=safetensors or onnx'
  )


def _refuse(encoder: Encoder, what: str) -> UserError:
  return UserError(
    f'{encoder.source} has {what}, which no class of transformers has: use '
    '--format=safetensors or onnx'
  )


def _family_of(encoder: Encoder, module: VisionTransformer) -> names.Family:
  """The family that computes what a ViT computes."""
  if not module.class_token:
    raise _refuse(encoder, 'no class token')
  if module.patch_stride_px != module.patch_px:
    raise _refuse(encoder, 'overlapping patches')
  if module.positions == 'rotary':
    return names.DINOV3
  if module.num_registers:
    return names.REGISTERS
  # ViT's class for classification looks at the class token alone.
  mean_is_classified = module.pool == 'mean' and encoder.classifier is not None
  if module.layer_scale or module.ffn == 'swiglu' or mean_is_classified:
    return names.DINOV2
  return names.VIT


def _mlp_ratio(encoder: Encoder, module: VisionTransformer) -> int:
  """The whole number from which DINOv2's classes get the hidden dimension."""
  for ratio in range(1, 33):
    hidden = module.width * ratio
    if module.ffn == 'swiglu':
      hidden = -(-int(hidden * 2 / 3) // 8) * 8
    if hidden == module.hidden_dim:
      return ratio
  raise _refuse(
    encoder,
    f'a hidden dimension of {module.hidden_dim} for a width of {module.width}',
  )


def _convert_vit(encoder: Encoder, module: VisionTransformer) -> Converted:
  family = _family_of(encoder, module)
  side = encoder.preprocessing['view_px']
  if side % module.patch_px:
    raise _refuse(
      encoder, f'views of {side} pixels and patches of {module.patch_px}'
    )
  config = {
    'hidden_size': module.width,
    'num_hidden_layers': module.depth,
    'num_attention_heads': module.num_heads,
    'image_size': side,
    'patch_size': module.patch_px,
    'num_channels': module.channels,
    'layer_norm_eps': module.norm_epsilon,
    'hidden_act': _ACTIVATIONS[module.gelu],
    'qkv_bias': True,
  }
  gated = module.ffn == 'swiglu'
  if family is names.DINOV3:
    # Its gate is an activation like that of any other layer.
    config |= {'hidden_act': 'silu'} if gated else {}
    config |= {
      'intermediate_size': module.hidden_dim,
      'num_register_tokens': module.num_registers,
      'use_gated_mlp': gated,
      'rope_theta': 100.0,
    }
    del config['qkv_bias']
    config |= {f'{name}_bias': True for name in ('query', 'key', 'value')}
    config |= {'proj_bias': True, 'mlp_bias': True}
  elif family is names.VIT:
    config |= {'intermediate_size': module.hidden_dim}
    # With the identity as its layer, the pooled output is the class token.
    config |= {'pooler_act': 'linear', 'pooler_output_size': module.width}
  else:
    config |= {'mlp_ratio': _mlp_ratio(encoder, module)}
    config |= {'use_swiglu_ffn': gated}
    if family is names.REGISTERS:
      config |= {'num_register_tokens': module.num_registers}
  tensors = names.vit_tensors(
    module, jax.device_get(encoder.variables)['params'], family, side
  )
  first = module.num_prefix
  embedding = 'output.last_hidden_state[:, 0]'
  if module.pool == 'mean':
    embedding = f'output.last_hidden_state[:, {first}:].mean(1)'
  return _finish(encoder, family, config, tensors, embedding)


def _convert_resnet(encoder: Encoder, module: ResNet) -> Converted:
  if module.last_stride != 2:
    raise _refuse(encoder, f'a last stage of stride {module.last_stride}')
  factor = 4 if module.bottleneck else 1
  config = {
    'num_channels': module.channels,
    'embedding_size': STEM_CHANNELS,
    'hidden_sizes': [module.base_channels * factor * 2**i for i in range(4)],
    'depths': list(module.stage_sizes),
    'layer_type': 'bottleneck' if module.bottleneck else 'basic',
    'hidden_act': 'relu',
    'downsample_in_first_stage': False,
    'downsample_in_bottleneck': False,
  }
  tensors = {
    names.resnet_name(name): tensor
    for name, tensor in save.to_timm(
      module, jax.device_get(encoder.variables)
    ).items()
  }
  embedding = 'output.pooler_output.flatten(1)'
  return _finish(encoder, names.RESNET, config, tensors, embedding)


def _finish(
  encoder: Encoder,
  family: names.Family,
  config: dict[str, Any],
  tensors: Mapping[str, Any],
  embedding: str,
) -> Converted:
  """Adds what all families have: names, the classifier, the preprocessing."""
  config = {'model_type': family.model_type, 'dtype': 'float32'} | config
  config['architectures'] = [f'{family.name}Model']
  notes, classifier = [], encoder.classifier
  if encoder.module.channels != 3:
    notes.append(
      'AutoImageProcessor knows photographs alone: make the views as '
      'cmd_jax.json says'
    )
  if classifier is not None and not family.classifier:
    notes.append(
      f'the classifier is left out: the class {family.name}Model has none'
    )
  elif classifier is not None:
    tensors = {
      f'{family.prefix}.{name}': value
      for name, value in tensors.items()
      # The class for classification has no pooler.
      if not name.startswith('pooler.')
    } | _classifier_tensors(encoder, family)
    config['architectures'] = [f'{family.name}ForImageClassification']
    labels = [str(name) for name in classifier.class_names]
    config['id2label'] = {str(i): name for i, name in enumerate(labels)}
    config['label2id'] = {name: i for i, name in enumerate(labels)}
  as_arrays = {
    # What counts batches is of whole numbers, and has no axes.
    name: np.asarray(value, value.dtype if not value.ndim else np.float32, 'C')
    for name, value in tensors.items()
  }
  return Converted(
    config, as_arrays, _preprocessor(encoder), embedding, tuple(notes)
  )


def _classifier_tensors(
  encoder: Encoder, family: names.Family
) -> names.Tensors:
  """The linear layer, its temperature within it."""
  classifier = encoder.classifier
  kernel, bias = (
    np.asarray(x, np.float32) / np.float32(classifier.temperature)
    for x in (classifier.kernel, classifier.bias)
  )
  if family in (names.DINOV2, names.REGISTERS):
    # Those look at the class token and the mean of the patches, side by side.
    unused = np.zeros_like(kernel)
    of_mean = encoder.module.pool == 'mean'
    kernel = np.concatenate([unused, kernel] if of_mean else [kernel, unused])
  return {
    f'{family.classifier}.weight': kernel.T,
    f'{family.classifier}.bias': bias,
  }


def _preprocessor(encoder: Encoder) -> dict[str, Any]:
  """What comes nearest to the program's own preprocessing in that library."""
  fields = encoder.preprocessing
  side, crop = fields['view_px'], fields['crop_fraction']
  square = {'height': side, 'width': side}
  config = {
    'image_processor_type': 'ViTImageProcessor',
    'do_resize': True,
    'size': square,
    'resample': _BICUBIC,
    'do_rescale': True,
    'rescale_factor': 1 / 255,
    'do_normalize': True,
    'image_mean': fields['mean'],
    'image_std': fields['std'],
    'do_convert_rgb': True,
  }
  if crop:
    config |= {
      'image_processor_type': 'BitImageProcessor',
      'size': {'shortest_edge': round(side / crop)},
      'do_center_crop': True,
      'crop_size': square,
    }
  return config
