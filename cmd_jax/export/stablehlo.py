"""A network as StableHLO, which JAX runs without this package."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cmd_jax.data.augment import make_eval_view
from cmd_jax.export.network import Network, make_function

PLATFORMS = ('cpu', 'cuda', 'tpu')


def to_stablehlo(
  network: Network, *, attention: bool = False, canvases: bool = False
) -> bytes:
  """Serialises a network, weights and all, for batches of any size.

  Args:
    network: the network.
    attention: see `network.make_function`.
    canvases: takes canvases [B, R, R, 3] uint8 and the sizes [B, 2] int32 of
      their images, of which it makes the views itself, in place of the views
      [B, H, W, 3] float32.

  Returns:
    What `jax.export.deserialize` reads.

  Raises:
    UserError: attention is wanted of a network that has none.
  """
  encode = make_function(network, attention=attention)
  preprocessing = network.encoder.preprocessing
  (batch,) = jax.export.symbolic_shape('batch')
  if canvases:
    view = make_eval_view(
      view_px=preprocessing['view_px'],
      crop_fraction=preprocessing['crop_fraction'],
    )
    one_view = jax.vmap(lambda canvas, size: view(canvas[None], size[None])[0])
    side = preprocessing['canvas_px']
    function = jax.jit(lambda images, sizes: encode(one_view(images, sizes)))
    arguments = (
      jax.ShapeDtypeStruct((batch, side, side, 3), jnp.uint8),
      jax.ShapeDtypeStruct((batch, 2), jnp.int32),
    )
  else:
    side = preprocessing['view_px']
    function = jax.jit(encode)
    arguments = (jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32),)
  exported = jax.export.export(function, platforms=PLATFORMS)(*arguments)
  return bytes(exported.serialize())
