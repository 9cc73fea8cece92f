"""The feature maps that part segmentation decodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from cmd_jax.models.resnet import ResNet
from cmd_jax.models.vit import VisionTransformer, encode_with_keys


def feature_map(
  encoder: nn.Module, variables: Mapping[str, Any], images: jax.Array
) -> jax.Array:
  """What a frozen encoder says of every place of an image.

  As PARTICLE's segmentation heads take them: of a residual network the last
  stage, computed at the stride of the one before (evaluation/fcn.py); of a ViT
  the keys of the last block, here of all heads (evaluation/fcn_dino.py takes
  the first); of a Swin the tokens.

  Args:
    encoder: the encoder.
    variables: of the encoder.
    images: [B, H, W, 3] normalised and square.

  Returns:
    [B, h, w, C].
  """
  if isinstance(encoder, ResNet):
    wider = encoder.clone(last_stride=1)
    return wider.apply(variables, images, method='stages')[-1]
  if isinstance(encoder, VisionTransformer):
    _, features = encode_with_keys(encoder, variables, images)
    features = features.reshape(*features.shape[:2], -1)
  else:
    features = encoder.apply(variables, images).tokens
  side = round(features.shape[1] ** 0.5)
  return features.reshape(len(images), side, side, -1)
