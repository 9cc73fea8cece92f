"""Tells whose state dict it is by its names, and renames it to our tables'.

Every family arrives at the names of convert/{vit,swin,resnet,efficientnet}.py,
timm's but for the last. What takes
arithmetic (missing biases, positions of other prefixes) happens here too, so
that the tables stay bijections; every such change is noted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from cmd_jax.convert import google_vit, swin
from cmd_jax.errors import UserError
from cmd_jax.files.safe_read import one_line

Tensors = dict[str, np.ndarray]


class Renamed(NamedTuple):
  """A state dict in the naming of its architecture's table.

  Attributes:
    family: whose it was, a value of FAMILIES.
    architecture: 'vit', 'swin', 'resnet' or 'efficientnet'.
    tensors: the arrays by name; what no table knows keeps its own name.
    notes: what was changed or left out on the way, in words.
    num_heads: attention heads of a block if the file tells, else None.
  """

  family: str
  architecture: str
  tensors: Tensors
  notes: tuple[str, ...]
  num_heads: int | None = None


# Known by the first row whose names are all there; '*' stands for any text.
FAMILIES = (
  (google_vit.FAMILY, 'vit', google_vit.NAMES),
  ('DINOv3 (Hugging Face)', 'vit', ('embeddings.patch_embeddings.weight',)),
  (
    'DINOv2 (Hugging Face)',
    'vit',
    ('embeddings.cls_token', '*.layer_scale1.lambda1'),
  ),
  (
    'ViT (Hugging Face)',
    'vit',
    ('embeddings.cls_token', '*.layernorm_before.weight'),
  ),
  (
    'Swin',
    'swin',
    ('layers.0.blocks.0.attn.*', 'patch_embed.*'),
  ),
  ('ResNet', 'resnet', ('bn1.weight', 'layer1.0.conv1.weight')),
  (
    'EfficientNet-Lite',
    'efficientnet',
    ('_conv_stem.weight', '_blocks.0._depthwise_conv.weight'),
  ),
  ('DINOv3', 'vit', ('storage_tokens', 'blocks.*')),
  ('DINOv3', 'vit', ('rope_embed.periods', 'blocks.*')),
  ('DINOv2', 'vit', ('register_tokens', 'blocks.*')),
  ('DINOv2', 'vit', ('mask_token', 'pos_embed', 'blocks.*.ls1.gamma')),
  ('DINOv2', 'vit', ('pos_embed', 'blocks.*.mlp.w12.weight')),
  ('ViT', 'vit', ('pos_embed', 'patch_embed.proj.weight', 'blocks.0.*')),
  (
    'DINOv3 (timm)',
    'vit',
    ('cls_token', 'patch_embed.proj.weight', 'blocks.0.*'),
  ),
)

_HUGGING_FACE = (
  (r'^embeddings\.position_embeddings$', 'pos_embed'),
  (r'^embeddings\.patch_embeddings\.(projection\.)?', 'patch_embed.proj.'),
  (r'^embeddings\.register_tokens$', 'reg_token'),
  (r'^embeddings\.distillation_token$', 'dist_token'),
  (r'^embeddings\.(cls_token|mask_token)$', r'\1'),
  # Published files and version 5's modules number their blocks differently.
  (r'^((encoder|model)\.)?layers?\.(\d+)\.', r'blocks.\3.'),
  (r'\.attention\.(attention\.)?(query|q_proj)\.', '.attn.q_proj.'),
  (r'\.attention\.(attention\.)?(key|k_proj)\.', '.attn.k_proj.'),
  (r'\.attention\.(attention\.)?(value|v_proj)\.', '.attn.v_proj.'),
  (r'\.attention\.(output\.dense|o_proj)\.', '.attn.proj.'),
  (r'\.layernorm_before\.', '.norm1.'),
  (r'\.layernorm_after\.', '.norm2.'),
  (r'\.layer_scale([12])\.lambda1$', r'.ls\1.gamma'),
  (r'\.mlp\.gate_proj\.', '.mlp.fc1_g.'),
  (r'\.(intermediate\.dense|mlp\.weights_in)\.', '.mlp.fc1.'),
  (r'^(blocks\.\d+)\.output\.dense\.', r'\1.mlp.fc2.'),
  (r'\.mlp\.(weights_out|down_proj)\.', '.mlp.fc2.'),
  (r'^layernorm\.', 'norm.'),
)
_META = (
  (r'^(register_tokens|storage_tokens)$', 'reg_token'),
  # DINOv2 stores blocks.<chunk>.<index> where its blocks were sharded.
  (r'^blocks\.\d+\.(\d+)\.', r'blocks.\1.'),
  (r'\.mlp\.w12\.', '.mlp.fc1.'),
  (r'\.mlp\.w1\.', '.mlp.fc1_g.'),
  (r'\.mlp\.w2\.', '.mlp.fc1_x.'),
  (r'\.mlp\.w3\.', '.mlp.fc2.'),
  # timm's Eva, and the first DeiT III.
  (r'\.gamma_([12])$', r'.ls\1.gamma'),
)

# Parts that would change the result and that our encoders do not have.
_UNSUPPORTED = (
  (r'^norm_pre\.', 'a norm before the blocks'),
  (r'^fc_norm\.', 'a norm after the pooling in place of the one before it'),
  (r'^cls_norm\.', 'a norm of its own for the class token'),
  (r'^attn_pool\.', 'attention pooling'),
  (r'\.(q_norm|k_norm)\.', 'norms of queries and keys'),
  (r'\.attn\.(norm|inner_attn_ln)\.', 'a norm within the attention'),
  (r'\.mlp\.(norm|ffn_ln)\.', 'a norm within the MLP'),
  (r'\.attn\.(logit_scale|cpb_mlp)', 'the attention of Swin V2'),
  (r'^absolute_pos_embed$', 'absolute positions of a Swin'),
  (r'^blocks\.\d+\.attn\.rel', 'relative positions of a ViT'),
  (r'^rope\.freqs', 'rotary positions of learned frequencies'),
  (r'^conv1\.\d+\.|^conv[23]\.', 'a stem of several convolutions'),
  (r'^(conv_root|gn_root|block\d+\.unit\d+)\.', 'the stem of a ResNet'),
  (r'^(layer\d\.\d+\.se\.|_blocks\.\d+\._se_)', 'squeeze and excitation'),
)
_IN_WORDS = {'q': 'queries', 'k': 'keys', 'v': 'values'}
# Told even where the rest of the names is of no family.
_UNKNOWN = (
  (r'(^|\.)ln_pre\.', 'a norm before the blocks, as CLIP has'),
  (r'(^|\.)resblocks\.\d+\.', 'the blocks of CLIP'),
  (r'(^|\.)stages\.\d+\..*(conv_dw|dwconv|gamma)', 'the blocks of a ConvNeXt'),
)
# Needed for pre-training or derived from the configuration.
_IGNORED = re.compile(
  r'(^mask_token|\.periods|\.bias_mask|\.num_batches_tracked'
  r'|\.relative_position_index|\.attn_mask)$|^local_cls_norm\.'
)


def _matches(name: str, pattern: str) -> bool:
  return re.fullmatch(re.escape(pattern).replace(r'\*', '.+'), name) is not None


def _find_family(names: list[str]) -> tuple[str, str]:
  for family, architecture, patterns in FAMILIES:
    if all(any(_matches(n, p) for n in names) for p in patterns):
      return family, architecture
  _refuse_parts(names, _UNKNOWN)
  families = ', '.join(dict.fromkeys(family for family, _, _ in FAMILIES))
  some = one_line(', '.join(names[:4])) or 'none'
  raise UserError(
    f'the names of the weights ({some}, ...) are of no family known here: give '
    f'a file of one of {families}'
  )


def _refuse_parts(
  names: Iterable[str], parts: tuple[tuple[str, str], ...]
) -> None:
  """Raises UserError for a part that would change the result."""
  for pattern, what in parts:
    found = [name for name in names if re.search(pattern, name)]
    if found:
      raise UserError(
        f'the file has {what} ({one_line(found[0])}), which no encoder here '
        'has: choose weights without it'
      )


def _without_wrapper(tensors: Mapping[str, np.ndarray]) -> Tensors:
  """Takes 'vit.', 'dinov2.' ... off Hugging Face's names."""
  for name in tensors:
    prefix, found, _ = name.partition('embeddings.cls_token')
    if found and prefix:
      return {name.removeprefix(prefix): x for name, x in tensors.items()}
  return dict(tensors)


def _without_numbers(tensors: Tensors) -> Tensors:
  """Names the parts of a ResNet whose layers a Sequential has numbered."""
  if not {'0.weight', '1.running_mean', '4.0.conv1.weight'} <= tensors.keys():
    return tensors
  parts = {'0': 'conv1', '1': 'bn1'} | {
    str(3 + i): f'layer{i}' for i in range(1, 5)
  }
  renamed = {}
  for name, tensor in tensors.items():
    first, dot, rest = name.partition('.')
    renamed[f'{parts.get(first, first)}{dot}{rest}'] = tensor
  return renamed


def _rename(tensors: Tensors, table: tuple[tuple[str, str], ...]) -> Tensors:
  renamed = {}
  for name, tensor in tensors.items():
    new = name
    for pattern, replacement in table:
      new = re.sub(pattern, replacement, new)
    # Plain MLPs of DINOv3 have an up_proj as well, but no gate.
    gate = name.replace('.mlp.up_proj.', '.mlp.gate_proj.')
    fc1 = '.mlp.fc1_x.' if gate in tensors else '.mlp.fc1.'
    new = new.replace('.mlp.up_proj.', fc1)
    if new in renamed:
      raise UserError(
        f'{one_line(name)} is the second tensor to become {one_line(new)}: the '
        'file numbers its blocks in an unknown way; save it with consecutive '
        'blocks.<index>'
      )
    renamed[new] = tensor
  return renamed


def _merge(tensors: Tensors) -> None:
  """Joins queries, keys and values, and both halves of gated MLPs."""
  for name in [n for n in tensors if n.endswith('.attn.q_proj.weight')]:
    block = name.removesuffix('q_proj.weight')
    weights = [
      tensors.pop(f'{block}{part}_proj.weight', None) for part in 'qkv'
    ]
    _join(tensors, f'{block}qkv.weight', weights)
  for name in [n for n in tensors if '.mlp.fc1_g.' in n]:
    halves = [tensors.pop(name), tensors.pop(name.replace('_g.', '_x.'), None)]
    _join(tensors, name.replace('_g.', '.'), halves)


def _join(tensors: Tensors, name: str, parts: list[np.ndarray | None]) -> None:
  # A part that the file lacks makes the whole one missing, which is told.
  if all(part is not None for part in parts):
    tensors[name] = np.concatenate(parts)


def _merge_biases(tensors: Tensors) -> list[str]:
  """Joins the biases of attention; those that no block has become zeros.

  Returns:
    Notes.
  """
  lacking = set()
  for suffix in ('_proj.bias', '_bias'):
    ends = {part: f'.attn.{part}{suffix}' for part in 'qkv'}
    names = {e: [n for n in tensors if n.endswith(e)] for e in ends.values()}
    blocks = {n.removesuffix(end) for end in names for n in names[end]}
    for block in sorted(blocks):
      parts = {
        part: tensors.pop(block + end, None) for part, end in ends.items()
      }
      zeros = np.zeros_like(next(x for x in parts.values() if x is not None))
      for part in [part for part, end in ends.items() if not names[end]]:
        parts[part] = zeros
        lacking.add(part)
      _join(tensors, f'{block}.attn.qkv.bias', list(parts.values()))
  if not any(name.endswith('.attn.qkv.bias') for name in tensors):
    for name in [n for n in tensors if n.endswith('.attn.qkv.weight')]:
      weight = tensors[name]
      zeros = np.zeros(weight.shape[0], weight.dtype)
      tensors[name.replace('.weight', '.bias')] = zeros
      lacking = set('qkv')
  names = [_IN_WORDS[part] for part in 'qkv' if part in lacking]
  if not names:
    return []
  return [f'the attention has no biases for its {", ".join(names)}: zeros']


def _mask_biases(tensors: Tensors) -> None:
  """DINOv3 stores key biases and multiplies them by a mask of zeros."""
  for name in [n for n in tensors if n.endswith('.bias_mask')]:
    bias = name.removesuffix('_mask')
    if bias in tensors:
      # What is masked may be NaN in the file.
      tensors[bias] = np.where(tensors[name] == 0, 0, tensors[bias]).astype(
        tensors[bias].dtype
      )


def _is_square(count: int) -> bool:
  return count > 0 and round(count**0.5) ** 2 == count


def _normalise_positions(tensors: Tensors, in_timm: bool) -> list[str]:
  """Leaves one position for the class token, before those of the patches.

  A distillation token becomes the first register. Positions of registers,
  which timm alone has, are added to them; a class token without a position
  gets zeros. Without a class token there are those of the patches alone.
  """
  notes = []
  registers = [
    tensors[name] for name in ('dist_token', 'reg_token') if name in tensors
  ]
  if 'dist_token' in tensors:
    del tensors['dist_token']
    notes.append('dist_token became a register')
  if registers:
    tensors['reg_token'] = np.concatenate(registers, axis=1)
  if 'pos_embed' not in tensors or tensors['pos_embed'].ndim != 3:
    return notes
  positions = tensors['pos_embed']
  _, count, width = positions.shape
  num_registers = sum(x.shape[1] for x in registers)
  has_class = 'cls_token' in tensors
  if _is_square(count):
    if not has_class:
      return notes
    # timm's no_embed_class.
    zero = np.zeros((1, 1, width), positions.dtype)
    tensors['pos_embed'] = np.concatenate([zero, positions], axis=1)
    notes.append('the class token has no position: it got zeros')
  elif in_timm and registers and _is_square(count - 1 - num_registers):
    own = positions[:, 1 : 1 + num_registers].astype(np.float32)
    tensors['reg_token'] = tensors['reg_token'] + own
    tensors['pos_embed'] = np.delete(
      positions, range(1, 1 + num_registers), axis=1
    )
    notes.append('the positions of the registers were added to them')
  elif not has_class or not _is_square(count - 1):
    beside = ' with a class token' if has_class else ''
    raise UserError(
      f'pos_embed has {count} rows, which are no square grid of patches'
      f'{beside}: only square grids are supported'
    )
  return notes


def _heads_by_periods(tensors: Tensors) -> int | None:
  """Attention heads by DINOv3's periods; refuses periods that are not ours."""
  periods = tensors.get('rope_embed.periods', np.empty(0))
  periods = np.asarray(periods, np.float32).ravel()
  if not periods.size or 'cls_token' not in tensors:
    return None
  expected = 100.0 ** (np.arange(len(periods)) / len(periods))
  # Published files hold them in bfloat16.
  if not np.allclose(periods, expected, rtol=0.01):
    raise UserError(
      f'rope_embed.periods are {periods[:3].tolist()} ..., not those of base '
      '100: rotary positions of another base are not supported'
    )
  return tensors['cls_token'].shape[-1] // (4 * len(periods))


def _from_vit(tensors: Tensors, family: str) -> tuple[Tensors, list[str]]:
  in_hugging_face = 'Hugging Face' in family
  tensors = _rename(tensors, _HUGGING_FACE if in_hugging_face else _META)
  _mask_biases(tensors)
  _merge(tensors)
  notes = _normalise_positions(tensors, in_timm=family.startswith('ViT'))
  notes += _merge_biases(tensors)
  if 'pos_embed' in tensors and any('.periods' in n for n in tensors):
    raise UserError('positions both learned and rotary are not supported')
  return tensors, notes


def to_timm(tensors: Mapping[str, np.ndarray]) -> Renamed:
  """Renames a state dict to timm's naming.

  Known are DINO, DeiT and timm's ViTs; DINOv2 and DINOv3 as Meta published
  them; timm's DINOv3; Hugging Face's ViTModel, Dinov2Model,
  Dinov2WithRegistersModel and DINOv3ViTModel in the names of versions 4 and 5;
  Swin of Microsoft, EsViT and timm; ResNets of torchvision and timm;
  EfficientNet-Lite of efficientnet_lite_pytorch, which keeps its names;
  Google's ViTs, by `google_vit`.

  Args:
    tensors: state dict without prefixes other than Hugging Face's.

  Returns:
    The renamed state dict.

  Raises:
    UserError: an unknown family, or a part that our encoders do not have.
  """
  tensors = _without_numbers(_without_wrapper(tensors))
  family, architecture = _find_family(list(tensors))
  num_heads, notes = None, []
  if architecture == 'swin':
    renamed = swin.from_official(tensors)
  elif architecture in ('resnet', 'efficientnet'):
    renamed = dict(tensors)
  else:
    try:
      num_heads = _heads_by_periods(tensors)
      if family == google_vit.FAMILY:
        tensors, num_heads, notes = google_vit.to_timm(tensors)
      renamed, more = _from_vit(tensors, family)
      notes += more
    except (LookupError, TypeError, ValueError) as error:
      raise UserError(
        f'the tensors of the file ({family}) do not fit together '
        f'({one_line(error)}): '
        'fetch it again'
      ) from error
  _refuse_parts(renamed, _UNSUPPORTED)
  if any('mask_token' in name for name in renamed):
    notes.append('mask_token is of use in pre-training only: it was left out')
  kept = {n: x for n, x in renamed.items() if not _IGNORED.search(n)}
  return Renamed(family, architecture, kept, tuple(notes), num_heads)
