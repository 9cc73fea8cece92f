"""Where a run's parts come from, and how often they are looked for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from cmd_jax.data.canvas import Canvases
from cmd_jax.errors import UserError
from cmd_jax.parts import baselines, cosegment, discover

SOURCES = (
  'hypercolumn',
  'cosegmentation',
  'grid',
  'felzenszwalb',
  'annotated',
)
_DISCOVERED = {
  'hypercolumn': discover.Hypercolumn,
  'cosegmentation': cosegment.Cosegmentation,
}


class Plan(NamedTuple):
  """How the parts of a run are found.

  Attributes:
    source: one of `SOURCES`.
    settings: of the source; `discover.Settings` where an encoder is asked.
    rounds: how often parts are found and then trained on.
    path: folder of masks for the first round; empty to find them.
    keypoints: CSV file of keypoints that found parts are compared with; empty
      for none.
    view: (canvases, sizes) -> images as the encoder sees them, whole.
    view_px: side of these images.
    batch_size: images encoded at a time.
    seed: of everything random.
    num_ids: number of part ids, the background's included.
  """

  source: str
  settings: Any
  rounds: int
  path: str
  keypoints: str
  view: Callable
  view_px: int
  batch_size: int
  seed: int
  num_ids: int

  @property
  def asks_encoder(self) -> bool:
    """Whether the parts depend on the encoder."""
    return self.source in _DISCOVERED

  @property
  def has_background(self) -> bool:
    """Whether id 0 is no part."""
    return self.source in ('cosegmentation', 'annotated')

  def as_json(self) -> dict[str, Any]:
    """What a manifest has of it."""
    if self.asks_encoder:
      return {**discover.as_json(self.settings), 'view_px': self.view_px}
    return {'kind': self.source, **self.settings}


def make_plan(
  canvases: Canvases,
  *,
  source: str,
  rounds: int,
  path: str,
  keypoints: str,
  view: Callable,
  view_px: int,
  batch_size: int,
  seed: int,
  settings: Mapping[str, Any],
) -> Plan:
  """Checks settings and counts part ids.

  Args:
    canvases: the images, whose own parts 'annotated' takes.
    source: one of `SOURCES`.
    rounds: see `Plan`.
    path: see `Plan`.
    keypoints: see `Plan`.
    view: see `Plan`.
    view_px: see `Plan`.
    batch_size: see `Plan`.
    seed: see `Plan`.
    settings: arguments of the source: `discover.Hypercolumn`,
      `cosegment.Cosegmentation`, `baselines.grid_masks` or
      `baselines.felzenszwalb_masks`; none for 'annotated'.

  Raises:
    UserError: a choice or a number that cannot be, or images without parts.
  """
  if source not in SOURCES:
    raise UserError(
      f'config.parts.source is {source!r}: choose one of {", ".join(SOURCES)}'
    )
  for field, value in (('rounds', rounds), ('batch_size', batch_size)):
    if value < 1:
      raise UserError(f'config.parts.{field} is {value}: it must be at least 1')
  functions = {
    **_DISCOVERED,
    'grid': baselines.grid_masks,
    'felzenszwalb': baselines.felzenszwalb_masks,
  }
  known = ()
  if source in functions:
    known = inspect.signature(functions[source]).parameters
  unknown = [field for field in settings if field not in known]
  if unknown:
    raise UserError(
      f'config.parts.settings has {", ".join(unknown)}, which {source!r} '
      f'lacks: use --config=FILE:parts={source}'
    )
  if source in _DISCOVERED:
    settings = _DISCOVERED[source](**settings)
    discover.check_settings(settings)
    num_ids = settings.num_parts + (source == 'cosegmentation')
  elif source == 'grid':
    # Made once here, so that what cannot be is refused before training.
    mask_px = canvases.images.shape[1]
    num_ids = int(baselines.grid_masks(1, mask_px, **settings).max()) + 1
  elif source == 'felzenszwalb':
    baselines.felzenszwalb_masks(np.empty((0, 1, 1, 3), np.uint8), **settings)
    num_ids = settings['max_parts']
  else:
    if canvases.part_ids is None:
      raise UserError(
        f"config.parts.source is 'annotated', but {canvases.name} has no part "
        'masks: choose another source'
      )
    num_ids = int(canvases.part_ids.max()) + 1
  return Plan(
    source=source,
    settings=settings,
    rounds=rounds,
    path=path,
    keypoints=keypoints,
    view=view,
    view_px=view_px,
    batch_size=batch_size,
    seed=seed,
    num_ids=num_ids,
  )


def without_encoder(
  plan: Plan, canvases: Canvases, progress: bool
) -> np.ndarray:
  """[N, R, R] uint8 masks of a plan that asks no encoder."""
  if plan.source == 'grid':
    count, mask_px = canvases.images.shape[:2]
    return baselines.grid_masks(count, mask_px, **plan.settings)
  if plan.source == 'felzenszwalb':
    return baselines.felzenszwalb_masks(
      canvases.images, progress=progress, **plan.settings
    )
  return canvases.part_ids
