"""A network as a file of weights."""

from __future__ import annotations

import json
import pathlib

import jax

from cmd_jax.convert import save
from cmd_jax.export.network import Network


def export_weights(network: Network, path: pathlib.Path) -> str:
  """Writes an encoder in timm's naming, adapters merged in.

  How it was trained and the preprocessing are in the file's metadata.

  Args:
    network: whose encoder; attention has no place in timm's classes.
    path: of the file, ending in .safetensors.

  Returns:
    The constructor of the class that loads it, see `save.timm_constructor`.

  Raises:
    UserError: a directory that cannot be written.
  """
  encoder = network.encoder
  save.save_encoder(
    path,
    encoder.module,
    jax.device_get(encoder.variables),
    metadata={
      **network.training,
      'preprocessing': json.dumps(encoder.preprocessing),
    },
  )
  return save.timm_constructor(encoder.module)
