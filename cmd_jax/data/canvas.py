"""Canvases: images resized once to a fixed square, ready for the device."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Iterator
from typing import IO, NamedTuple

import numpy as np
import tqdm
from PIL import ExifTags, Image, UnidentifiedImageError

from cmd_jax import errors
from cmd_jax.data import source as source_lib

# From here on Pillow's two-stage resize can't be told from the one-stage one.
_REDUCING_GAP = 3.0
_FULL_SIZE = 'cmd_jax.full_size'
_UPRIGHT = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}


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
    images: [N, R, R, 3] uint8 RGB images, squashed to a square.
    sizes: [N, 2] int32 height and width of the originals in pixels.
    labels: [N] int32 index into `class_names`, `UNLABELLED` where unknown.
    file_names: [N] name of every example, in the order of the source.
    class_names: names of the classes; empty where there are no labels.
    part_ids: [N, R, R] uint8 part of every pixel, 0 background; None if the
      source has none.
    boxes: [N, 4] float32 (top, left, bottom, right) as fractions of the height
      and width; None if the source has none.
    skipped: the examples that could not be read, in the order of the source.
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


class _Decoded(NamedTuple):
  size: tuple[int, int]
  part_ids: np.ndarray | None
  box: np.ndarray | None


class _QuietPillow:
  """Ignores the Python warnings that Pillow raises about odd files.

  `warnings.catch_warnings` swaps a list that all threads share, so decoding
  threads that overlap have to share one swap.
  """

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self._depth = 0
    self._caught: warnings.catch_warnings | None = None

  def __enter__(self) -> None:
    with self._lock:
      if self._depth == 0:
        self._caught = warnings.catch_warnings()
        self._caught.__enter__()
        warnings.filterwarnings('ignore', module=r'PIL\.')
      self._depth += 1

  def __exit__(self, *exc_info: object) -> None:
    with self._lock:
      self._depth -= 1
      if self._depth == 0:
        self._caught.__exit__(*exc_info)


_quiet_pillow = _QuietPillow()


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
  """Scales [H, W] pixels of 16 bits, or of floats in [0, 1], to uint8."""
  top = 1 if np.issubdtype(pixels.dtype, np.floating) else 65535
  # Written so that a NaN fails it too.
  if not (pixels.min() >= 0 and pixels.max() <= top):
    raise ValueError(f'pixels outside the range from 0 to {top}')
  return np.rint(pixels * (255 / top)).astype(np.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
  """Converts any mode to RGB, showing white where it is transparent."""
  if image.mode[0] in 'IF':
    image = Image.fromarray(_eight_bits(np.asarray(image)))
  if image.has_transparency_data:
    white = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(white, image.convert('RGBA'))
  return image if image.mode == 'RGB' else image.convert('RGB')


def _orientation(image: Image.Image) -> int:
  """Reads the EXIF orientation; 1, upright, if it is missing or damaged."""
  try:
    return image.getexif().get(ExifTags.Base.Orientation, 1)
  except Exception:
    # Whatever reading damaged EXIF raises, the pixels are fine.
    return 1


def _decode(image: Image.Image, min_px: int) -> Image.Image:
  full_width, full_height = image.size
  if min_px:
    image.draft(None, (min_px, min_px))
  is_draft = image.size != (full_width, full_height)
  # Before EXIF is read: PNG may keep it behind the pixels, and Pillow turns
  # TIFF upright by itself.
  image.load()
  orientation = _orientation(image)
  if orientation in _UPRIGHT:
    image = image.transpose(_UPRIGHT[orientation])
    if orientation >= 5:
      full_width, full_height = full_height, full_width
  image = _to_rgb(image)
  if is_draft:
    image.info[_FULL_SIZE] = (image.size, (full_height, full_width))
  return image


def open_rgb(
  path_or_file: str | os.PathLike[str] | IO[bytes], *, min_px: int = 0
) -> Image.Image:
  """Opens an image file upright and in RGB, whatever its mode.

  Grayscale is repeated, transparency is composited on white, 16 bits are scaled
  to 8, and an animation shows its first frame. Safe to call from threads.

  Args:
    path_or_file: path, or binary file object, of any format Pillow reads.
    min_px: if positive, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size,
      much faster, as long as its shorter side keeps this many pixels.
      `true_size` gives the size of the original all the same.

  Returns:
    An RGB image with its pixels loaded.

  Raises:
    OSError: the file is missing, damaged, truncated, or not an image.
    ValueError: it is too large to be decoded safely, or its pixels have a range
      with no meaning as an image.
  """
  with _quiet_pillow:
    try:
      with Image.open(path_or_file) as image:
        return _decode(image, min_px)
    except UnidentifiedImageError as error:
      raise OSError('not an image, or of an unknown format') from error
    except Image.DecompressionBombError as error:
      raise ValueError(f'too many pixels to decode safely: {error}') from error
    except (OSError, ValueError, MemoryError):
      raise
    except Exception as error:
      # Pillow's readers raise nearly anything when bytes are damaged.
      reason = str(error) or type(error).__name__
      raise OSError(f'damaged file: {reason}') from error


def true_size(image: Image.Image) -> tuple[int, int]:
  """Gives the size of the original of an image from `open_rgb`.

  Args:
    image: any image; if `open_rgb` decoded it at a smaller scale, and it was
      not cropped or resized since, the size before that is meant.

  Returns:
    Height and width in pixels.
  """
  decoded_size, full_size = image.info.get(_FULL_SIZE, (None, None))
  if decoded_size == image.size:
    return full_size
  return image.height, image.width


def make_canvas(image: Image.Image, canvas_px: int) -> np.ndarray:
  """Squashes an image to a square, antialiased (bicubic).

  Args:
    image: image of any size; converted to RGB if it is not.
    canvas_px: side R of the canvas in pixels.

  Returns:
    [R, R, 3] uint8 canvas.
  """
  resized = _to_rgb(image).resize(
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


def _decode_into(
  images: np.ndarray, source: source_lib.Source, index: int
) -> _Decoded | Skipped:
  """Writes canvas `index` into `images` [N, R, R, 3], or says why it can't."""
  canvas_px = images.shape[1]
  try:
    example = source.load(index)
    size = true_size(example.image)
    images[index] = make_canvas(example.image, canvas_px)
    part_ids = example.part_ids
    if part_ids is not None:
      part_ids = _make_part_canvas(part_ids, size, canvas_px)
    return _Decoded(size, part_ids, example.box)
  except (OSError, ValueError) as error:
    reason = getattr(error, 'strerror', None) or str(error)
    reason = ' '.join(reason.split()) or type(error).__name__
    return Skipped(source.file_names[index], reason)


def _decode_all(
  images: np.ndarray,
  source: source_lib.Source,
  num_threads: int | None,
  progress: bool | None,
) -> Iterator[_Decoded | Skipped]:
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


def _allocate(source: source_lib.Source, *shape: int) -> np.ndarray:
  shape = (len(source.file_names), *shape)
  try:
    return np.empty(shape, np.uint8)
  except MemoryError as error:
    raise errors.UserError(
      f'{source.name}: no memory for {np.prod(shape, dtype=float) / 1e9:.1f} GB'
      f' of canvases; take fewer images or a smaller canvas than {shape[1]}'
    ) from error


def _check_same_kind(
  source: source_lib.Source, index: int, decoded: _Decoded, first: _Decoded
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
  images = _allocate(source, canvas_px, canvas_px, 3)
  part_ids = None
  decoded: list[_Decoded] = []
  kept: list[int] = []
  skipped: list[Skipped] = []
  results = _decode_all(images, source, num_threads, progress)
  with _quiet_pillow, contextlib.closing(results):
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
  )


def skip_report(canvases: Canvases) -> str:
  """Says in text how many examples were used, and which were skipped and why.

  Args:
    canvases: what `make_canvases` made.

  Returns:
    One line with the counts and one for each example skipped, each line ended
    by a newline.
  """
  used, skipped = len(canvases.file_names), len(canvases.skipped)
  lines = [
    f'{canvases.name}: {used + skipped} images, {used} used, {skipped} skipped'
  ]
  lines += [f'  {name}: {reason}' for name, reason in canvases.skipped]
  return '\n'.join(lines) + '\n'
