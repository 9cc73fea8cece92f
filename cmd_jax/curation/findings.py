"""All that curation finds out of the images of a folder."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from cmd_jax.curation.duplicates import NO_GROUP, Duplicates, find_duplicates
from cmd_jax.curation.neighbours import ASKED, Neighbourhood, look_around
from cmd_jax.curation.photographs import Photographs
from cmd_jax.curation.selection import Selection, select
from cmd_jax.evaluators.nearest import Nearest, find_nearest


class Findings(NamedTuple):
  """What is found of N images.

  Attributes:
    photographs: the images.
    nearest: [N, k] the nearest of every image, without itself, as
      `cmd-jax search` ranks them.
    duplicates: which show the same.
    around: what their neighbours say.
    conflicts: [N] label of an image that shows the same under another name; -1
      where there is none.
    selection: which to label first.
    notes: what a reader must know, in sentences.
  """

  photographs: Photographs
  nearest: Nearest
  duplicates: Duplicates
  around: Neighbourhood
  conflicts: np.ndarray
  selection: Selection
  notes: tuple[str, ...]

  def name_of(self, label: int) -> str:
    """The name of a class; '' for none."""
    return self.photographs.given.class_names[label] if label >= 0 else ''


def _conflicts(duplicates: Duplicates, labels: np.ndarray) -> np.ndarray:
  found = np.full(len(labels), -1)
  for i, j in duplicates.pairs.tolist():
    if labels[i] >= 0 and labels[j] >= 0 and labels[i] != labels[j]:
      found[i], found[j] = labels[j], labels[i]
  return found


def _choose(
  photographs: Photographs,
  duplicates: Duplicates,
  around: Neighbourhood,
  count: int,
) -> Selection:
  """Images to label: unlabelled ones, or any where all or none have labels."""
  labels = photographs.given.labels
  candidates = ~duplicates.is_spare
  labelled = np.zeros(0, int)
  if (labels >= 0).any() and (labels < 0).any():
    labelled = np.flatnonzero(labels >= 0)
    # What shows the same as a labelled image has its label.
    known = np.isin(duplicates.groups, duplicates.groups[labelled])
    known &= duplicates.groups != NO_GROUP
    candidates &= (labels < 0) & ~known
  return select(
    photographs.directions,
    around.typicality,
    np.flatnonzero(candidates),
    labelled,
    count,
  )


def _notes(
  photographs: Photographs, selection: Selection, wanted: int
) -> list[str]:
  notes: list[str] = []
  labels, class_names, _ = photographs.given
  if photographs.skipped:
    first = photographs.skipped[0]
    notes.append(
      f'{len(photographs.skipped)} unreadable image(s) are left out, the first '
      f'is {first.file_name}: {first.reason}'
    )
  counts = np.bincount(labels[labels >= 0], minlength=len(class_names))
  single = [name for name, count in zip(class_names, counts) if count == 1]
  if not class_names:
    notes.append(
      'There are no labels, so none can be wrong: class folders or a '
      'labels.csv give them'
    )
  elif single:
    notes.append(
      f'{len(single)} class(es) with one image cannot be judged, the first is '
      f'{single[0]}: add images of them'
    )
  if len(selection.rows) < wanted:
    notes.append(
      f'{wanted} images to label were asked for and {len(selection.rows)} are '
      'all there are without duplicates and labels'
    )
  return notes


def examine(
  photographs: Photographs, *, num_selected: int, alike_from: float
) -> Findings:
  """Finds duplicates, outliers, suspicious labels and images to label first.

  Args:
    photographs: N images.
    num_selected: images to label.
    alike_from: centred cosine from which on two images count as duplicates
      whatever their pixels say.
  """
  own = np.arange(len(photographs.names))
  by_cosine, nearest = (
    find_nearest(vectors, vectors, ASKED, own=own)
    for vectors in (photographs.directions, photographs.told_apart)
  )
  duplicates = find_duplicates(photographs, by_cosine, alike_from)
  around = look_around(by_cosine, nearest, duplicates, photographs.given)
  selection = _choose(photographs, duplicates, around, num_selected)
  return Findings(
    photographs,
    nearest,
    duplicates,
    around,
    _conflicts(duplicates, photographs.given.labels),
    selection,
    tuple(_notes(photographs, selection, num_selected)),
  )
