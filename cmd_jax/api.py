"""Encoders for use elsewhere: images in, embeddings out."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import linen as nn
from PIL import Image

from cmd_jax.data import canvas, image_files
from cmd_jax.data.channels import IMAGENET, Statistics
from cmd_jax.data.image_like import ImageLike, as_list, describe, from_array
from cmd_jax.data.inspect.kinds import TOP
from cmd_jax.devices import sharding
from cmd_jax.errors import UserError
from cmd_jax.evaluators import FrozenNetwork
from cmd_jax.evaluators.classifier import Classifier

_NUM_THREADS = min(32, os.cpu_count() or 1)


class Outputs(NamedTuple):
  """What an encoder says of N images.

  Attributes:
    image: [N, D] float32 embeddings of the images, not normalised.
    tokens: [N, h * w, D] float32 embeddings of their regions, row by row.
    attention: [N, h * w] float32, what each region counts: the multi-instance
      attention, which adds up to 1, where the method has one, otherwise the
      class token's or, of a Swin, what the regions receive, the mean over the
      heads; None for an encoder without attention.
    grid: h and w.
  """

  image: np.ndarray
  tokens: np.ndarray
  attention: np.ndarray | None
  grid: tuple[int, int]


class Preprocessing(NamedTuple):
  """What happens to an image before it is encoded.

  Attributes:
    canvas_px: side of the square to which the whole image is squashed first.
    view_px: side of the view that is cut out of it and encoded.
    crop_fraction: side of the central square that the view shows, as a fraction
      of the image's shorter side; None shows the whole image.
    grey16_white: value that is white in grey files of 16 bits.
    channels: C of the images.
    mean: of the channels, as fractions of white.
    std: their deviation.
    pooling: how embeddings are made, one of `models.pooling.POOLINGS`.
  """

  canvas_px: int
  view_px: int
  crop_fraction: float | None
  grey16_white: int = TOP
  channels: int = 3
  mean: tuple[float, ...] = IMAGENET.mean
  std: tuple[float, ...] = IMAGENET.std
  pooling: str = 'encoder'


class Encoder:
  """A frozen encoder with the preprocessing that it is evaluated with.

  Attributes:
    network: what computes, on all devices.
    source: where it comes from, in words.
    training: how it was trained, for people: `method`, `dataset`, `network` and
      `steps`; empty for a file of weights.
    classifier: trained with it and calibrated; None without.
  """

  def __init__(
    self,
    module: nn.Module,
    variables: Mapping[str, Any],
    preprocessing: Preprocessing,
    *,
    source: str,
    training: Mapping[str, str] | None = None,
    mil: nn.Module | None = None,
    mil_params: Mapping[str, Any] | None = None,
    classifier: Classifier | None = None,
    batch_size: int = 32,
  ):
    """Puts the variables on the devices.

    Args:
      module: the encoder.
      variables: what it is applied to.
      preprocessing: of its images.
      source: where it comes from.
      training: how it was trained.
      mil: multi-instance attention over its tokens.
      mil_params: parameters of `mil`, if it has any.
      classifier: over its image embeddings, calibrated.
      batch_size: most images encoded at once, by all devices together.

    Raises:
      UserError: `batch_size` isn't positive, or the view's size is wrong.
    """
    if batch_size < 1:
      raise UserError(f'batch_size is {batch_size}: make it at least 1')
    mesh = sharding.make_mesh()
    self.source, self.training = source, dict(training or {})
    self.classifier = classifier
    self._preprocessing, self._num_devices = preprocessing, mesh.size
    self.network = FrozenNetwork(
      module,
      variables,
      view_px=preprocessing.view_px,
      crop_fraction=preprocessing.crop_fraction,
      batch_size=batch_size,
      mil=mil,
      mil_params=mil_params,
      mesh=mesh,
      statistics=Statistics(preprocessing.mean, preprocessing.std),
    )

  @property
  def module(self) -> nn.Module:
    """The Flax module, images [B, H, W, 3] -> `layers.EncoderOutput`."""
    return self.network.encoder

  @property
  def variables(self) -> Mapping[str, Any]:
    """What the module is applied to."""
    return self.network.variables

  @property
  def hash(self) -> str:
    """SHA-256 of the encoder's variables."""
    return self.network.hash

  @property
  def preprocessing(self) -> dict[str, Any]:
    """The fields of `Preprocessing`, and the channels' mean and deviation."""
    fields = self._preprocessing._asdict()
    if fields['grey16_white'] == TOP:
      # As it was before the field was there, so that old tables still agree.
      del fields['grey16_white']
    if fields['channels'] == 3:
      del fields['channels']
    if fields['pooling'] == 'encoder':
      del fields['pooling']
    statistics = {name: list(fields.pop(name)) for name in ('mean', 'std')}
    return fields | statistics

  def __call__(self, images: ImageLike | Iterable[ImageLike]) -> Outputs:
    """Encodes images.

    They are compiled for in powers of two up to the batch size, so few
    different numbers of images compile anew.

    Args:
      images: paths, PIL images or [H, W, 3] uint8 arrays, a sequence of them,
        or one array [N, H, W, 3] uint8; all may be of different sizes.

    Returns:
      Their embeddings; a single image gives N = 1.

    Raises:
      UserError: no images, or one that can't be read.
    """
    blocks = list(self._blocks(self.network.encode, as_list(images)))
    image, tokens, attention = (
      None if column[0] is None else np.concatenate(column)
      for column in zip(*blocks)
    )
    side = round(tokens.shape[1] ** 0.5)
    return Outputs(image, tokens, attention, (side, side))

  def embed(self, images: ImageLike | Iterable[ImageLike]) -> np.ndarray:
    """The embeddings [N, D] of images alone; arguments as in `__call__`."""
    blocks = self._blocks(self._embed, as_list(images))
    return np.concatenate([image for (image,) in blocks])

  def make_canvas(self, image: ImageLike) -> tuple[np.ndarray, tuple[int, int]]:
    """Decodes and squashes an image.

    Returns:
      A canvas [R, R, 3] uint8, or [R, R, C] uint16, and the image's height and
      width.

    Raises:
      OSError: a file that can't be read or is no image.
      ValueError: something else than an image.
    """
    canvas_px = self._preprocessing.canvas_px
    channels = self._preprocessing.channels
    if isinstance(image, str | os.PathLike):
      # As folders are read for training.
      image = image_files.open_image(
        image,
        channels=channels,
        min_px=canvas_px,
        grey16_white=self._preprocessing.grey16_white,
      )
    elif not isinstance(image, Image.Image) or channels != 3:
      image = from_array(image, channels)
    return canvas.make_canvas(image, canvas_px), canvas.true_size(image)

  def embed_canvases(
    self, canvases: np.ndarray, sizes: np.ndarray
  ) -> np.ndarray:
    """The embeddings [N, D] of canvases [N, R, R, 3] of images of `sizes`."""
    size = self.network.batch_size
    return np.concatenate(
      [
        self._apply(
          self._embed,
          canvases[start : start + size],
          sizes[start : start + size],
        )[0]
        for start in range(0, len(canvases), size)
      ]
    )

  def _embed(self, canvases: np.ndarray, sizes: np.ndarray) -> tuple[Any]:
    pooling = self._preprocessing.pooling
    return (self.network.embed(canvases, sizes, pooling),)

  def _blocks(
    self, encode: Callable, images: Sequence[ImageLike]
  ) -> Iterator[tuple[np.ndarray | None, ...]]:
    """Outputs of the images, batch by batch."""
    if not len(images):
      raise UserError('no images to encode: give at least one')

    def decode(image):
      try:
        return self.make_canvas(image)
      except (OSError, ValueError) as error:
        raise UserError(f'{describe(image)}: {_reason(error)}') from error

    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
      size = self.network.batch_size
      for start in range(0, len(images), size):
        decoded = pool.map(decode, images[start : start + size])
        canvases, sizes = zip(*decoded)
        yield self._apply(encode, np.stack(canvases), np.array(sizes, np.int32))

  def _apply(
    self, encode: Callable, canvases: np.ndarray, sizes: np.ndarray
  ) -> tuple[np.ndarray | None, ...]:
    count = len(canvases)
    rows = (
      self._num_devices * 2 ** (-(-count // self._num_devices) - 1).bit_length()
    )
    rows = min(rows, self.network.batch_size)
    padding = np.minimum(np.arange(rows), count - 1)
    outputs = encode(canvases[padding], sizes[padding])
    return tuple(
      None if x is None else np.asarray(x, np.float32)[:count] for x in outputs
    )


def _reason(error: Exception) -> str:
  return getattr(error, 'strerror', None) or ' '.join(str(error).split())
