"""The feature maps that part segmentation decodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from cmd_jax.models.resnet import ResNet


def feature_map(
  encoder: nn.Module, variables: Mapping[str, Any], images: jax.Array
) -> jax.Array:
  """What a frozen encoder says of every place of an image.

  Of a residual network the last stage, computed at the stride of the one before
  (PARTICLE's evaluation/fcn.py); of the others the tokens. The released head
  for ViT takes the keys of the first head of the last block instead
  (evaluation/fcn_dino.py), which no term of the loss trains to tell parts.

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
  features = encoder.apply(variables, images).tokens
  side = round(features.shape[1] ** 0.5)
  return features.reshape(len(images), side, side, -1)
