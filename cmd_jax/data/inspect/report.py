"""What is in the images of a run: counts, sizes, odd files, duplicates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cmd_jax.data.canvas import Canvases
from cmd_jax.data.inspect import kinds, near_duplicates
from cmd_jax.data.inspect.twins import Twins, find_twins
from cmd_jax.data.sources.base import UNLABELLED

# Decoding more of a streamed set would delay the first step.
MAX_STREAMED = 2048
_PAIRS_LISTED = 1000
_NAMED = 5
# Largest value of 14 bits: a file of 16 without any above is of fewer, or dark.
_DARK = 2**14 - 1
_SIDE_EDGES = (32, 64, 128, 256, 512, 1024)
_RATIO_EDGES = (1.25, 1.5, 2.0, 4.0)


class _Look(NamedTuple):
  """A split and the rows of it that were looked at.

  Attributes:
    canvases: the split.
    rows: [K] rows.
    prints: fingerprints of the rows.
  """

  canvases: Canvases
  rows: np.ndarray
  prints: near_duplicates.Prints

  def names(self, where: np.ndarray) -> list[str]:
    """Names of the images at the given positions of `rows`."""
    return [self.canvases.file_names[row] for row in self.rows[where]]


def _is_streamed(canvases: Canvases) -> bool:
  return not isinstance(canvases.images, np.ndarray)


def _look(canvases: Canvases, progress: bool | None) -> _Look:
  count = len(canvases.file_names)
  rows = np.arange(count)
  if _is_streamed(canvases) and count > MAX_STREAMED:
    rows = np.linspace(0, count - 1, MAX_STREAMED).astype(int)
  prints = near_duplicates.make_prints(canvases.images, rows, progress=progress)
  # A streamed image that can't be read is shown as another one.
  skipped = {name for name, _ in canvases.skipped}
  kept = np.array(
    [canvases.file_names[row] not in skipped for row in rows], bool
  )
  prints = near_duplicates.Prints(*(field[kept] for field in prints))
  return _Look(canvases, rows[kept], prints)


def _some(names: Sequence[str]) -> dict[str, Any]:
  return {'count': len(names), 'first': list(names[:_NAMED])}


def _histogram(values: np.ndarray, edges: Sequence[float]) -> dict[str, Any]:
  """Counts below the first edge, between edges, and from the last one on."""
  if not len(values):
    return {}
  bins = np.bincount(np.digitize(values, edges), minlength=len(edges) + 1)
  labels = [f'<{edges[0]:g}']
  labels += [f'{low:g}-{high:g}' for low, high in zip(edges, edges[1:])]
  labels += [f'>={edges[-1]:g}']
  return {
    'min': round(float(values.min()), 2),
    'median': round(float(np.median(values)), 2),
    'max': round(float(values.max()), 2),
    'histogram': dict(zip(labels, bins.tolist())),
  }


def _class_facts(canvases: Canvases) -> dict[str, Any]:
  names = canvases.class_names
  labels = canvases.labels[canvases.labels != UNLABELLED]
  counts = np.bincount(labels, minlength=len(names))
  if not len(names):
    return {'count': 0}
  ranked = [
    (names[i], int(counts[i])) for i in np.argsort(counts, kind='stable')
  ]
  present = [item for item in ranked if item[1]]
  sizes = [size for _, size in present] or [0]
  return {
    'count': len(names),
    'min': min(sizes),
    'median': float(np.median(sizes)),
    'max': max(sizes),
    'smallest': present[:_NAMED],
    'largest': present[: -_NAMED - 1 : -1],
    'absent': [name for name, size in ranked if not size],
    'images': dict(zip(names, counts.tolist())),
  }


def _kind_facts(look: _Look) -> dict[str, Any] | None:
  if look.canvases.kinds is None:
    return None
  found = {
    kind: kinds.rows_of_kind(np.asarray(look.canvases.kinds[look.rows]), kind)
    for kind in kinds.KINDS
  }
  return {kind: _some(look.names(where)) for kind, where in found.items()}


def _deep_facts(look: _Look) -> dict[str, Any] | None:
  """What values the files of 16 bits have; None if there are none."""
  if look.canvases.ranges is None:
    return None
  ranges = np.asarray(look.canvases.ranges[look.rows]).astype(int)
  known = ranges[:, 1] > 0
  if not known.any():
    return None
  # Where something else is white, somebody has seen to it.
  is_dark = known & (ranges[:, 1] <= _DARK) & (ranges[:, 2] == kinds.TOP)
  return {
    'count': int(known.sum()),
    'low': int(ranges[known, 0].min()),
    'high': int(ranges[known, 1].max()),
    'dark': _some(look.names(np.flatnonzero(is_dark))),
    'dark_high': int(ranges[is_dark, 1].max(initial=0)),
  }


def _split_facts(look: _Look) -> dict[str, Any]:
  canvases, rows = look.canvases, look.rows
  skipped = list(canvases.skipped)
  names = {skip.file_name for skip in skipped}
  used = sum(name not in names for name in canvases.file_names)
  sizes = np.asarray(canvases.sizes[rows]).reshape(-1, 2)
  shorter = sizes.min(1)
  canvas_px = canvases.images.shape[1]
  return {
    'name': canvases.name,
    'images_in': used + len(skipped),
    'used': used,
    'skipped': len(skipped),
    'skipped_images': [list(skip) for skip in skipped],
    'notes': list(canvases.notes),
    'is_streamed': _is_streamed(canvases),
    'looked_at': len(rows),
    # Streamed images that can't be read lose their label, too.
    'unlabelled': used - int((canvases.labels != UNLABELLED).sum()),
    'classes': _class_facts(canvases),
    'shorter_side_px': _histogram(shorter, _SIDE_EDGES),
    'aspect_ratio': _histogram(sizes.max(1) / shorter, _RATIO_EDGES),
    'smaller_than_canvas': int((shorter < canvas_px).sum()),
    'canvas_px': canvas_px,
    'channels': int(canvases.images.shape[-1]),
    'canvas_bytes': int(canvases.images.nbytes),
    'kinds': _kind_facts(look),
    'sixteen_bits': _deep_facts(look),
    'one_colour': _some(look.names(np.flatnonzero(look.prints.is_flat))),
  }


def _pair_facts(
  pair: np.ndarray, distance: int, looks: Mapping[str, _Look], starts: list[int]
) -> dict[str, Any]:
  facts = {'distance': int(distance)}
  for key, position in zip('ab', pair.tolist()):
    number = int(np.searchsorted(starts, position, side='right')) - 1
    split, look = list(looks.items())[number]
    row = look.rows[position - starts[number]]
    label = int(look.canvases.labels[row])
    facts[key] = {
      'split': split,
      'file': look.canvases.file_names[row],
      'class': None
      if label == UNLABELLED
      else look.canvases.class_names[label],
    }
  return facts


def _twin_facts(
  twins: Twins, splits: np.ndarray, looks: Mapping[str, _Look]
) -> dict[str, Any]:
  starts = np.searchsorted(splits, np.arange(len(looks))).tolist()
  first, second = splits[twins.pairs.T]
  groups = {'within': first == second, 'across': first != second}
  images = {
    a: {
      b: {
        'copies': int(twins.copies[splits == i, j].sum()),
        'twins': int(twins.twins[splits == i, j].sum()),
      }
      for j, b in enumerate(looks)
    }
    for i, a in enumerate(looks)
  }
  pairs = {
    key: [
      _pair_facts(*item, looks, starts)
      for item in zip(
        twins.pairs[where][:_PAIRS_LISTED],
        twins.distances[where][:_PAIRS_LISTED],
      )
    ]
    for key, where in groups.items()
  }
  return {
    'images': images,
    'other_label': int(twins.conflicts.sum()),
    'pairs': pairs,
  }


def make_report(
  splits: Mapping[str, Canvases],
  *,
  placement: str = '',
  progress: bool | None = None,
) -> dict[str, Any]:
  """Looks at the images of a run.

  Of a split that is streamed, at most `MAX_STREAMED` images, evenly spaced, are
  decoded and looked at.

  Args:
    splits: by name, of one list of classes; the one trained on is first.
    placement: one line: where the images are while they are trained on.
    progress: whether to show progress bars on stderr once a second has passed;
      by default if stderr is a terminal.

  Returns:
    What JSON can represent: by split, the counts, classes, sizes and kinds of
    files; `duplicates`, with `images[a][b]`, how many images of split a have
    copies or twins in split b; and `placement`.
  """
  looks = {name: _look(split, progress) for name, split in splits.items()}
  parts = list(looks.values())
  of_split = np.repeat(np.arange(len(parts)), [len(p.rows) for p in parts])
  rows = np.concatenate([part.rows for part in parts])
  prints = near_duplicates.join_prints([part.prints for part in parts])
  twins = find_twins(
    prints,
    near_duplicates.first_copies(
      prints, lambda i: parts[of_split[i]].canvases.images[rows[i]]
    ),
    of_split,
    np.concatenate([part.canvases.labels[part.rows] for part in parts]),
    num_splits=len(parts),
    progress=progress,
  )
  return {
    'placement': placement,
    'splits': {name: _split_facts(look) for name, look in looks.items()},
    'duplicates': _twin_facts(twins, of_split, looks),
  }
