"""What a program without this package must know to use an exported network."""

from __future__ import annotations

from typing import Any

import jax

import cmd_jax
from cmd_jax.api import Encoder
from cmd_jax.export.function import ATTENTION

_CANVAS = (
  "Decode the image, a JPEG with Pillow's draft(None, (canvas_px, canvas_px)), "
  'turn it upright and to RGB, and squash all of it to canvas_px x canvas_px '
  "with Pillow's resize, BICUBIC and with a reducing_gap of 3."
)
_DEEP_CANVAS = (
  'Decode the image, turn it upright, scale its channels such that white is '
  '65535, and squash all of it to canvas_px x canvas_px, channel by channel '
  "with Pillow's resize of mode F, BICUBIC and with a reducing_gap of 3."
)
_CROP = (
  'Of the canvas take the centre that shows the central square of the image, '
  "whose side is crop_fraction of the image's shorter side."
)
_VIEW = (
  'Resize that to view_px x view_px, bicubic and antialiased, divide by 255, '
  'subtract mean and divide by std.'
)


def describe_preprocessing(
  encoder: Encoder, *, canvases: bool = False
) -> dict[str, Any]:
  """Sizes, constants and the rule by which an image becomes an input.

  Args:
    encoder: what is exported.
    canvases: the exported function takes canvases and makes the views itself.
  """
  fields = encoder.preprocessing
  is_photograph = 'channels' not in fields
  steps = [_CANVAS if is_photograph else _DEEP_CANVAS]
  if not canvases:
    steps += [_CROP] if fields['crop_fraction'] else []
    steps.append(_VIEW if is_photograph else _VIEW.replace('255', '65535'))
  colours = {'colours': 'RGB'} if is_photograph else {}
  return fields | colours | {'interpolation': 'bicubic', 'steps': steps}


def describe(
  encoder: Encoder, *, canvases: bool = False, **signature: Any
) -> dict[str, Any]:
  """The sidecar of an exported encoder, without the name of its file.

  Args:
    encoder: what was exported.
    canvases: see `describe_preprocessing`.
    **signature: what goes in and comes out, and what the format tells.
  """
  for output in signature['outputs']:
    if output['name'] == ATTENTION:
      side = round(output['shape'][1] ** 0.5)
      output['grid'] = [side, side]
      has_mil = encoder.network.mil is not None
      output['kind'] = 'multi-instance' if has_mil else "the encoder's own"
  classifier = encoder.classifier
  return {
    'source': encoder.source,
    'training': encoder.training,
    **({} if classifier is None else {'classifier': classifier.describe()}),
    'encoder_sha256': encoder.hash,
    **signature,
    'preprocessing': describe_preprocessing(encoder, canvases=canvases),
    'versions': {'cmd_jax': cmd_jax.__version__, 'jax': jax.__version__},
  }
