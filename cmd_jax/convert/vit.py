"""Vision transformers in the naming of timm, DINO and DINOv2."""

from __future__ import annotations

from cmd_jax.convert.entries import PATCHES, Entry, linear, norm
from cmd_jax.models.vit import VisionTransformer


def entries(encoder: VisionTransformer) -> list[Entry]:
  """The table of an encoder."""
  table = []
  if encoder.class_token:
    table.append(Entry(('params', 'cls_token'), 'cls_token'))
  if encoder.positions == 'learned':
    table.append(Entry(('params', 'pos_embed'), 'pos_embed'))
  if encoder.num_registers:
    table.append(Entry(('params', 'reg_token'), 'reg_token'))
  keys, name = ('params', 'patch_embed'), 'patch_embed.proj'
  table += [
    Entry((*keys, 'kernel'), f'{name}.weight', PATCHES),
    Entry((*keys, 'bias'), f'{name}.bias'),
  ]
  for index in range(encoder.depth):
    block, name = f'block_{index}', f'blocks.{index}'
    table += norm(f'{block}/norm1', f'{name}.norm1')
    table += linear(f'{block}/attn/qkv', f'{name}.attn.qkv')
    table += linear(f'{block}/attn/proj', f'{name}.attn.proj')
    table += norm(f'{block}/norm2', f'{name}.norm2')
    table += linear(f'{block}/mlp/fc1', f'{name}.mlp.fc1')
    table += linear(f'{block}/mlp/fc2', f'{name}.mlp.fc2')
    if encoder.layer_scale:
      table += [
        Entry(
          ('params', block, f'ls{which}', 'gamma'), f'{name}.ls{which}.gamma'
        )
        for which in (1, 2)
      ]
  return table + norm('norm', 'norm')
