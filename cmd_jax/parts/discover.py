"""Finds the parts of all images of a set."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from cmd_jax.data.canvas import Canvases
from cmd_jax.errors import UserError
from cmd_jax.parts import cosegment
from cmd_jax.parts.features import KeyMaps
from cmd_jax.parts.kmeans import kmeans_of_maps
from cmd_jax.parts.store import Chunks, Manifest


class Hypercolumn(NamedTuple):
  """Clusters of the points of each image by themselves (PARTICLE, ResNet).

  Their ids mean nothing across images, and none is the background.

  Attributes:
    num_parts: clusters of an image, at most 256.
    grid_px: side of the grid of points.
    num_layers: maps of the hypercolumn.
  """

  num_parts: int = 15
  grid_px: int = 64
  num_layers: int = 4


Settings = Hypercolumn | cosegment.Cosegmentation


def as_json(settings: Settings) -> dict[str, Any]:
  """Settings as a manifest has them."""
  return {'kind': type(settings).__name__.lower(), **settings._asdict()}


def check_settings(settings: Settings) -> None:
  """Raises UserError for settings that no mask can have."""
  for field, value in settings._asdict().items():
    # A number of clusters of 0 leaves it to the data; False is no number.
    if field == 'num_clusters' and value == 0:
      continue
    if type(value) in (int, float) and value <= 0:
      raise UserError(
        f'config.parts.settings.{field} is {value}: it must be positive'
      )
  # One byte a pixel; co-segmentation has the background besides.
  most = 256 if isinstance(settings, Hypercolumn) else 255
  if settings.num_parts > most:
    raise UserError(
      f'config.parts.settings.num_parts is {settings.num_parts}: give at most '
      f'{most}'
    )


def resize_nearest(
  labels: np.ndarray, rows: np.ndarray, columns: np.ndarray, mask_px: int
) -> np.ndarray:
  """Gives every pixel the label of the nearest sample.

  Args:
    labels: [N, h, w].
    rows: [h] centres of the rows of samples as fractions of the height.
    columns: [w] centres of the columns as fractions of the width.
    mask_px: R.

  Returns:
    [N, R, R].
  """
  pixels = (np.arange(mask_px) + 0.5) / mask_px
  y, x = (
    np.abs(pixels[:, None] - np.asarray(centres)).argmin(1)
    for centres in (rows, columns)
  )
  return labels[:, y[:, None], x]


class _Batch(NamedTuple):
  name: str
  rows: np.ndarray
  kept: int


def _batches(count: int, batch_size: int) -> Iterator[_Batch]:
  """MultiStepBatch of one size; the last is filled up with its last image."""
  for start in range(0, count, batch_size):
    rows = np.arange(start, start + batch_size)
    kept = min(batch_size, count - start)
    name = f'{start:08d}-{start + kept:08d}'
    yield _Batch(name, np.minimum(rows, count - 1), kept)


class _Images(NamedTuple):
  """The images and how they are gone through.

  Attributes:
    encode: see `discover`.
    canvases: the images.
    batch_size: images at a time.
    chunks: results so far.
    seed: of everything random.
    progress: whether to show a bar.
  """

  encode: Callable
  canvases: Canvases
  batch_size: int
  chunks: Chunks
  seed: int
  progress: bool

  def keys(self, rows: np.ndarray) -> jax.Array:
    """[B] keys, each of its image alone."""
    root = jax.random.key(self.seed)
    return jax.vmap(lambda row: jax.random.fold_in(root, row))(rows)

  def each(
    self, what: str, compute: Callable[[Any, jax.Array], dict[str, jax.Array]]
  ) -> Iterator[tuple[_Batch, dict[str, np.ndarray]]]:
    """Encodes every batch and yields what `compute` makes of it.

    Args:
      what: title of the bar.
      compute: (encoded, keys [B]) -> arrays [B, ...] to keep.
    """
    count = len(self.canvases.images)
    bar = tqdm.tqdm(
      total=count, desc=what, unit=' images', disable=not self.progress
    )
    with bar:
      for batch in _batches(count, self.batch_size):

        def run(batch=batch):
          encoded = self.encode(
            self.canvases.images[batch.rows], self.canvases.sizes[batch.rows]
          )
          arrays = compute(encoded, self.keys(batch.rows))
          arrays = {name: np.asarray(x) for name, x in arrays.items()}
          for name, array in arrays.items():
            if not np.isfinite(array).all():
              raise UserError(
                f'{self.canvases.name}: the {name} of images {batch.rows[0]} '
                f'to {batch.rows[-1]} are not finite: use another checkpoint'
              )
          return {name: x[: batch.kept] for name, x in arrays.items()}

        yield batch, self.chunks.get(batch.name, run)
        bar.update(batch.kept)


def _cluster_each(images: _Images, settings: Hypercolumn) -> np.ndarray:
  """[N, R, R] labels of k-means within each image."""
  side = settings.grid_px

  def compute(maps, keys):
    result = kmeans_of_maps(
      maps,
      keys,
      grid=(side, side),
      num_clusters=settings.num_parts,
      # One image keeps a CPU busy; an accelerator takes the batch at once.
      chunk=1 if jax.default_backend() == 'cpu' else len(keys),
    )
    labels = result.labels.reshape(len(keys), side, side)
    return {
      'labels': labels.astype(jnp.uint8),
      'inertia': result.inertia,
    }

  labels = np.concatenate(
    [arrays['labels'] for _, arrays in images.each('parts', compute)]
  )
  centres = (np.arange(side) + 0.5) / side
  mask_px = images.canvases.images.shape[1]
  return resize_nearest(labels, centres, centres, mask_px)


def _cosegment_all(
  images: _Images, settings: cosegment.Cosegmentation
) -> np.ndarray:
  """[N, R, R] parts of the foreground that the images share."""
  count = len(images.canvases.images)
  per_image = math.ceil(settings.num_sampled / count)

  def compute(maps: KeyMaps, keys):
    sample = cosegment.sample_descriptors(
      maps.keys, keys, log_bin=settings.log_bin, per_image=per_image
    )
    return {
      'keys': maps.keys.astype(jnp.float16),
      'saliency': maps.saliency,
      'sample': sample,
      'rows': jnp.tile(maps.rows, (len(keys), 1)),
      'columns': jnp.tile(maps.columns, (len(keys), 1)),
    }

  samples = []
  for _, arrays in images.each('keys', compute):
    samples.append(arrays['sample'])
    rows, columns = arrays['rows'][0], arrays['columns'][0]
  sample = np.concatenate(samples)
  sample = sample.reshape(-1, sample.shape[-1])

  def assign(centres):
    """Labels [N, h, w] and the saliency [N, h, w]."""
    found = []
    for batch, arrays in images.each('assign', compute):
      missing = len(batch.rows) - batch.kept
      keys = np.pad(arrays['keys'], ((0, missing), *((0, 0),) * 3), mode='edge')
      labels = cosegment.assign(keys, centres, log_bin=settings.log_bin)
      found.append((np.asarray(labels)[: batch.kept], arrays['saliency']))
    return (np.concatenate(column) for column in zip(*found))

  clusters = cosegment.find_clusters(sample, settings, images.seed)
  labels, saliency = assign(clusters)
  salient = cosegment.vote(labels, saliency, len(clusters), settings)
  nearest = cosegment.nearest(sample, clusters)
  parts = cosegment.find_parts(sample[salient[nearest]], settings, images.seed)
  part_ids, _ = assign(parts)
  part_ids = np.where(salient[labels], part_ids + 1, 0).astype(np.uint8)
  mask_px = images.canvases.images.shape[1]
  return resize_nearest(part_ids, rows, columns, mask_px)


def discover(
  encode: Callable[[np.ndarray, np.ndarray], Any],
  canvases: Canvases,
  *,
  settings: Settings,
  seed: int,
  folder: pathlib.Path | None = None,
  manifest: Manifest | None = None,
  batch_size: int = 16,
  progress: bool = False,
) -> np.ndarray:
  """Finds the parts of all images; a function of its arguments alone.

  Args:
    encode: maps canvases [B, R, R, 3] uint8 and sizes [B, 2] int32, whole and
      not cropped, to what the settings need: the maps of
      `features.hypercolumn_maps`, or `features.KeyMaps`; jitted by the caller.
    canvases: N images.
    settings: `Hypercolumn` or `Cosegmentation`.
    seed: of everything random.
    folder: keeps what is done, so that an interrupted run goes on; None keeps
      it in memory. `Chunks(folder, manifest).remove()` deletes it.
    manifest: of the masks; needed with a folder.
    batch_size: images encoded at a time.
    progress: shows a progress bar on stderr.

  Returns:
    [N, R, R] uint8 part ids. Of `Cosegmentation` 0 is the background and an id
    means the same in all images; of `Hypercolumn` neither.

  Raises:
    UserError: no images, settings that cannot be, features that are not
      finite, or a folder of another run.
  """
  check_settings(settings)
  if not len(canvases.images):
    raise UserError(f'{canvases.name}: no images to find parts in')
  images = _Images(
    encode,
    canvases,
    batch_size,
    Chunks(folder, manifest),
    seed,
    progress,
  )
  if isinstance(settings, Hypercolumn):
    return _cluster_each(images, settings)
  return _cosegment_all(images, settings)
