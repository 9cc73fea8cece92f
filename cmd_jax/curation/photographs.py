"""All that curation knows of the images of a folder, read in one pass."""

from __future__ import annotations

import hashlib
import pathlib
from typing import NamedTuple

import numpy as np

from cmd_jax.api import Encoder
from cmd_jax.curation.crops import make_greys
from cmd_jax.data.canvas import Skipped
from cmd_jax.data.channels import as_pictures
from cmd_jax.data.inspect import near_duplicates
from cmd_jax.data.inspect.near_duplicates import Prints
from cmd_jax.data.sources.given_labels import Labels, read_labels
from cmd_jax.errors import UserError
from cmd_jax.evaluators.features import centred, unit_rows
from cmd_jax.evaluators.whitening import apart_in
from cmd_jax.export.images import embed_blocks, list_images, none_readable


class Photographs(NamedTuple):
  """The N readable images of a folder.

  Attributes:
    folder: the folder.
    names: [N] relative to it, sorted.
    sizes: [N, 2] int32 height and width in pixels.
    directions: [N, D] float32 unit vectors: embeddings after their mean was
      taken off.
    told_apart: [N, D] float32 unit vectors: as `cmd-jax search` ranks them.
    digests: [N] of the pixels of the canvas.
    prints: fingerprints of the images.
    mirrored: fingerprints of the images turned left to right.
    greys: [N, G, G] uint8 small grey pictures.
    given: labels and splits.
    skipped: the images that could not be read.
  """

  folder: pathlib.Path
  names: tuple[str, ...]
  sizes: np.ndarray
  directions: np.ndarray
  told_apart: np.ndarray
  digests: tuple[bytes, ...]
  prints: Prints
  mirrored: Prints
  greys: np.ndarray
  given: Labels
  skipped: tuple[Skipped, ...]


def _digest(canvas: np.ndarray) -> bytes:
  return hashlib.blake2b(canvas.tobytes(), digest_size=16).digest()


def _describe(canvases: np.ndarray) -> tuple[Prints, Prints, np.ndarray]:
  """Fingerprints of canvases and of their mirror images, and grey pictures."""
  prints, mirrored = (
    near_duplicates.make_prints(images, progress=False)
    for images in (canvases, canvases[:, :, ::-1])
  )
  return prints, mirrored, make_greys(as_pictures(canvases))


def read_photographs(
  encoder: Encoder, folder: pathlib.Path, *, progress: bool = True
) -> Photographs:
  """Decodes every image of a folder once, and embeds and fingerprints it.

  Args:
    encoder: from `cmd_jax.load`.
    folder: the folder.
    progress: shows a progress bar on stderr.

  Raises:
    UserError: no folder, no images, fewer than two that can be read, a
      labels.csv that is wrong, or features that are not finite.
  """
  listed = list_images(folder)
  # Before the work, because labels.csv may be wrong.
  read_labels(folder, ())
  names, digests, skipped, blocks = [], [], [], []
  for block in embed_blocks(encoder, folder, listed, progress=progress):
    skipped += block.skipped
    if block.names:
      names += block.names
      digests += map(_digest, block.canvases)
      blocks.append((block.sizes, block.vectors, *_describe(block.canvases)))
  if not names:
    raise none_readable(folder, skipped)
  if len(names) < 2:
    raise UserError(
      f'{folder} has one readable image, {names[0]}: there is nothing to '
      'compare it with; put more there'
    )
  sizes, vectors, prints, mirrored, greys = zip(*blocks)
  vectors = np.concatenate(vectors)
  if not np.isfinite(vectors).all():
    raise UserError(
      f'{encoder.source} gives features of {folder} that are not finite: use '
      'another checkpoint or other weights'
    )
  return Photographs(
    folder,
    tuple(names),
    np.concatenate(sizes),
    unit_rows(centred(vectors, vectors)),
    unit_rows(apart_in(vectors)(vectors)),
    tuple(digests),
    near_duplicates.join_prints(prints),
    near_duplicates.join_prints(mirrored),
    np.concatenate(greys),
    read_labels(folder, tuple(names)),
    tuple(skipped),
  )
