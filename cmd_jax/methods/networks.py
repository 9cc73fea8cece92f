"""The networks of a method and how they are applied to views."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cmd_jax.methods.base import Params, Setting
from cmd_jax.models import partial
from cmd_jax.models.heads import PrototypeHead, PrototypeWeights
from cmd_jax.models.layers import EncoderOutput, images_like

# Running batch statistics by module.
Stats = Mapping[str, Any]


class Networks(NamedTuple):
  """The modules of one network; the teacher has the same.

  Attributes:
    encoder: images -> `EncoderOutput`.
    image_head: g_I, image embedding -> logits over prototypes; None without
      an image term.
    region_head: g_R, tokens -> logits over prototypes; None without regions.
    mil: tokens -> attention; None where bags are not pooled by attention.
    shared_prototypes: g_R ends in g_I's last layer instead of its own.
    lora_rank: rank of the encoder's adapters; 0 for none.
    lora_scale: what their product is multiplied by.
  """

  encoder: nn.Module
  image_head: nn.Module | None
  region_head: nn.Module | None = None
  mil: nn.Module | None = None
  shared_prototypes: bool = False
  lora_rank: int = 0
  lora_scale: float = 1.0

  @property
  def encoder_normalises_by_batch(self) -> bool:
    """Whether what the encoder says of an image depends on its batch."""
    if getattr(self.encoder, 'batch_statistics', '') == 'frozen':
      return False
    image = images_like(self.encoder, 64)
    variables = jax.eval_shape(self.encoder.init, jax.random.key(0), image)
    return 'batch_stats' in variables


class ViewFeatures(NamedTuple):
  """What one network says of the views of one size, prototypes aside.

  Attributes:
    embedding: [B, V, D] of the image.
    image_bottleneck: [B, V, d] of the image head, of length 1; None without.
    features: [B, V, N, D] tokens of the encoder.
    region_bottleneck: [B, V, N, d] of the region head; None without one.
    attention: [B, V, N] of the network's MIL head; None without one.
  """

  embedding: jax.Array
  image_bottleneck: jax.Array | None
  features: jax.Array
  region_bottleneck: jax.Array | None
  attention: jax.Array | None


class Prototypes(NamedTuple):
  """The last layers of a network's heads.

  Attributes:
    image: [d, K]; None without an image head.
    region: [d, K]; None without a region head.
  """

  image: PrototypeWeights | None
  region: PrototypeWeights | None


def make_networks(
  setting: Setting,
  *,
  regions: bool,
  has_image_head: bool = True,
  mil: nn.Module | None = None,
  shared_prototypes: bool = False,
) -> Networks:
  """An encoder and its heads, which compute in the encoder's dtype.

  Args:
    setting: with the encoder, and the arguments of `PrototypeHead`, both for
      images and for regions.
    regions: whether there is a region head.
    has_image_head: whether there is an image head.
    mil: tokens -> attention.
    shared_prototypes: both heads end in the same prototypes.
  """

  def make_head():
    return PrototypeHead(
      dtype=setting.encoder.dtype, axis_name=setting.axis_name, **setting.head
    )

  lora = setting.lora
  return Networks(
    setting.encoder,
    make_head() if has_image_head else None,
    make_head() if regions else None,
    mil,
    shared_prototypes,
    lora_rank=lora['rank'],
    lora_scale=lora['alpha'] / max(lora['rank'], 1),
  )


def init_networks(
  networks: Networks, rng: jax.Array, image_px: int
) -> tuple[Params, Stats]:
  """Initial parameters and batch statistics, an entry for each module."""
  names = ('encoder', 'image_head', 'region_head', 'mil')
  rngs = dict(zip(names, jax.random.split(rng, len(names)), strict=True))
  image = jnp.zeros(images_like(networks.encoder, image_px).shape)
  variables = {'encoder': networks.encoder.init(rngs['encoder'], image)}
  output = jax.eval_shape(networks.encoder.apply, variables['encoder'], image)
  for name, like in (
    ('image_head', output.image),
    ('region_head', output.tokens),
    ('mil', output.tokens),
  ):
    module = getattr(networks, name)
    if module is not None:
      variables[name] = module.init(rngs[name], jnp.zeros(like.shape))
  # Attention by strength has none.
  params = {k: x['params'] for k, x in variables.items() if 'params' in x}
  if networks.shared_prototypes:
    del params['region_head']['last_layer']
  if networks.lora_rank:
    params['lora'] = partial.init_lora(
      jax.random.fold_in(rng, len(names)), params['encoder'], networks.lora_rank
    )
  stats = {
    name: value['batch_stats']
    for name, value in variables.items()
    if 'batch_stats' in value
  }
  return params, stats


def encoder_variables(
  networks: Networks, params: Params, stats: Stats
) -> dict[str, Any]:
  """What the encoder is applied to, adapters merged in."""
  encoder_params = params['encoder']
  if networks.lora_rank:
    encoder_params = partial.merge_lora(
      encoder_params, params['lora'], networks.lora_scale
    )
  variables = {'params': encoder_params}
  if 'encoder' in stats:
    variables['batch_stats'] = stats['encoder']
  return variables


def _concatenate_rows(arrays: Sequence[jax.Array]) -> jax.Array:
  """[B, ..., D] arrays as one [B, rows, D], each example on its device."""
  return jnp.concatenate(
    [x.reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1]) for x in arrays],
    axis=1,
  )


def _split_rows(rows: jax.Array, shapes: Sequence) -> list[jax.Array]:
  """Undoes `_concatenate_rows` for arrays of the given leading shapes."""
  ends = np.cumsum([math.prod(shape[1:]) for shape in shapes])
  return [
    part.reshape(*shape, rows.shape[-1])
    for part, shape in zip(jnp.split(rows, ends[:-1], axis=1), shapes)
  ]


def _apply_heads(
  networks: Networks,
  params: Params,
  stats: Stats,
  encoded: Sequence[EncoderOutput],
) -> tuple[list[ViewFeatures], Stats]:
  """Heads on [B, V, ...] outputs; each sees the views of all sizes at once."""
  new_stats = {}

  def head(name, arrays):
    variables = {'params': params[name]}
    if name in stats:
      variables['batch_stats'] = stats[name]
    features, updated = getattr(networks, name).apply(
      variables,
      _concatenate_rows(arrays),
      train=True,
      mutable=['batch_stats'],
      method='bottleneck',
    )
    if name in stats:
      new_stats[name] = updated['batch_stats']
    return _split_rows(features, [x.shape[:-1] for x in arrays])

  of_image = of_region = attention = [None] * len(encoded)
  if networks.image_head is not None:
    of_image = head('image_head', [x.image for x in encoded])
  if networks.region_head is not None:
    of_region = head('region_head', [x.tokens for x in encoded])
  if networks.mil is not None:
    attention = [
      networks.mil.apply({'params': params.get('mil', {})}, x.tokens)
      for x in encoded
    ]
  outputs = [
    ViewFeatures(x.image, image, x.tokens, region, weights)
    for x, image, region, weights in zip(
      encoded, of_image, of_region, attention, strict=True
    )
  ]
  return outputs, new_stats


def prototypes_of(networks: Networks, params: Params) -> Prototypes:
  """The prototypes of a network's heads."""

  def prototypes(name, owner):
    head = getattr(networks, name)
    if head is None:
      return None
    last_layer = {'last_layer': params[owner]['last_layer']}
    return head.apply({'params': last_layer}, method='prototypes')

  owner = 'image_head' if networks.shared_prototypes else 'region_head'
  return Prototypes(
    prototypes('image_head', 'image_head'), prototypes('region_head', owner)
  )


def apply_networks(
  networks: Networks,
  params: Params,
  stats: Stats,
  views: Sequence[jax.Array],
  uniforms: Sequence[jax.Array] | None = None,
) -> tuple[tuple[ViewFeatures, ...], Stats]:
  """Runs one network in training, the views of a size in one batch.

  Args:
    networks: the modules.
    params: their parameters.
    stats: their running batch statistics.
    views: [B, V, H, W, 3] of each size.
    uniforms: [B, V, depth, 2] of each size, draws for stochastic depth; None
      turns it off.

  Returns:
    What it says of each size, and the updated statistics.
  """
  variables = encoder_variables(networks, params, stats)
  encoded = []
  for index, images in enumerate(views):
    batch, num_views = images.shape[:2]
    draws = None
    if uniforms is not None:
      draws = uniforms[index]
      draws = draws.reshape(batch * num_views, *draws.shape[2:])
    with jax.named_scope('encoder'):
      output, updated = networks.encoder.apply(
        variables,
        images.reshape(batch * num_views, *images.shape[2:]),
        draws,
        train=True,
        mutable=['batch_stats'],
      )
    # The next size goes on from the statistics that this one leaves.
    variables = {**variables, **updated}
    encoded.append(
      EncoderOutput(
        *(
          None if x is None else x.reshape(batch, num_views, *x.shape[1:])
          for x in output
        )
      )
    )
  with jax.named_scope('heads'):
    outputs, new_stats = _apply_heads(networks, params, stats, encoded)
  if 'batch_stats' in variables:
    new_stats['encoder'] = variables['batch_stats']
  return tuple(outputs), jax.lax.stop_gradient(new_stats)


def draw_uniforms(
  keys: jax.Array, size_index: int, num_views: int, depth: int
) -> jax.Array:
  """[B, V, depth, 2] draws that depend on the example's key alone."""

  def draw(key):
    key = jax.random.fold_in(key, size_index)
    return jax.random.uniform(key, (num_views, depth, 2))

  return jax.vmap(draw)(keys)
