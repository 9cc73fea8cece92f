"""An encoder as StableHLO, which JAX runs without this package."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from cmd_jax.api import Encoder
from cmd_jax.data.augment.multi_crop import make_eval_view
from cmd_jax.data.channels import dtype_of
from cmd_jax.export.function import make_function

PLATFORMS = ('cpu', 'cuda', 'tpu')


def to_stablehlo(
  encoder: Encoder, *, attention: bool = False, canvases: bool = False
) -> jax.export.Exported:
  """Exports an encoder, weights and all, for batches of any size.

  Args:
    encoder: the encoder.
    attention: see `function.make_function`.
    canvases: takes canvases [B, R, R, 3] uint8 and the sizes [B, 2] int32 of
      their images, of which it makes the views itself, in place of the views
      [B, H, W, 3] float32.

  Returns:
    What `jax.export.deserialize` gives back of its `serialize()`.

  Raises:
    UserError: attention is wanted of an encoder that has none.
  """
  function, variables = make_function(encoder, attention=attention)
  preprocessing = encoder.preprocessing
  channels = preprocessing.get('channels', 3)
  (batch,) = jax.export.symbolic_shape('batch')
  if canvases:
    view = make_eval_view(
      view_px=preprocessing['view_px'],
      crop_fraction=preprocessing['crop_fraction'],
      mean=tuple(preprocessing['mean']),
      std=tuple(preprocessing['std']),
    )
    one_view = jax.vmap(lambda canvas, size: view(canvas[None], size[None])[0])

    def encode(images, sizes):
      return function(variables, one_view(images, sizes))

    side = preprocessing['canvas_px']
    arguments = (
      jax.ShapeDtypeStruct((batch, side, side, channels), dtype_of(channels)),
      jax.ShapeDtypeStruct((batch, 2), jnp.int32),
    )
  else:

    def encode(images):
      return function(variables, images)

    side = preprocessing['view_px']
    shape = (batch, side, side, channels)
    arguments = (jax.ShapeDtypeStruct(shape, jnp.float32),)
  return jax.export.export(jax.jit(encode), platforms=PLATFORMS)(*arguments)


def describe_stablehlo(exported: jax.export.Exported) -> dict[str, Any]:
  """What goes in and comes out, for `preprocessing.describe`."""

  def tensor(name, like):
    shape = [d if isinstance(d, int) else str(d) for d in like.shape]
    return {'name': name, 'shape': shape, 'dtype': like.dtype.name}

  names = ('images',) if len(exported.in_avals) == 1 else ('canvases', 'sizes')
  inputs = list(map(tensor, names, exported.in_avals))
  inputs[0]['layout'] = 'NHWC'
  outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
  return {
    'inputs': inputs,
    'outputs': [tensor(name, like) for name, like in outputs.items()],
    'platforms': list(exported.platforms),
    'calling_convention': exported.calling_convention_version,
  }
