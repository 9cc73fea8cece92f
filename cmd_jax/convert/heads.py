"""Prototype heads in the naming of DINO's and EsViT's DINOHead."""

from __future__ import annotations

from cmd_jax.convert.entries import LINEAR, Entry, batch_norm, linear
from cmd_jax.models.heads import PrototypeHead


def entries(head: PrototypeHead, prefix: str = '') -> list[Entry]:
  """The table of a head.

  Args:
    head: the module.
    prefix: what precedes the names in the state dict, such as 'head.'.
  """
  table = []
  # A Sequential of linear layer, normalisation if any, activation; a single
  # layer is no Sequential there.
  stride = 3 if head.use_bn else 2
  for index in range(head.num_layers):
    name = f'{prefix}mlp.{stride * index}'
    if head.num_layers == 1:
      name = f'{prefix}mlp'
    table += linear(f'mlp_{index}', name)
    if head.use_bn and index < head.num_layers - 1:
      table += batch_norm(f'bn_{index}', f'{prefix}mlp.{stride * index + 1}')
  keys = ('params', 'last_layer')
  name = f'{prefix}last_layer'
  table.append(Entry((*keys, 'weight_v'), f'{name}.weight_v', LINEAR))
  if not head.norm_last_layer:
    table.append(Entry((*keys, 'weight_g'), f'{name}.weight_g', LINEAR))
  return table
