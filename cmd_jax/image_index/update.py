"""Brings an index up to date with a folder: new, changed and vanished files."""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cmd_jax.api import Encoder
from cmd_jax.data.canvas import Skipped
from cmd_jax.data.sources.base import UNLABELLED
from cmd_jax.data.sources.given_labels import read_labels
from cmd_jax.errors import UserError
from cmd_jax.export.images import embed_blocks, list_images, none_readable
from cmd_jax.image_index import store
from cmd_jax.image_index.ranking import with_lists
from cmd_jax.image_index.store import GONE, LIVE, REPLACED, Index, Items
from cmd_jax.image_index.whitened import with_whitening

# What was embedded is on the disk after so long, whatever happens later.
_COMMIT_S = 60.0


class Counts(NamedTuple):
  """What an update did.

  Attributes:
    added: images that were embedded, those of changed files included.
    changed: of these, files that were in the index and have changed.
    unchanged: files that were skipped, as they are in the index.
    vanished: files in the index that are no more below the folder.
    skipped: images that could not be read.
  """

  added: int
  changed: int
  unchanged: int
  vanished: int
  skipped: tuple[Skipped, ...]


def stamp(path: str | os.PathLike[str]) -> tuple[int, int]:
  """Time of the last change in ns and size of a file; -1 where it is gone."""
  try:
    stat = os.stat(path)
  except OSError:
    return -1, -1
  return stat.st_mtime_ns, stat.st_size


def _relabelled(
  items: Items, rows: Sequence[int], classes: Sequence[str]
) -> Items:
  """The items with classes of rows as the folder gives them today."""
  label_of = {name: label for label, name in enumerate(items.class_names)}
  labels = items.labels.copy()
  for row, name in zip(rows, classes):
    labels[row] = label_of.setdefault(name, len(label_of)) if name else -1
  return items._replace(labels=labels, class_names=tuple(label_of))


def _with_states(
  items: Items, vectors: np.ndarray | None, changes: dict[int, int]
) -> Items:
  """The items with states of rows changed, and the sum of live ones kept."""
  if not changes:
    return items
  states, total = items.states.copy(), items.total.copy()
  for row, state in changes.items():
    was_live, is_live = states[row] == LIVE, state == LIVE
    total += (int(is_live) - int(was_live)) * vectors[row].astype(np.float64)
    states[row] = state
  return items._replace(states=states, total=total)


def _embed(
  encoder: Encoder,
  index: Index,
  folder: pathlib.Path,
  wanted: dict[str, tuple[str, np.ndarray]],
  progress: bool,
) -> tuple[Index, list[Skipped], int]:
  """Embeds files of a folder and commits them from time to time.

  Args:
    encoder: of the index.
    index: that gets them.
    folder: the folder.
    wanted: class and stamp by the name in the folder.
    progress: shows a progress bar on stderr.

  Returns:
    The index, in which the last of them are appended and not committed; what
    could not be read; and how many were embedded.
  """
  skipped, added, since = [], 0, time.monotonic()
  for block in embed_blocks(encoder, folder, list(wanted), progress=progress):
    skipped += block.skipped
    if not block.names:
      continue
    if not np.isfinite(block.vectors).all():
      raise UserError(
        f'{encoder.source} gives features of {folder} that are not finite: use '
        'another checkpoint or other weights'
      )
    added += len(block.names)
    vectors = index.like_rows(block.vectors)
    store.append(index, vectors)
    items = store.extended(
      index.items,
      [index.name_of(folder / name) for name in block.names],
      np.array([wanted[name][1] for name in block.names], np.int64),
      [wanted[name][0] for name in block.names],
      vectors,
    )
    index = index._replace(items=items)
    if time.monotonic() - since > _COMMIT_S:
      index, since = store.commit(index), time.monotonic()
  return index, skipped, added


class _Plan(NamedTuple):
  """What is to be done with an index for the files of a folder.

  Attributes:
    wanted: files to embed: class and stamp by the name in the folder.
    states: new states of rows.
    kept: rows of files that are unchanged, and their classes.
    changed: how many of the files to embed are in the index.
    vanished: how many files of the index are no more there.
  """

  wanted: dict[str, tuple[str, np.ndarray]]
  states: dict[int, int]
  kept: dict[int, str]
  changed: int
  vanished: int


def _plan(
  index: Index,
  folder: pathlib.Path,
  listed: Sequence[str],
  classes: Sequence[str],
) -> _Plan:
  """Compares an index with the files below a folder."""
  items = index.items
  row_of = {
    name: row
    for row, name in enumerate(items.names)
    if items.states[row] != REPLACED
  }
  wanted, states, kept, changed = {}, {}, {}, 0
  for name, class_name in zip(listed, classes):
    row = row_of.pop(index.name_of(folder / name), None)
    now = stamp(folder / name)
    if row is not None and tuple(items.stamps[row]) == now:
      kept[row] = class_name
      if items.states[row] == GONE:
        states[row] = LIVE
      continue
    if row is not None:
      changed += 1
      states[row] = REPLACED
    wanted[name] = class_name, np.array(now)
  below = f'{os.path.abspath(folder)}{os.sep}'
  vanished = [
    row
    for name, row in row_of.items()
    if items.states[row] == LIVE and str(index.file_of(name)).startswith(below)
  ]
  states |= dict.fromkeys(vanished, GONE)
  return _Plan(wanted, states, kept, changed, len(vanished))


def update(
  encoder: Encoder,
  index: Index,
  folder: pathlib.Path,
  *,
  progress: bool = True,
) -> tuple[Index, Counts]:
  """Adds what is new below a folder and notices what changed or vanished.

  An image counts as changed where its size or the time of its last change
  does. Rows are never taken out: those of vanished files are no results until
  the file is there again, those of changed files are replaced by new ones.

  Args:
    encoder: that made the index.
    index: locked by the caller.
    folder: of images; those of the index that lie elsewhere are not looked at.
    progress: shows a progress bar on stderr.

  Returns:
    The index as it is on the disk, and what was done.

  Raises:
    UserError: no folder, no images, none that can be read in a new index, or
      features that are not finite.
  """
  listed = list_images(folder)
  given = read_labels(folder, listed)
  classes = [given.class_names[x] if x != UNLABELLED else '' for x in given[0]]
  plan = _plan(index, folder, listed, classes)
  vectors = index.vectors() if plan.states else None
  items = _with_states(index.items, vectors, plan.states)
  items = _relabelled(items, list(plan.kept), list(plan.kept.values()))
  index, skipped, added = _embed(
    encoder, index._replace(items=items), folder, plan.wanted, progress
  )
  if not len(index.items.names):
    raise none_readable(folder, skipped)
  index = store.commit(with_lists(with_whitening(index)))
  counts = Counts(
    added, plan.changed, len(plan.kept), plan.vanished, tuple(skipped)
  )
  return index, counts
