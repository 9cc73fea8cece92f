"""Classes and splits that a folder gives its images."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cmd_jax.data.sources.base import UNLABELLED
from cmd_jax.data.sources.folder import find_images
from cmd_jax.data.sources.listing import USES


class Labels(NamedTuple):
  """What a folder says of N of its images.

  Attributes:
    labels: [N] int32 index into `class_names`, `UNLABELLED` where unknown.
    class_names: names of the classes; empty where there are none.
    splits: [N] names of the splits; '' where none is given.
  """

  labels: np.ndarray
  class_names: tuple[str, ...]
  splits: tuple[str, ...]


def read_labels(folder: pathlib.Path, names: Sequence[str]) -> Labels:
  """Classes and splits of images: of labels.csv, or of the folders' names.

  Args:
    folder: the folder.
    names: [N] of images in it; those it gives no class have none.

  Raises:
    UserError: a labels.csv that is wrong.
  """
  found = find_images(str(folder))
  row_of = {name: row for row, name in enumerate(found.names)}
  rows = np.array([row_of.get(name, -1) for name in names], int)
  # The last entry is that of -1.
  labels = np.append(found.labels, np.int32(UNLABELLED))[rows]
  splits = np.append(found.splits, np.int8(0))[rows]
  return Labels(labels, found.class_names, tuple(USES[x] for x in splits))
