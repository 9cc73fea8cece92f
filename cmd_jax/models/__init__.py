"""Encoders and heads as Flax modules."""

from __future__ import annotations

from flax import linen as nn

from cmd_jax.errors import UserError


def make_encoder(name: str, **kwargs) -> nn.Module:
  """Builds an encoder: images [B, H, W, 3] -> `vit.EncoderOutput`.

  Args:
    name: a key of the dictionary below.
    **kwargs: arguments of that encoder's factory.

  Raises:
    UserError: unknown name, or a value that the factory refuses.
  """
  from cmd_jax.models import vit

  encoders = {'vit': vit.make_vit}
  if name not in encoders:
    raise UserError(
      f'config.model.name is {name!r}: choose one of {", ".join(encoders)}'
    )
  return encoders[name](**kwargs)
