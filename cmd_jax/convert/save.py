"""Encoders as files that timm loads, or the class that they came from."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn
from safetensors.numpy import save as to_safetensors

from cmd_jax import __version__
from cmd_jax.convert import architecture, entries
from cmd_jax.errors import UserError
from cmd_jax.files import disk_errors
from cmd_jax.files.atomic import write_atomically
from cmd_jax.models import efficientnet
from cmd_jax.models.efficientnet import EfficientNet
from cmd_jax.models.layers import DTYPES
from cmd_jax.models.resnet import ResNet
from cmd_jax.models.swin import SwinTransformer
from cmd_jax.models.vit import VisionTransformer

# Fields of every Flax module, not of an architecture.
_OF_FLAX = ('parent', 'name', 'axis_name')
# What the classes of `timm_constructor` call their classifiers.
_CLASSIFIERS = {
  VisionTransformer: 'head',
  SwinTransformer: 'head.fc',
  ResNet: 'fc',
  EfficientNet: '_fc',
}


def _merge_class_position(tensors: dict[str, np.ndarray]) -> None:
  """Adds the class token's position into it, timm's no_embed_class.

  timm gives registers positions unless the class token has none either. The
  sum is the one that the encoder computes, so the function stays the same.
  """
  positions = tensors['pos_embed']
  # Adding zeros would turn a negative zero positive.
  if positions[:, 0].any():
    tensors['cls_token'] = tensors['cls_token'] + positions[:, :1]
  tensors['pos_embed'] = np.ascontiguousarray(positions[:, 1:])


def to_timm(
  encoder: nn.Module, variables: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """The state dict that `timm_constructor`'s class loads.

  Args:
    encoder: the encoder.
    variables: its 'params', and 'batch_stats' if it has any; other collections
      are left alone.

  Returns:
    float32 arrays in torch's layouts, by name.
  """
  _, table = architecture.table_of(encoder)
  tensors = entries.to_torch(table, variables)
  if isinstance(encoder, VisionTransformer):
    if encoder.positions == 'rotary':
      tensors = {
        re.sub(r'\.ls([12])\.gamma$', r'.gamma_\1', name): tensor
        for name, tensor in tensors.items()
      }
    elif encoder.num_registers and encoder.class_token:
      _merge_class_position(tensors)
  for name in [n for n in tensors if n.endswith('.running_var')]:
    counter = name.replace('running_var', 'num_batches_tracked')
    tensors[counter] = np.zeros((), np.int64)
  return tensors


def _mlp_ratio(hidden: int, width: int) -> str:
  return repr(architecture.shortest_ratio(hidden, width))


def _vit_constructor(encoder: VisionTransformer, num_classes: int) -> str:
  rotary = encoder.positions == 'rotary'
  gated = encoder.ffn == 'swiglu'
  hidden = encoder.hidden_dim
  arguments = {
    'img_size': encoder.image_px,
    'patch_size': encoder.patch_px,
    'embed_dim': encoder.width,
    'depth': encoder.depth,
    'num_heads': encoder.num_heads,
    'init_values': encoder.layer_scale or None,
    'global_pool': "'token'" if encoder.pool == 'cls' else "'avg'",
    'num_classes': num_classes,
  }
  if not encoder.class_token:
    arguments['class_token'] = False
  if encoder.gelu == 'tanh' and not gated:
    arguments['act_layer'] = (
      "functools.partial(torch.nn.GELU, approximate='tanh')"
    )
  norm = f'functools.partial(torch.nn.LayerNorm, eps={encoder.norm_epsilon!r})'
  arguments['norm_layer'] = norm
  if rotary:
    arguments |= {
      'mlp_ratio': _mlp_ratio(hidden, encoder.width),
      'swiglu_mlp': gated,
      'num_reg_tokens': encoder.num_registers,
      # The other kinds of attention have no bias for the keys.
      'attn_type': "'rope'",
      'use_abs_pos_emb': False,
      'use_rot_pos_emb': True,
      'rope_type': "'dinov3'",
      'rope_temperature': 100.0,
      'rope_rotate_half': True,
      'use_fc_norm': False,
      'dynamic_img_size': True,
    }
    return _call('timm.models.eva.Eva', arguments)
  factor = 2 if gated else 1
  arguments |= {
    'mlp_ratio': _mlp_ratio(factor * hidden, encoder.width),
    'reg_tokens': encoder.num_registers,
    'no_embed_class': encoder.num_registers > 0,
    'fc_norm': False,
  }
  if gated:
    arguments['mlp_layer'] = 'timm.layers.SwiGLUPacked'
    arguments['act_layer'] = 'torch.nn.SiLU'
  return _call('timm.models.vision_transformer.VisionTransformer', arguments)


def _swin_constructor(encoder: SwinTransformer, num_classes: int) -> str:
  norm = f'functools.partial(torch.nn.LayerNorm, eps={encoder.norm_epsilon!r})'
  arguments = {
    'img_size': encoder.image_px,
    'patch_size': encoder.patch_px,
    'embed_dim': encoder.width,
    'depths': encoder.depths,
    'num_heads': encoder.num_heads,
    'window_size': encoder.window,
    'mlp_ratio': encoder.mlp_ratio,
    'norm_layer': norm,
    'num_classes': num_classes,
  }
  return _call('timm.models.swin_transformer.SwinTransformer', arguments)


def _resnet_constructor(encoder: ResNet, num_classes: int) -> str:
  block = 'Bottleneck' if encoder.bottleneck else 'BasicBlock'
  arguments = {
    'block': f'timm.models.resnet.{block}',
    'layers': encoder.stage_sizes,
    'channels': tuple(encoder.base_channels * 2**i for i in range(4)),
    'num_classes': num_classes,
  }
  return _call('timm.models.resnet.ResNet', arguments)


def _efficientnet_constructor(encoder: EfficientNet, num_classes: int) -> str:
  utils = 'efficientnet_lite_pytorch.utils'
  stages = []
  width = efficientnet.STEM_CHANNELS
  for size, channels, kernel_px, stride, expansion in zip(
    encoder.stage_sizes,
    encoder.stage_channels,
    efficientnet.KERNELS_PX,
    efficientnet.STRIDES,
    efficientnet.EXPANSIONS,
    strict=True,
  ):
    stages.append(
      f'r{size}_k{kernel_px}_s{stride}{stride}_e{expansion}'
      f'_i{width}_o{channels}'
    )
    width = channels
  fields = {
    'batch_norm_momentum': 0.9,
    'batch_norm_epsilon': efficientnet.EPSILON,
    'dropout_rate': 0.0,
    'fix_head_stem': True,
    'num_classes': num_classes,
    'relu_fn': "'relu6'",
  }
  arguments = {
    'blocks_args': f'{utils}.BlockDecoder.decode({stages})',
    'global_params': _call(f'{utils}.GlobalParams', fields),
  }
  return _call('efficientnet_lite_pytorch.EfficientNet', arguments)


def _call(function: str, arguments: Mapping[str, Any]) -> str:
  listed = ', '.join(f'{name}={value}' for name, value in arguments.items())
  return f'{function}({listed})'


def timm_constructor(encoder: nn.Module, num_classes: int = 0) -> str:
  """A line of Python that builds timm's class for the same architecture.

  It needs functools, torch and timm. A ViT with rotary positions is timm's Eva
  with attention of type 'rope'; its vit_*_dinov3 models have another, without
  biases for the keys. timm's Swin shifts a map before it pads it, Microsoft's,
  EsViT's and ours after: they agree where the windows tile the maps.

  An EfficientNet is of the class of efficientnet_lite_pytorch, whose names it
  keeps; its classifier, `_fc`, is empty where there are no classes.

  Args:
    encoder: the encoder.
    num_classes: outputs of the classifier that the file has; 0 for none.
  """
  constructors = {
    VisionTransformer: _vit_constructor,
    SwinTransformer: _swin_constructor,
    ResNet: _resnet_constructor,
    EfficientNet: _efficientnet_constructor,
  }
  return constructors[type(encoder)](encoder, num_classes)


def _fields(encoder: nn.Module) -> dict[str, Any]:
  """Name and fields of an architecture, as JSON can represent them."""
  name, _ = architecture.table_of(encoder)
  fields = {
    field: getattr(encoder, field)
    for field in encoder.__dataclass_fields__
    if field not in _OF_FLAX
  }
  dtypes = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
  return {'name': name} | fields | {'dtype': dtypes[np.dtype(encoder.dtype)]}


def save_encoder(
  path: str | pathlib.Path,
  encoder: nn.Module,
  variables: Mapping[str, Any],
  metadata: Mapping[str, str] | None = None,
  classifier: tuple[np.ndarray, np.ndarray] | None = None,
) -> None:
  """Writes an encoder as .safetensors in timm's naming.

  The class of `timm_constructor` loads it with strict=True, that of an
  EfficientNet, in its own naming, with strict=False because of its classifier.
  `load_encoder` reads it back: bit for bit, except that with registers the
  class token comes with its position added (timm's no_embed_class), which
  computes the same.

  Args:
    path: of the file, ending in .safetensors; an existing one is replaced as a
      whole.
    encoder: the encoder.
    variables: its 'params', and 'batch_stats' if it has any.
    metadata: strings to store beside format, cmd_jax_version, architecture
      (JSON) and the constructor, as `timm` where the class is timm's and as
      `efficientnet_lite_pytorch` where it is of that package.
    classifier: kernel [D, C] and bias [C] of a linear layer over the embedding,
      which that class has too.

  Raises:
    UserError: another ending, or a folder that cannot be written.
  """
  path = pathlib.Path(path)
  if path.suffix != '.safetensors':
    raise UserError(f'{path} does not end in .safetensors: name it so')
  strings = {
    # The mark by which transformers and timm know the layouts.
    'format': 'pt',
    'cmd_jax_version': __version__,
    'architecture': json.dumps(_fields(encoder)),
  }
  tensors, num_classes = to_timm(encoder, variables), 0
  if classifier is not None:
    kernel, bias = (np.asarray(x, np.float32) for x in classifier)
    name, num_classes = _CLASSIFIERS[type(encoder)], len(bias)
    tensors[f'{name}.weight'] = np.ascontiguousarray(kernel.T)
    tensors[f'{name}.bias'] = bias
  constructor = timm_constructor(encoder, num_classes)
  strings[constructor.partition('.')[0]] = constructor
  content = to_safetensors(tensors, {**(metadata or {}), **strings})
  with disk_errors.writing(path, 'choose another path'):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
