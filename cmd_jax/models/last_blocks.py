"""The features of the last blocks, which DINO's and EsViT's probes see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cmd_jax.models.efficientnet import EfficientNet
from cmd_jax.models.layers import wide
from cmd_jax.models.resnet import ResNet
from cmd_jax.models.vit import VisionTransformer


def last_blocks(
  encoder: nn.Module,
  variables: Mapping[str, Any],
  images: jax.Array,
  count: int = 4,
) -> jax.Array:
  """What the last blocks say of images, concatenated.

  Of a ViT, the class token of every block after the final norm
  (`get_intermediate_layers` of DINO's vision_transformer.py), or the mean of
  its patches where the encoder pools so. Of a Swin, the mean of every block's
  tokens, the last stage's after the final norm
  (`forward_return_n_last_blocks` of EsViT's swin_transformer.py). Of a ResNet,
  its embedding, as there, and of an EfficientNet alike.

  Args:
    encoder: the encoder.
    variables: of the encoder.
    images: [B, H, W, 3] normalised.
    count: blocks, from the last; all where there are fewer.

  Returns:
    [B, features] float32.
  """
  if isinstance(encoder, ResNet | EfficientNet):
    return encoder.apply(variables, images).image
  names = encoder.block_names[-count:]
  _, state = encoder.apply(
    variables,
    images,
    # The blocks themselves, not the layers within them.
    capture_intermediates=lambda module, _: (
      len(module.path) == 1 and module.name in names
    ),
    mutable=['intermediates'],
  )
  norm = nn.LayerNorm(encoder.norm_epsilon, dtype=wide(encoder.dtype))
  norm_params = {'params': variables['params']['norm']}

  def pooled(name: str) -> jax.Array:
    ((x, _),) = state['intermediates'][name]['__call__']
    if isinstance(encoder, VisionTransformer):
      x = norm.apply(norm_params, x)
      if encoder.pool == 'cls':
        return x[:, 0]
      return x[:, encoder.num_prefix :].mean(1)
    last_stage = f'stage_{len(encoder.depths) - 1}_'
    if name.startswith(last_stage):
      x = norm.apply(norm_params, x)
    return x.mean((1, 2))

  return jnp.concatenate(
    [pooled(name).astype(jnp.float32) for name in names], axis=-1
  )
