"""The small networks of the fixtures and their released state dicts."""

from typing import NamedTuple

from flax import linen as nn

from cmd_jax.convert import entries, heads, swin, vit
from cmd_jax.models.heads import PrototypeHead
from cmd_jax.models.swin import make_swin
from cmd_jax.models.vit import make_vit

ENCODERS = ('vit', 'swin')


class Small(NamedTuple):
  """An encoder with its heads.

  Attributes:
    encoder: the module.
    head: the module of both heads.
    tables: entries of every module of a method's parameters.
  """

  encoder: nn.Module
  head: PrototypeHead
  tables: dict

  def to_params(self, tensors):
    """A method's parameters out of a released state dict."""
    tensors = swin.from_official(tensors)
    return {
      name: entries.from_torch(table, tensors)['params']
      for name, table in self.tables.items()
    }

  def to_tensors(self, params):
    """A state dict, in timm's naming of the encoder."""
    tensors = {}
    for name, table in self.tables.items():
      tensors |= entries.to_torch(table, {'params': params[name]})
    return tensors


def make_small(name, *, norm_last_layer=False, regions=True):
  if name == 'vit':
    encoder = make_vit(
      variant='Mu',
      image_px=32,
      patch_px=8,
      width=48,
      depth=2,
      num_heads=3,
      drop_path_rate=0.0,
    )
    table = vit.entries(encoder)
  else:
    encoder = make_swin(
      variant='Mu',
      image_px=32,
      patch_px=2,
      window=4,
      width=24,
      depths=(2, 2),
      num_heads=(2, 4),
      drop_path_rate=0.0,
    )
    table = swin.entries(encoder)
  head = PrototypeHead(
    num_prototypes=64,
    hidden_dim=96,
    bottleneck_dim=24,
    norm_last_layer=norm_last_layer,
  )
  tables = {'encoder': table, 'image_head': heads.entries(head, 'head.')}
  if regions:
    tables['region_head'] = heads.entries(head, 'head_dense.')
  return Small(encoder, head, tables)
