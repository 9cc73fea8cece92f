"""What a frozen network says of images, computed on all devices."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from cmd_jax.data.augment import multi_crop
from cmd_jax.data.canvas import Canvases
from cmd_jax.data.channels import IMAGENET, Statistics
from cmd_jax.devices import sharding
from cmd_jax.evaluators.feature_cache import FeatureCache, hash_canvases
from cmd_jax.evaluators.features import Features, extract
from cmd_jax.models.feature_maps import feature_map
from cmd_jax.models.heads import MilAttention
from cmd_jax.models.last_blocks import last_blocks
from cmd_jax.models.layers import EncoderOutput
from cmd_jax.models.pooling import pooled
from cmd_jax.parts.store import hash_variables

# What the encoder, and `mil` if there is one, are applied to, by those names.
_Variables = Mapping[str, Any]
# Feature maps are some hundred times as large as embeddings.
_MAPS_BATCH_SIZE = 64


def compile_encode(
  encode: Callable, view: Callable, mesh: Mesh | None
) -> Callable:
  """What encodes canvases, compiled when it is first called.

  Args:
    encode: (variables, views [B, H, W, 3]) -> arrays [B, ...].
    view: (canvases [B, R, R, 3], sizes [B, 2]) -> views.
    mesh: the devices that share a batch; None where they do not.

  Returns:
    (variables, canvases, sizes) -> what `encode` gives.
  """

  def of_canvases(variables, images, sizes):
    return encode(variables, view(images, sizes))

  if mesh is None:
    return jax.jit(of_canvases)
  whole, split = sharding.replicated(mesh), sharding.sharded(mesh)
  return jax.jit(
    of_canvases, in_shardings=(whole, split, split), out_shardings=split
  )


class FrozenNetwork:
  """An encoder, the attention trained over it, and the view they are given.

  Nothing is computed before it is asked for, and what is asked for again of
  the same split is remembered.

  Attributes:
    encoder: the module, images [B, H, W, 3] -> `layers.EncoderOutput`.
    mil: multi-instance attention over its tokens; None without.
    batch_size: images encoded at once, by all devices together.
  """

  def __init__(
    self,
    encoder: nn.Module,
    variables: Mapping[str, Any],
    *,
    view_px: int,
    crop_fraction: float | None,
    batch_size: int,
    mil: nn.Module | None = None,
    mil_params: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    statistics: Statistics = IMAGENET,
  ):
    """Puts the variables on the devices.

    Args:
      encoder: the module.
      variables: what it is applied to, adapters merged in.
      view_px: side of the views that it is given.
      crop_fraction: side of the central square that a view shows, as a fraction
        of the image's shorter side; None shows the whole image.
      batch_size: images encoded at once, by all devices together; rounded up to
        a multiple of their number.
      mil: multi-instance attention over its tokens.
      mil_params: parameters of `mil`, if it has any.
      mesh: the devices; None for all.
      statistics: by which views are normalised.

    Raises:
      UserError: the view's size is wrong.
    """
    self._mesh = mesh or sharding.make_mesh()
    whole = sharding.replicated(self._mesh)
    self.encoder = encoder
    self.mil = mil
    self._variables = {'encoder': variables}
    if self.mil is not None:
      self._variables['mil'] = {'params': mil_params or {}}
    self._variables = jax.device_put(self._variables, whole)
    self.batch_size = self._shared_out(batch_size)
    self._view_px, self._crop_fraction = view_px, crop_fraction
    self._statistics = statistics
    self._view = self._make_view(view_px, crop_fraction)
    self._programs: dict[Any, Callable] = {}
    self._remembered: dict[Any, tuple[Canvases, Any]] = {}
    self._cache: FeatureCache | None = None

  @property
  def variables(self) -> Mapping[str, Any]:
    """What the encoder is applied to, on all devices."""
    return self._variables['encoder']

  @property
  def mil_variables(self) -> Mapping[str, Any] | None:
    """What `mil` is applied to; None without."""
    return self._variables.get('mil')

  @property
  def attention_name(self) -> str:
    """What `attend` gives, in words."""
    if isinstance(self.mil, MilAttention):
      return 'multi-instance attention'
    if self.mil is None and hasattr(self.encoder, 'num_heads'):
      return "the encoder's own attention"
    return "the length of each patch's features"

  @functools.cached_property
  def hash(self) -> str:
    """SHA-256 of the encoder's variables."""
    return hash_variables(jax.device_get(self.variables))

  def keep_features(self, folder: pathlib.Path, data_sha256: str) -> None:
    """From now on, vectors are kept in a folder and looked for there.

    Args:
      folder: made when something is kept.
      data_sha256: hash of the names and labels of the splits.
    """
    key = {
      'encoder_sha256': self.hash,
      'encoder': repr(self.encoder),
      'view_px': self._view_px,
      'crop_fraction': self._crop_fraction,
      'data_sha256': data_sha256,
    }
    self._cache = FeatureCache(folder, key)

  def embeddings(
    self, split: Canvases, *, view_px: int = 0, pooling: str = 'encoder'
  ) -> Features:
    """The embeddings of a split, [N, D] float32 and not normalised.

    Args:
      split: the images.
      view_px: side of the views; 0 for that of the other features.
      pooling: see `models.pooling.pooled`.
    """
    encode = self._pool(pooling)
    if pooling == 'encoder' and view_px in (0, self._view_px):
      return self._features(split, 'image', encode)
    view_px = view_px or self._view_px
    view = self._make_view(view_px, self._crop_fraction)
    return self._features(split, f'{pooling}_{view_px}', encode, view=view)

  def last_blocks(self, split: Canvases) -> Features:
    """The features of the last four blocks, see `models.last_blocks`."""
    return self._features(split, 'blocks', self._last_blocks)

  def feature_maps(
    self, split: Canvases, *, view_px: int | None = None, facet: str = 'token'
  ) -> np.ndarray:
    """What the encoder says of every place of the whole images.

    Args:
      split: the images.
      view_px: side of the views; None for that of the other features.
      facet: see `models.feature_maps.feature_map`.

    Returns:
      [N, h, w, C] float16, to halve the memory; rows and columns share out the
      canvases, and their part masks, evenly.
    """
    view_px = view_px or self._view_px

    def encode(variables, images):
      return feature_map(self.encoder, variables['encoder'], images, facet)

    return self._whole(
      split,
      f'maps of {facet} at {view_px}',
      encode,
      view_px=view_px,
      batch_size=self._shared_out(_MAPS_BATCH_SIZE),
      dtype=np.float16,
    )

  def attention(self, split: Canvases) -> dict[str, np.ndarray]:
    """Where the network looks in the whole images.

    Returns:
      [N, h * w] float32, row by row, for each of `mil`, the multi-instance
      attention, and `encoder`, the encoder's own, the mean over its heads, as
      far as the network has them.
    """
    found = {}
    if self.mil is not None:
      found['mil'] = self._whole(split, 'mil', self._attend)
    if hasattr(self.encoder, 'num_heads'):
      found['encoder'] = self._whole(split, 'attention', self._own_attention)
    return found

  def attend(self, images: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """What each patch of a few views counts to the network.

    Args:
      images: [B, R, R, 3] uint8 canvases; compiled for each B.
      sizes: [B, 2] int32 height and width of the originals in pixels.

    Returns:
      [B, h * w]: the multi-instance attention, which adds up to 1; without, the
      encoder's own; without that, the length of the patch's features.
    """
    program = self._program('attend', self._attend, self._view, shared=False)
    return np.asarray(program(self._variables, images, sizes))

  def embed(
    self, images: np.ndarray, sizes: np.ndarray, pooling: str = 'encoder'
  ) -> jax.Array:
    """The embeddings [B, D] of canvases, B a multiple of the devices.

    Args:
      images: as of `encode`.
      sizes: as of `encode`.
      pooling: see `models.pooling.pooled`.
    """
    # Compiled without what it doesn't return, tokens above all.
    return self._run(f'{pooling} pooled', self._pool(pooling), images, sizes)

  def encode(self, images: np.ndarray, sizes: np.ndarray) -> EncoderOutput:
    """All that the network says of canvases, B a multiple of the devices.

    Args:
      images: [B, R, R, 3] uint8.
      sizes: [B, 2] int32 height and width of the originals in pixels.

    Returns:
      The encoder's output, but for `attention` [B, h * w]: that of `mil`;
      without, the encoder's own, the mean over its heads, if it has any.
    """
    return self._run('outputs', self._outputs, images, sizes)

  # What is compiled: (variables, views [B, H, W, 3]) -> arrays [B, ...].

  def _pool(self, pooling: str) -> Callable:
    return lambda variables, images: pooled(
      self.encoder, variables['encoder'], images, pooling
    )

  def _last_blocks(self, variables: _Variables, images: jax.Array) -> jax.Array:
    return last_blocks(self.encoder, variables['encoder'], images)

  def _outputs(self, variables: _Variables, images: jax.Array) -> EncoderOutput:
    output = self.encoder.apply(variables['encoder'], images)
    attention = output.attention
    if self.mil is not None:
      attention = self.mil.apply(variables['mil'], output.tokens)
    elif attention is not None:
      attention = attention.mean(1)
    return output._replace(attention=attention)

  def _attend(self, variables: _Variables, images: jax.Array) -> jax.Array:
    output = self._outputs(variables, images)
    if output.attention is None:
      return jnp.linalg.norm(output.tokens, axis=-1)
    return output.attention

  def _own_attention(
    self, variables: _Variables, images: jax.Array
  ) -> jax.Array:
    output = self.encoder.apply(variables['encoder'], images)
    return output.attention.mean(1)

  def _features(
    self, split: Canvases, name: str, encode: Callable, **options: Any
  ) -> Features:
    def compute() -> dict[str, np.ndarray]:
      vectors = self._extract(split, name, encode, **options)
      # After the images were read: what is unreadable loses its label then.
      return {'vectors': vectors, 'labels': np.asarray(split.labels)}

    def look_up() -> Features:
      if self._cache is None:
        arrays = compute()
      else:
        arrays = self._cache.get(
          name,
          compute,
          split=split.name,
          canvases_sha256=self._once(
            split, 'sha256', lambda: hash_canvases(split)
          ),
        )
      return Features(
        arrays['vectors'], arrays['labels'], split.class_names, split.file_names
      )

    return self._once(split, name, look_up)

  def _whole(
    self,
    split: Canvases,
    name: str,
    encode: Callable,
    *,
    view_px: int | None = None,
    **options: Any,
  ) -> np.ndarray:
    """As `_extract`, once, of the whole images."""
    view = self._make_view(view_px or self._view_px, None)
    return self._once(
      split,
      name,
      lambda: self._extract(split, name, encode, view=view, **options),
    )

  def _once(self, split: Canvases, name: str, compute: Callable) -> Any:
    key = id(split), name
    if key not in self._remembered:
      # The split is kept as well, so that no other gets its address.
      self._remembered[key] = split, compute()
    return self._remembered[key][1]

  def _extract(
    self,
    split: Canvases,
    name: str,
    encode: Callable,
    *,
    view: Callable | None = None,
    batch_size: int | None = None,
    dtype: type = np.float32,
  ) -> np.ndarray:
    """[N, ...] of `encode(variables, views)` of a split."""
    return extract(
      lambda images, sizes: self._run(name, encode, images, sizes, view),
      split.images,
      split.sizes,
      batch_size=batch_size or self.batch_size,
      dtype=dtype,
      progress=True,
    )

  def _run(
    self,
    name: str,
    encode: Callable,
    images: np.ndarray,
    sizes: np.ndarray,
    view: Callable | None = None,
  ) -> Any:
    """`encode` of one batch, which the devices share out evenly."""
    program = self._program(name, encode, view or self._view, shared=True)
    # Put there by hand: where there are several processes, jit does not share
    # out what is in the host's memory.
    batch = jax.device_put((images, sizes), sharding.sharded(self._mesh))
    return program(self._variables, *batch)

  def _program(
    self, name: str, encode: Callable, view: Callable, *, shared: bool
  ) -> Callable:
    """The compiled function of that name; all splits have it in common.

    Args:
      name: of what is computed.
      encode: (variables, views) -> arrays [B, ...].
      view: (canvases, sizes) -> views.
      shared: whether the devices share the batch.
    """
    if name not in self._programs:
      mesh = self._mesh if shared else None
      self._programs[name] = compile_encode(encode, view, mesh)
    return self._programs[name]

  def _shared_out(self, batch_size: int) -> int:
    # Whole batches alone can be shared out evenly.
    return -(-batch_size // self._mesh.size) * self._mesh.size

  def _make_view(self, view_px: int, crop_fraction: float | None) -> Callable:
    return multi_crop.make_eval_view(
      view_px=view_px,
      crop_fraction=crop_fraction,
      **self._statistics._asdict(),
    )
