"""Encoders and heads as Flax modules."""

from __future__ import annotations

import inspect

import jax
from flax import linen as nn

from cmd_jax.errors import UserError


def make_encoder(
  name: str,
  *,
  axis_name: str | None = None,
  device: jax.Device | None = None,
  **kwargs,
) -> nn.Module:
  """Builds an encoder: images [B, H, W, 3] -> `layers.EncoderOutput`.

  Args:
    name: a key of the dictionary below.
    axis_name: axis over which the batch is spread, None if it is global.
    device: where it is trained, which need not be here; the first of this
      process without.
    **kwargs: arguments of that encoder's factory.

  Raises:
    UserError: unknown name, or a value that the factory refuses.
  """
  from cmd_jax.models import efficientnet, resnet, swin, vit

  encoders = {
    'vit': vit.make_vit,
    'swin': swin.make_swin,
    'resnet': resnet.make_resnet,
    'efficientnet': efficientnet.make_efficientnet,
  }
  if name not in encoders:
    raise UserError(
      f'config.model.name is {name!r}: choose one of {", ".join(encoders)}'
    )
  known = inspect.signature(encoders[name]).parameters
  unknown = [field for field in kwargs if field not in known]
  if unknown:
    raise UserError(
      f'config.model has {", ".join(unknown)}, which a {name} lacks: use '
      f'--config=FILE:encoder={name}'
    )
  if name in ('resnet', 'efficientnet'):
    # Batch normalisation alone looks across the batch.
    kwargs['axis_name'] = axis_name
  encoder = encoders[name](**kwargs)
  # A ViT alone chooses by it who computes its attention.
  return encoder.clone(device=device) if name == 'vit' else encoder
