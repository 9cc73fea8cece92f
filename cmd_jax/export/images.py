"""The images of a folder, and their embeddings, block by block."""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tqdm

from cmd_jax.api import Encoder
from cmd_jax.data import image_formats
from cmd_jax.data.canvas import Skipped
from cmd_jax.data.sources import not_photographs
from cmd_jax.errors import UserError
from cmd_jax.files import safe_read

# Images decoded at a time; the next ones are, while these are encoded.
_BLOCK = 256
_NUM_THREADS = min(32, os.cpu_count() or 1)


class Embeddings(NamedTuple):
  """The embeddings of a folder.

  Attributes:
    folder: the folder.
    file_names: [N] names relative to it, sorted.
    vectors: [N, D] float32, not normalised.
    skipped: the images that could not be read.
  """

  folder: pathlib.Path
  file_names: tuple[str, ...]
  vectors: np.ndarray
  skipped: tuple[Skipped, ...]


def list_images(folder: str | os.PathLike[str]) -> list[str]:
  """Names of all images below a folder, relative to it and sorted.

  Hidden files and folders are left out, and so are what lies behind a link to a
  folder. Work directories of runs and what a storage system keeps are left out
  with a note on stderr.

  Raises:
    UserError: no folder, or one without images.
  """
  root = pathlib.Path(folder).expanduser()
  if not root.is_dir():
    what = 'is a file' if root.exists() else 'does not exist'
    raise UserError(f'{root} {what}: give --input a folder of images')

  def fail(error: OSError) -> None:
    raise UserError(
      f'cannot list the folder {error.filename} ({error.strerror}): make it '
      'readable or move it away'
    ) from error

  found, of_systems, workdirs = [], [], []
  for place, folders, files in os.walk(root, onerror=fail):
    kept = []
    for name in folders:
      path = os.path.join(place, name)
      if name.startswith('.'):
        continue
      if not_photographs.is_of_system(name):
        of_systems.append(os.path.relpath(path, root))
      elif not_photographs.is_workdir(path):
        workdirs.append(os.path.relpath(path, root))
      else:
        kept.append(name)
    folders[:] = kept
    found += [
      os.path.relpath(os.path.join(place, name), root).replace(os.sep, '/')
      for name in files
      if name.lower().endswith(image_formats.EXTENSIONS)
      and not name.startswith('.')
    ]
  for note in (
    *not_photographs.note_on(not_photographs.WORKDIRS, workdirs),
    *not_photographs.note_on(not_photographs.OF_SYSTEMS, of_systems),
  ):
    print(note, file=sys.stderr)
  if not found:
    raise UserError(
      f'{root} has no images; put files there that end in '
      f'{", ".join(image_formats.EXTENSIONS)}'
    )
  return sorted(found)


def _decode(encoder: Encoder, path: pathlib.Path, name: str) -> tuple | Skipped:
  try:
    return encoder.make_canvas(path)
  except (OSError, ValueError) as error:
    reason = getattr(error, 'strerror', None) or str(error)
    return Skipped(name, safe_read.one_line(reason) or type(error).__name__)


def _decoded_blocks(
  encoder: Encoder, root: pathlib.Path, names: list[str]
) -> Iterator[list[tuple | Skipped]]:
  """Decodes in threads, one block ahead of what is taken."""
  pool = concurrent.futures.ThreadPoolExecutor(_NUM_THREADS)
  pending = []
  try:
    for start in range(0, len(names), _BLOCK):
      pending.append(
        [
          pool.submit(_decode, encoder, root / name, name)
          for name in names[start : start + _BLOCK]
        ]
      )
      if len(pending) == 2:
        yield [future.result() for future in pending.pop(0)]
    for block in pending:
      yield [future.result() for future in block]
  finally:
    # Else an interrupt would wait for what is under way.
    pool.shutdown(cancel_futures=True)


class Block(NamedTuple):
  """Images that were decoded and embedded together.

  Attributes:
    names: [B] of the readable ones.
    canvases: [B, R, R, 3] uint8.
    sizes: [B, 2] int32 height and width of the originals.
    vectors: [B, D] float32.
    skipped: the unreadable ones.
  """

  names: tuple[str, ...]
  canvases: np.ndarray
  sizes: np.ndarray
  vectors: np.ndarray
  skipped: tuple[Skipped, ...]


def embed_blocks(
  encoder: Encoder,
  root: pathlib.Path,
  names: list[str],
  *,
  progress: bool = True,
) -> Iterator[Block]:
  """Embeds images in the order of their names, so that few are held at once.

  Args:
    encoder: from `cmd_jax.load`.
    root: a folder.
    names: of images in it.
    progress: shows a progress bar on stderr.

  Yields:
    What was decoded together; a block without a readable image has no vectors
    and no canvases.
  """
  done = 0
  with tqdm.tqdm(
    total=len(names), desc='embed', unit='image', disable=not progress
  ) as bar:
    for decoded in _decoded_blocks(encoder, root, names):
      of_block = names[done : done + len(decoded)]
      skipped = tuple(x for x in decoded if isinstance(x, Skipped))
      kept = [
        (name, *result)
        for name, result in zip(of_block, decoded)
        if not isinstance(result, Skipped)
      ]
      if kept:
        readable, canvases, sizes = zip(*kept)
        canvases, sizes = np.stack(canvases), np.int32(sizes)
        vectors = encoder.embed_canvases(canvases, sizes)
        yield Block(readable, canvases, sizes, vectors, skipped)
      else:
        none = np.zeros(0, np.uint8)
        yield Block((), none, none, none, skipped)
      done += len(decoded)
      bar.update(len(decoded))


def none_readable(root: pathlib.Path, skipped: Sequence[Skipped]) -> UserError:
  """The error of a folder of which no image can be read."""
  return UserError(
    f'{root}: none of the {len(skipped)} images can be read; the first, '
    f'{skipped[0].file_name}: {skipped[0].reason}; check the files'
  )


def embed_folder(
  encoder: Encoder, folder: str | os.PathLike[str], *, progress: bool = True
) -> Embeddings:
  """Embeds all images of a folder; labels and splits are not looked at.

  Args:
    encoder: from `cmd_jax.load`.
    folder: the folder.
    progress: shows a progress bar on stderr.

  Returns:
    The embeddings, in the order of the names.

  Raises:
    UserError: no folder, no images, or none that can be read.
  """
  root = pathlib.Path(folder).expanduser()
  kept, vectors, skipped = [], [], []
  for block in embed_blocks(
    encoder, root, list_images(root), progress=progress
  ):
    skipped += block.skipped
    if block.names:
      kept += block.names
      vectors.append(block.vectors)
  if not kept:
    raise none_readable(root, skipped)
  return Embeddings(root, tuple(kept), np.concatenate(vectors), tuple(skipped))
