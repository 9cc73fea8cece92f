"""An encoder as a file of weights."""

from __future__ import annotations

import json
import pathlib

import jax

from cmd_jax.api import Encoder
from cmd_jax.convert import save


def export_weights(encoder: Encoder, path: pathlib.Path) -> str:
  """Writes an encoder in timm's naming, adapters merged in.

  How it was trained, the preprocessing and, of a fine-tuned one, `classifier`
  (class names, temperature, threshold) are in the file's metadata.

  Args:
    encoder: the encoder; attention has no place in timm's classes.
    path: of the file, ending in .safetensors.

  Returns:
    The constructor of the class that loads it, see `save.timm_constructor`.

  Raises:
    UserError: a directory that cannot be written.
  """
  metadata = {
    **encoder.training,
    'preprocessing': json.dumps(encoder.preprocessing),
  }
  layer, classifier = None, encoder.classifier
  if classifier is not None:
    layer = classifier.kernel, classifier.bias
    metadata['classifier'] = json.dumps(classifier.describe())
  save.save_encoder(
    path,
    encoder.module,
    jax.device_get(encoder.variables),
    metadata=metadata,
    classifier=layer,
  )
  num_classes = 0 if layer is None else len(classifier.class_names)
  return save.timm_constructor(encoder.module, num_classes)
