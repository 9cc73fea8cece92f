"""The feature maps that part segmentation decodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from cmd_jax.errors import UserError
from cmd_jax.models.resnet import ResNet
from cmd_jax.models.vit import VisionTransformer, encode_with_keys

FACETS = ('token', 'key')


def check_facet(
  encoder: nn.Module,
  facet: str,
  field: str = 'config.eval.segmentation.facet',
) -> None:
  """Raises UserError, naming the field, for what the encoder does not have."""
  if facet not in FACETS:
    raise UserError(f'{field} is {facet!r}: choose one of {", ".join(FACETS)}')
  if facet == 'key' and not isinstance(encoder, VisionTransformer):
    raise UserError(
      f"{field} is 'key', which needs --config=FILE:encoder=vit: use 'token'"
    )


def feature_map(
  encoder: nn.Module,
  variables: Mapping[str, Any],
  images: jax.Array,
  facet: str = 'token',
) -> jax.Array:
  """What a frozen encoder says of every place of an image.

  Of a residual network the last stage, computed at the stride of the one before
  (PARTICLE's evaluation/fcn.py); of the others the tokens, or a ViT's keys. The
  released head for ViT takes the keys of the first head of the last block
  alone (evaluation/fcn_dino.py); here all heads are taken, and tokens are the
  default, because they are what the loss trains.

  Args:
    encoder: the encoder.
    variables: of the encoder.
    images: [B, H, W, 3] normalised and square.
    facet: one of `FACETS`; 'key' is for ViT alone.

  Returns:
    [B, h, w, C].
  """
  if isinstance(encoder, ResNet):
    wider = encoder.clone(last_stride=1)
    return wider.apply(variables, images, method='stages')[-1]
  if facet == 'key':
    _, features = encode_with_keys(encoder, variables, images)
  else:
    features = encoder.apply(variables, images).tokens
  side = round(features.shape[1] ** 0.5)
  return features.reshape(len(images), side, side, -1)
