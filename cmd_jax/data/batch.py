"""What a step sees of its images: a batch, and the views made of it."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Batch(NamedTuple):
  """A batch before augmentation.

  Attributes:
    images: [B, R, R, 3] uint8 canvases.
    sizes: [B, 2] int32 height and width of the originals in pixels.
    index: [B] int32 number of the example in its data set; it alone keys the
      example's randomness within a step.
    part_ids: [B, R, R] uint8 part of every pixel; None for a method without
      parts.
    labels: [B] int32 class of each example; None for a method without labels.
    partners: [B, R, R, 3] uint8 canvases of other images that are taken for the
      same thing, of which half of an example's views are made; None without.
    partner_sizes: [B, 2] int32, of their originals.
  """

  images: jax.Array
  sizes: jax.Array
  index: jax.Array
  part_ids: jax.Array | None = None
  labels: jax.Array | None = None
  partners: jax.Array | None = None
  partner_sizes: jax.Array | None = None


class MultiStepBatch(NamedTuple):
  """The batches of several steps that are taken in one call.

  Attributes:
    batch: n batches, [n, B, ...].
    count: scalar int32, steps to take; the batches after those are not used.
  """

  batch: Batch
  count: jax.Array


class Views(NamedTuple):
  """The augmented views of a batch, normalised; [B, V, H, W, 3] float32.

  Attributes:
    global_views: [B, 2, G, G, 3] float32.
    local_views: [B, L, H, W, 3] float32; None or L = 0 without.
    global_boxes: [B, 2, 4] float32 top, left, bottom, right of the crops as
      fractions of the original, hence also of the canvas.
    local_boxes: [B, L, 4] float32.
    global_flips: [B, 2] bool, mirrored horizontally after the crop.
    local_flips: [B, L] bool.
    global_part_ids: [B, 2, G, G] uint8 parts in the global views; None without.
    labels: [B] int32 class of each example; None for a method without labels.
  """

  global_views: jax.Array
  local_views: jax.Array | None = None
  global_boxes: jax.Array | None = None
  local_boxes: jax.Array | None = None
  global_flips: jax.Array | None = None
  local_flips: jax.Array | None = None
  global_part_ids: jax.Array | None = None
  labels: jax.Array | None = None

  @property
  def sizes(self) -> tuple[jax.Array, ...]:
    """The views of each size that there are, the global ones first."""
    if self.local_views is None or not self.local_views.shape[1]:
      return (self.global_views,)
    return self.global_views, self.local_views
