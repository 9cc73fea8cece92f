"""Where a network looks, against annotations: `parts/hit`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cmd_jax.data.canvas import Canvases
from cmd_jax.errors import UserError
from cmd_jax.evaluators.base import Evaluator, Splits
from cmd_jax.evaluators.frozen_network import FrozenNetwork
from cmd_jax.evaluators.parts_hit import Keypoints, read_keypoints

PROTOCOL = 'parts/hit'
# Images whose masks are looked at together: 64 MB at 256 px.
_CHUNK = 256


def make_attention_hit(
  *, part_ids: Sequence[int] = (), keypoints: str = ''
) -> Evaluator:
  """`parts/hit`: how much of a network's attention falls on annotations.

  The test images are looked at whole, or the training images where there are
  none.

  Args:
    part_ids: the parts that tell categories apart; none leaves `parts` out.
    keypoints: path of a table of keypoints, see `parts_hit.read_keypoints`;
      empty leaves `keypoints` out.

  Returns:
    An evaluator, which needs no labels, giving what `attention_hit` gives. It
    raises UserError for a network without attention, and for images without
    annotations.
  """

  def run(network: FrozenNetwork, splits: Splits) -> dict[str, float]:
    split = splits.test or splits.train
    attention = network.attention(split)
    points = None
    if keypoints:
      points = read_keypoints(
        keypoints, split.file_names, np.asarray(split.sizes)
      )
    if not attention:
      raise UserError(
        f'{PROTOCOL}: neither the method nor the encoder has attention: leave '
        'the protocol out'
      )
    side = round(next(iter(attention.values())).shape[1] ** 0.5)
    annotated = annotated_shares(
      split, (side, side), part_ids=part_ids, keypoints=points
    )
    return attention_hit(attention, annotated)

  return Evaluator(PROTOCOL, run, needs_labels=False)


def attention_hit(
  attention: Mapping[str, np.ndarray], annotated: Mapping[str, np.ndarray]
) -> dict[str, float]:
  """`parts/hit`: how much of the attention falls on what is annotated.

  With attention a_i of patch i, which adds up to 1, and the share m_i of the
  patch's area that is annotated,

    mass = sum_i a_i m_i        peak = m_i of the patch with the largest a_i
    uniform = mean_i m_i

  each averaged over the images where anything is annotated. `uniform` is the
  mass, and the expected peak, of a network that looks everywhere alike.

  Args:
    attention: [N, h * w] by the name of what attends; scaled to add up to 1.
    annotated: [N, h, w] shares by the name of the annotation, from
      `annotated_shares`.

  Returns:
    {'<annotation>/<who>_mass', '<annotation>/<who>_peak',
    '<annotation>/uniform'} in [0, 1]; annotations of no image are left out.
  """
  scores = {}
  for what, shares in annotated.items():
    shares = shares.reshape(len(shares), -1).astype(np.float64)
    rows = np.flatnonzero(shares.any(axis=1))
    if not len(rows):
      continue
    shares = shares[rows]
    for who, weights in attention.items():
      weights = np.asarray(weights, np.float64)[rows]
      if weights.shape != shares.shape:
        raise ValueError(
          f'{PROTOCOL}: attention {weights.shape}, annotations {shares.shape}'
        )
      total = np.maximum(weights.sum(axis=1), 1e-30)
      mass = (weights * shares).sum(axis=1) / total
      peak = shares[np.arange(len(rows)), weights.argmax(axis=1)]
      scores[f'{what}/{who}_mass'] = float(mass.mean())
      scores[f'{what}/{who}_peak'] = float(peak.mean())
    scores[f'{what}/uniform'] = float(shares.mean())
  return scores


def annotated_shares(
  canvases: Canvases,
  grid: tuple[int, int],
  *,
  part_ids: Sequence[int] = (),
  keypoints: Keypoints | None = None,
) -> dict[str, np.ndarray]:
  """The share of every patch that each kind of annotation covers.

  Args:
    canvases: a split.
    grid: rows h and columns w of patches over the whole image.
    part_ids: the parts that tell categories apart.
    keypoints: of the split's images.

  Returns:
    [N, h, w] float32 in [0, 1] for each of `object` (any annotated part),
    `parts` (those of `part_ids`), `box`, and `keypoints` (patches with a
    visible one), as far as the split has them.

  Raises:
    UserError: the split has no annotation at all.
  """
  shares = {}
  if canvases.part_ids is not None:
    shares['object'] = _shares_of_masks(canvases.part_ids, grid, None)
    if len(part_ids):
      shares['parts'] = _shares_of_masks(canvases.part_ids, grid, part_ids)
  if canvases.boxes is not None:
    shares['box'] = _shares_of_boxes(np.asarray(canvases.boxes), grid)
  if keypoints is not None:
    shares['keypoints'] = _shares_of_keypoints(keypoints, grid)
  if not shares:
    raise UserError(
      f'{PROTOCOL}: {canvases.name} has no part masks, boxes or keypoints: '
      'leave the protocol out, or give --config.eval.parts_hit.keypoints'
    )
  return shares


def _overlaps(starts: np.ndarray, ends: np.ndarray, count: int) -> np.ndarray:
  """Share of each of `count` equal cells of [0, 1] within intervals [N].

  Returns:
    [N, count].
  """
  edges = np.arange(count + 1) / count
  low = np.maximum(edges[:-1], starts[:, None])
  high = np.minimum(edges[1:], ends[:, None])
  return np.maximum(high - low, 0) * count


def _shares_of_boxes(boxes: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
  top, left, bottom, right = boxes.T
  rows, columns = (
    _overlaps(top, bottom, grid[0]),
    _overlaps(left, right, grid[1]),
  )
  return np.float32(rows[:, :, None] * columns[:, None])


def _shares_of_masks(
  part_ids: np.ndarray, grid: tuple[int, int], wanted: Sequence[int] | None
) -> np.ndarray:
  side = part_ids.shape[1]
  edges = np.arange(side + 1) / side
  # A pixel counts for the cells that it overlaps: [side, cells], of the cell.
  rows, columns = (
    _overlaps(edges[:-1], edges[1:], count).astype(np.float32) for count in grid
  )
  blocks = []
  for start in range(0, len(part_ids), _CHUNK):
    ids = np.asarray(part_ids[start : start + _CHUNK])
    masks = ids > 0 if wanted is None else np.isin(ids, wanted)
    blocks.append(rows.T @ masks.astype(np.float32) @ columns)
  return np.concatenate(blocks)


def _shares_of_keypoints(
  keypoints: Keypoints, grid: tuple[int, int]
) -> np.ndarray:
  positions = np.where(keypoints.visible[..., None], keypoints.positions, 0)
  cells = np.minimum((positions * grid).astype(int), np.array(grid) - 1)
  shares = np.zeros((len(positions), *grid), np.float32)
  images, kinds = np.nonzero(keypoints.visible)
  shares[images, cells[images, kinds, 0], cells[images, kinds, 1]] = 1
  return shares
