"""Canvases: images resized once to a fixed square, ready for the device."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tqdm
from PIL import Image

from cmd_jax import errors
from cmd_jax.data import channels as channels_lib
from cmd_jax.data import decode
from cmd_jax.data.inspect import kinds as kinds_lib
from cmd_jax.data.sources import base as source_lib
from cmd_jax.files import safe_read

# From here on Pillow's two-stage resize can't be told from the one-stage one.
_REDUCING_GAP = 3.0


class Skipped(NamedTuple):
  """An example that could not be read.

  Attributes:
    file_name: its name in the source.
    reason: why, in one line.
  """

  file_name: str
  reason: str


class Canvases(NamedTuple):
  """One split of an image collection, decoded.

  Attributes:
    name: name of the data set and split, for messages.
    images: [N, R, R, 3] uint8 RGB images, squashed to a square; of another
      number of channels [N, R, R, C] uint16.
    sizes: [N, 2] int32 height and width of the originals in pixels.
    labels: [N] int32 index into `class_names`, `UNLABELLED` where unknown.
    file_names: [N] name of every example, in the order of the source.
    class_names: names of the classes; empty where there are no labels.
    part_ids: [N, R, R] uint8 part of every pixel, 0 background; None if the
      source has none.
    boxes: [N, 4] float32 (top, left, bottom, right) as fractions of the height
      and width; None if the source has none.
    skipped: the examples that could not be read, in the order of the source.
    ranges: [N, 3] uint16 smallest and largest value of the files of 16 bits,
      and what is white, see `kinds.noted_range`; None if unknown.
    kinds: [N] uint16 what was unusual about the files, see `kinds.KINDS`; None
      if they were not looked at.
    notes: sentences about files that belong to no split, one line each.
  """

  name: str
  images: np.ndarray
  sizes: np.ndarray
  labels: np.ndarray
  file_names: tuple[str, ...]
  class_names: tuple[str, ...]
  part_ids: np.ndarray | None
  boxes: np.ndarray | None
  skipped: tuple[Skipped, ...]
  kinds: np.ndarray | None = None
  ranges: np.ndarray | None = None
  notes: tuple[str, ...] = ()


class Decoded(NamedTuple):
  """An example on its canvas.

  Attributes:
    canvas: [R, R, 3] uint8, or [R, R, C] uint16.
    size: height and width of the original in pixels.
    part_ids: [R, R] uint8; None if the source has none.
    box: [4] float32, see `Canvases`; None if the source has none.
    kinds: what was unusual about the file, see `kinds.noted_kinds`.
    value_range: of a file of 16 bits, see `kinds.noted_range`.
  """

  canvas: np.ndarray
  size: tuple[int, int]
  part_ids: np.ndarray | None
  box: np.ndarray | None
  kinds: int = 0
  value_range: tuple[int, int, int] = (0, 0, 0)


def true_size(image: Image.Image | np.ndarray) -> tuple[int, int]:
  """Gives the size of the original of an image from `image_files.open_rgb`.

  Args:
    image: any image; if `image_files.open_rgb` decoded it at a smaller scale,
      and it was not cropped or resized since, the size before that is meant.

  Returns:
    Height and width in pixels.
  """
  if isinstance(image, np.ndarray):
    return image.shape[:2]
  decoded_size, full_size = image.info.get(decode.FULL_SIZE, (None, None))
  if decoded_size == image.size:
    return full_size
  return image.height, image.width


def make_canvas(image: Image.Image | np.ndarray, canvas_px: int) -> np.ndarray:
  """Squashes an image to a square, antialiased (bicubic).

  Args:
    image: image of any size; converted to RGB if it is not. Or [H, W, C]
      uint16.
    canvas_px: side R of the canvas in pixels.

  Returns:
    [R, R, 3] uint8 canvas, or [R, R, C] uint16.
  """
  if isinstance(image, np.ndarray):
    return channels_lib.squash(image, canvas_px, _REDUCING_GAP)
  resized = decode.to_rgb(image).resize(
    (canvas_px, canvas_px),
    Image.Resampling.BICUBIC,
    reducing_gap=_REDUCING_GAP,
  )
  # A copy, because Pillow's own pixels are read-only.
  return np.array(resized)


def _make_part_canvas(
  part_ids: np.ndarray, size: tuple[int, int], canvas_px: int
) -> np.ndarray:
  if part_ids.shape != size:
    raise ValueError(
      'the mask is {} x {} pixels high and wide, the image {} x {}'.format(
        *part_ids.shape, *size
      )
    )
  resized = Image.fromarray(part_ids).resize(
    (canvas_px, canvas_px), Image.Resampling.NEAREST
  )
  return np.asarray(resized)


def decode_example(
  source: source_lib.Source, index: int, canvas_px: int
) -> Decoded | Skipped:
  """Reads one example and puts it on its canvas, or says why it can't.

  Args:
    source: the examples.
    index: number of the example.
    canvas_px: side R of the canvas in pixels.
  """
  try:
    with decode.quiet_pillow:
      example = source.load(index)
      size = true_size(example.image)
      canvas = make_canvas(example.image, canvas_px)
    part_ids = example.part_ids
    if part_ids is not None:
      part_ids = _make_part_canvas(part_ids, size, canvas_px)
    decoded = Decoded(canvas, size, part_ids, example.box)
    if isinstance(example.image, Image.Image):
      decoded = decoded._replace(
        kinds=kinds_lib.noted_kinds(example.image),
        value_range=kinds_lib.noted_range(example.image),
      )
    return decoded
  except (OSError, ValueError) as error:
    reason = getattr(error, 'strerror', None) or str(error)
    reason = safe_read.one_line(reason) or type(error).__name__
    return Skipped(source.file_names[index], reason)


def _decode_into(
  images: np.ndarray, source: source_lib.Source, index: int
) -> Decoded | Skipped:
  """Writes canvas `index` into `images` [N, R, R, 3], or says why it can't."""
  decoded = decode_example(source, index, images.shape[1])
  if isinstance(decoded, Decoded):
    images[index] = decoded.canvas
    # Else all canvases would be held twice.
    decoded = decoded._replace(canvas=images[index])
  return decoded


def _decode_all(
  images: np.ndarray,
  source: source_lib.Source,
  num_threads: int | None,
  progress: bool | None,
) -> Iterator[Decoded | Skipped]:
  """Decodes in threads; yields in the order of the source."""
  num_threads = num_threads or min(32, os.cpu_count() or 1)
  pool = concurrent.futures.ThreadPoolExecutor(num_threads)
  try:
    yield from tqdm.tqdm(
      pool.map(
        functools.partial(_decode_into, images, source), range(len(images))
      ),
      desc=source.name,
      total=len(images),
      unit=' images',
      disable=None if progress is None else not progress,
      delay=1,
    )
  finally:
    # Else an interrupt would wait for the rest of the data set.
    pool.shutdown(cancel_futures=True)


def _allocate(
  source: source_lib.Source, *shape: int, dtype: type = np.uint8
) -> np.ndarray:
  shape = (len(source.file_names), *shape)
  try:
    return np.empty(shape, dtype)
  except MemoryError as error:
    raise errors.UserError(
      f'{source.name}: no memory for {np.prod(shape, dtype=float) / 1e9:.1f} GB'
      f' of canvases; take fewer images or a smaller canvas than {shape[1]}'
    ) from error


def _check_same_kind(
  source: source_lib.Source, index: int, decoded: Decoded, first: Decoded
) -> None:
  for field, words in (('part_ids', 'part masks'), ('box', 'boxes')):
    if (getattr(decoded, field) is None) != (getattr(first, field) is None):
      raise errors.UserError(
        f'{source.name}: some images have {words} and some have none, from'
        f' {source.file_names[index]} on; give them to all images or to none'
      )


def make_canvases(
  source: source_lib.Source,
  *,
  canvas_px: int,
  num_threads: int | None = None,
  progress: bool | None = None,
) -> Canvases:
  """Decodes a source into canvases, skipping what can't be read.

  Every example of the source is either in `file_names` or in `skipped`. A
  source without examples gives canvases without examples.

  Args:
    source: the examples, N of them.
    canvas_px: side R of the canvases in pixels.
    num_threads: threads that decode; by default one per core. The result does
      not depend on it.
    progress: whether to show a progress bar on stderr once a second has passed;
      by default if stderr is a terminal.

  Returns:
    The canvases, in the order of the source.

  Raises:
    UserError: no example can be read, only some of the examples have masks or
      boxes, `canvas_px` is not positive, or memory does not suffice.
  """
  if canvas_px < 1:
    raise errors.UserError(
      f'{source.name}: canvas_px is {canvas_px}; set it to at least 1 pixel'
    )
  channels = source.channels
  dtype = channels_lib.dtype_of(channels)
  images = _allocate(source, canvas_px, canvas_px, channels, dtype=dtype)
  part_ids = None
  decoded: list[Decoded] = []
  kept: list[int] = []
  skipped: list[Skipped] = []
  results = _decode_all(images, source, num_threads, progress)
  with decode.quiet_pillow, contextlib.closing(results):
    for index, result in enumerate(results):
      if isinstance(result, Skipped):
        skipped.append(result)
        continue
      row = len(kept)
      # Safe while threads write: they are done with everything up to `index`.
      if row != index:
        images[row] = images[index]
      if result.part_ids is not None:
        if part_ids is None:
          part_ids = _allocate(source, canvas_px, canvas_px)
        part_ids[row] = result.part_ids
        result = result._replace(part_ids=part_ids[row])
      decoded.append(result)
      kept.append(index)
      _check_same_kind(source, index, result, decoded[0])
  if skipped and not kept:
    raise errors.UserError(
      f'{source.name}: none of the {len(skipped)} images can be read; the'
      f' first, {skipped[0].file_name}: {skipped[0].reason}; check the files'
    )
  has_boxes = bool(decoded) and decoded[0].box is not None
  return Canvases(
    name=source.name,
    images=images[: len(kept)],
    sizes=np.array([d.size for d in decoded], np.int32).reshape(-1, 2),
    labels=np.asarray(source.labels, np.int32)[kept],
    file_names=tuple(source.file_names[index] for index in kept),
    class_names=source.class_names,
    part_ids=None if part_ids is None else part_ids[: len(kept)],
    boxes=np.stack([d.box for d in decoded]).astype(np.float32)
    if has_boxes
    else None,
    skipped=tuple(skipped),
    kinds=np.array([d.kinds for d in decoded], np.uint16),
    ranges=np.array([d.value_range for d in decoded], np.uint16).reshape(-1, 3),
    notes=source.notes,
  )


def printable(name: str) -> str:
  """A file name on one line, in quotes and escaped where it must be.

  Args:
    name: any name a file system gives, with line breaks or broken Unicode.
  """
  return name if name.isprintable() else ascii(name)


def skip_report(canvases: Canvases) -> str:
  """Says in text how many examples were used, and which were skipped and why.

  Args:
    canvases: what `make_canvases` made.

  Returns:
    One line with the counts and one for each example skipped, each line ended
    by a newline.
  """
  # Names, because lazily decoded canvases keep the rows of those skipped.
  names = {name for name, _ in canvases.skipped}
  used = sum(name not in names for name in canvases.file_names)
  skipped = len(canvases.skipped)
  lines = [
    f'{printable(canvases.name)}: {used + skipped} images, {used} used, '
    f'{skipped} skipped'
  ]
  lines += [
    f'  {printable(name)}: {reason}' for name, reason in canvases.skipped
  ]
  return '\n'.join(lines) + '\n'
