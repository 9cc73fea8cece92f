"""Which encoder fits a state dict, and which state dict fits an encoder."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cmd_jax.convert import efficientnet, google_vit, resnet, swin, vit
from cmd_jax.convert.entries import Entry, get_path
from cmd_jax.convert.families import Renamed
from cmd_jax.errors import UserError
from cmd_jax.models import make_encoder
from cmd_jax.models.efficientnet import VARIANTS as EFFICIENTNETS
from cmd_jax.models.efficientnet import EfficientNet
from cmd_jax.models.resnet import VARIANTS as RESNETS
from cmd_jax.models.resnet import ResNet
from cmd_jax.models.swin import VARIANTS as SWINS
from cmd_jax.models.swin import SwinTransformer
from cmd_jax.models.vit import VARIANTS as VITS
from cmd_jax.models.vit import VisionTransformer

_TABLES = (
  (VisionTransformer, 'vit', vit.entries),
  (SwinTransformer, 'swin', swin.entries),
  (ResNet, 'resnet', resnet.entries),
  (EfficientNet, 'efficientnet', efficientnet.entries),
)

# Ten times as many as the deepest encoder published.
_MAX_BLOCKS = 1000

# norm_epsilon is in no state dict; where a family has another than ours.
_EPSILONS = {
  'DINOv3': 1e-5,
  'DINOv3 (Hugging Face)': 1e-5,
  'DINOv3 (timm)': 1e-5,
  'ViT (Hugging Face)': 1e-12,
}


def table_of(encoder: nn.Module) -> tuple[str, list[Entry]]:
  """Name of an encoder's architecture and the table of its parameters.

  Raises:
    TypeError: no encoder of this project.
  """
  for cls, name, entries in _TABLES:
    if isinstance(encoder, cls):
      return name, entries(encoder)
  raise TypeError(f'{type(encoder).__name__} has no table of names')


def class_of(name: str) -> type[nn.Module]:
  """The module of an architecture, a name of `table_of`.

  Raises:
    KeyError: there is no such architecture.
  """
  return {known: cls for cls, known, _ in _TABLES}[name]


# A file is compared with the same encoder several times.
@functools.lru_cache(maxsize=16)
def _shapes(encoder: nn.Module) -> Mapping[str, Any]:
  px = getattr(encoder, 'image_px', 32)
  return jax.eval_shape(
    encoder.init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, px, px, 3), jnp.float32),
  )


def torch_shapes(
  encoder: nn.Module, entries: Iterable[Entry]
) -> dict[str, tuple[int, ...]]:
  """Shapes that the parameters have in a state dict, by name."""
  variables = _shapes(encoder)
  # Arrays without memory of their own, because layouts work on arrays.
  return {
    entry.name: entry.layout.to_torch(
      np.broadcast_to(np.float32(0), get_path(variables, entry.path).shape)
    ).shape
    for entry in entries
  }


def family_interpolation(renamed: Renamed) -> str:
  """How the program of a ViT's weights resizes learned positions.

  Of weights that DINO and timm both have, without classifier, layer scale and
  registers, DINO's main branch decides, which trained them.

  Returns:
    One of `positions.INTERPOLATIONS`.
  """
  # Google's programs resize linearly, as none of these.
  if renamed.family.endswith('(Hugging Face)') or (
    renamed.family == google_vit.FAMILY
  ):
    return 'dino'
  names = renamed.tensors
  of_timm = 'head.weight' in names or 'blocks.0.ls1.gamma' in names
  if 'reg_token' in names or (renamed.family == 'ViT' and of_timm):
    return 'antialias'
  return 'dinov2'


def family_epsilon(family: str) -> float:
  """norm_epsilon with which a family of ViTs was trained."""
  return _EPSILONS.get(family, 1e-6)


def family_gelu(family: str) -> str:
  """config.model.gelu with which a family of ViTs was trained."""
  return 'tanh' if family == google_vit.FAMILY else 'exact'


def _count(names: Iterable[str], pattern: str) -> int:
  """How many different numbers the group of `pattern` has in the names."""
  return len({m[1] for m in (re.match(pattern, n) for n in names) if m})


def shortest_ratio(hidden: int, width: int) -> float:
  """The shortest r with int(width * r) == hidden."""
  for digits in range(1, 17):
    ratio = float(f'{hidden / width:.{digits}g}')
    if int(width * ratio) == hidden:
      return ratio
  return float(np.nextafter(hidden / width, np.inf))


def _mlp_ratio(hidden: int, width: int) -> dict[str, float]:
  # All published sizes but a few have 4, the default.
  ratio = shortest_ratio(hidden, width)
  return {} if ratio == 4 else {'mlp_ratio': ratio}


def usual_heads(width: int) -> int | None:
  """Heads of the presets of this width, else of 64 channels; None if unclear.

  No state dict tells the attention heads of a ViT.
  """
  for preset_width, _, heads in VITS.values():
    if preset_width == width:
      return heads
  return None if width % 64 else width // 64


def _vit_fields(renamed: Renamed) -> dict[str, Any]:
  tensors = renamed.tensors
  kernel = tensors['patch_embed.proj.weight']
  width, patch_px = kernel.shape[0], kernel.shape[-1]
  depth = _count(tensors, r'blocks\.(\d+)\.')
  heads = renamed.num_heads or usual_heads(width) or 1
  fields = {'width': width, 'depth': depth, 'num_heads': heads}
  for variant, preset in VITS.items():
    if preset == (width, depth, heads):
      # A config may have changed the variant's own; 0 gives them back.
      fields = dict(variant=variant, width=0, depth=0, num_heads=0)
  fields['patch_px'] = patch_px
  fields['class_token'] = 'cls_token' in tensors
  if not fields['class_token']:
    fields['pool'] = 'mean'
  if 'pos_embed' in tensors:
    count = tensors['pos_embed'].shape[1] - fields['class_token']
    fields['image_px'] = round(count**0.5) * patch_px
  fields['positions'] = 'learned' if 'pos_embed' in tensors else 'rotary'
  hidden = tensors['blocks.0.mlp.fc2.weight'].shape[1]
  gated = tensors['blocks.0.mlp.fc1.weight'].shape[0] == 2 * hidden
  fields['ffn'] = 'swiglu' if gated else 'mlp'
  # make_vit takes two thirds of a gated hidden dimension.
  fields |= _mlp_ratio(hidden * 3 // 2 if gated else hidden, width)
  registers = tensors.get('reg_token', np.empty((1, 0)))
  fields['num_registers'] = registers.shape[1]
  scaled = 'blocks.0.ls1.gamma' in tensors
  fields['layer_scale'] = 1e-5 if scaled else 0.0
  fields['norm_epsilon'] = family_epsilon(renamed.family)
  fields['gelu'] = family_gelu(renamed.family)
  if 'pos_embed' in tensors:
    fields['interpolation'] = family_interpolation(renamed)
  return fields


def _swin_fields(renamed: Renamed) -> dict[str, Any]:
  tensors = renamed.tensors
  table = 'blocks.0.attn.relative_position_bias_table'
  kernel = tensors['patch_embed.proj.weight']
  width = kernel.shape[0]
  num_stages = _count(tensors, r'layers\.(\d+)\.blocks')
  depths = tuple(
    _count(tensors, rf'layers\.{stage}\.blocks\.(\d+)')
    for stage in range(num_stages)
  )
  tables = [tensors[f'layers.{stage}.{table}'] for stage in range(num_stages)]
  heads = tuple(x.shape[1] for x in tables)
  fields = {'width': width, 'depths': depths, 'num_heads': heads}
  for variant, preset in SWINS.items():
    if preset == (width, depths, heads):
      fields = dict(variant=variant, width=0, depths=(), num_heads=())
  hidden = tensors['layers.0.blocks.0.mlp.fc1.weight'].shape[0]
  return fields | {
    'patch_px': kernel.shape[-1],
    'window': (round(len(tables[0]) ** 0.5) + 1) // 2,
    **_mlp_ratio(hidden, width),
  }


def _resnet_fields(renamed: Renamed) -> dict[str, Any]:
  tensors = renamed.tensors
  bottleneck = 'layer1.0.conv3.weight' in tensors
  last = tensors[f'layer1.0.conv{3 if bottleneck else 2}.weight']
  sizes = tuple(
    _count(tensors, rf'layer{stage}\.(\d+)\.') for stage in range(1, 5)
  )
  fields = {}
  for variant, (preset_bottleneck, preset_sizes, channels) in RESNETS.items():
    if (preset_bottleneck, preset_sizes) == (bottleneck, sizes):
      base = len(last) // (4 if bottleneck else 1)
      fields = {
        'variant': variant,
        'width_ratio': shortest_ratio(base, channels),
      }
  return fields


def _efficientnet_fields(renamed: Renamed) -> dict[str, Any]:
  tensors = renamed.tensors
  depth = _count(tensors, r'_blocks\.(\d+)\.')
  widths = [
    len(tensors[f'_blocks.{index}._project_conv.weight'])
    for index in range(depth)
  ]
  for variant, (sizes, channels) in EFFICIENTNETS.items():
    ratio = shortest_ratio(widths[-1], channels[-1])
    scaled = [int(width * ratio) for width in channels]
    if widths == np.repeat(scaled, sizes).tolist():
      return {'variant': variant, 'width_ratio': ratio}
  return {}


def fields_that_fit(renamed: Renamed) -> dict[str, Any]:
  """The fields of config.model for an encoder that a state dict fits.

  Attention heads of a ViT are a guess unless the file tells them. What no field
  can say, such as a ResNet of other depths, is left out.
  """
  describe = {
    'vit': _vit_fields,
    'swin': _swin_fields,
    'resnet': _resnet_fields,
    'efficientnet': _efficientnet_fields,
  }[renamed.architecture]
  try:
    return describe(renamed)
  except (ArithmeticError, LookupError, TypeError, ValueError):
    # Parts are missing or misshapen, which is told beside this.
    return {}


def flags_that_fit(renamed: Renamed) -> str:
  """`fields_that_fit` as flags, FILE being any config."""
  flags = [f'--config=FILE:encoder={renamed.architecture}']
  for field, value in fields_that_fit(renamed).items():
    # Tuples need quotes in a shell.
    text = f"'{value}'" if isinstance(value, tuple) else str(value)
    if isinstance(value, bool):
      text = text.lower()
    flags.append(f'--config.model.{field}={text}'.replace(' ', ''))
  return ' '.join(flags)


def _num_blocks(encoder: nn.Module) -> int:
  """Blocks of any encoder, whose number nothing but a file tells."""
  counts = getattr(encoder, 'depths', getattr(encoder, 'depth', 0))
  return sum(counts) if isinstance(counts, tuple) else int(counts)


def is_of_usual_depth(encoder: nn.Module) -> bool:
  """Whether an encoder has at most ten times the blocks of any published."""
  return _num_blocks(encoder) <= _MAX_BLOCKS


def make_fitting(renamed: Renamed, **changes: Any) -> nn.Module:
  """The encoder of `fields_that_fit`.

  Args:
    renamed: the state dict.
    **changes: fields of config.model that are other than that.

  Raises:
    UserError: fields that cannot be, or more blocks than any encoder has.
  """
  usual = {} if renamed.architecture == 'resnet' else {'drop_path_rate': 0.0}
  fields = usual | fields_that_fit(renamed) | changes
  encoder = make_encoder(renamed.architecture, **fields)
  if not is_of_usual_depth(encoder):
    raise UserError(
      f'{_num_blocks(encoder)} blocks are more than any encoder has: give '
      'another file'
    )
  return encoder
