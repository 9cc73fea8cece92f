"""What every data set looks like before it is decoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

UNLABELLED = -1


class Example(NamedTuple):
  """One decoded example.

  Attributes:
    image: RGB image, upright (EXIF rotation applied); [H, W, C] uint16 of a
      source with another number of channels.
    part_ids: [H, W] uint8 part of every pixel, 0 background; None if unknown.
    box: [4] float32 (top, left, bottom, right) as fractions of the height and
      width; None if unknown.
  """

  image: Image.Image | np.ndarray
  part_ids: np.ndarray | None = None
  box: np.ndarray | None = None


class Source(NamedTuple):
  """One split of an image collection, listed but not decoded.

  Attributes:
    name: name of the data set and split, for messages.
    class_names: names of the classes; empty where there are no labels.
    file_names: [N] name of every example, unique within the source.
    labels: [N] int32 index into `class_names`, `UNLABELLED` where unknown.
    load: reads and decodes the example with the given index. Raises OSError or
      ValueError for one that can't be read. Safe to call from threads.
    notes: sentences about files that belong to no split, one line each.
    channels: C of its images.
  """

  name: str
  class_names: tuple[str, ...]
  file_names: tuple[str, ...]
  labels: np.ndarray
  load: Callable[[int], Example]
  notes: tuple[str, ...] = ()
  channels: int = 3
