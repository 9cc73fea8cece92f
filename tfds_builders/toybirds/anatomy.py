"""The shape of a toy bird: polygons in the bird's own frame.

Lengths are in units of that frame, in which the body is about 0.75 long and
the whole bird about 1.4; x points to the beak and y down. Nothing here is
random: what varies between two birds of a species is in `Pose`.
"""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tfds_builders.toybirds import species as species_lib

PART_NAMES = (
  'background',
  'body',
  'head',
  'crown',
  'beak',
  'wing',
  'wing_bars',
  'tail',
  'tail_band',
  'breast_spots',
  'legs',
)
_PART = {name: i for i, name in enumerate(PART_NAMES)}

RGB = tuple[int, int, int]


class Shape(NamedTuple):
  """A polygon of one colour: points [N, 2], part id, RGB in 0..255."""

  points: np.ndarray
  part: int
  colour: RGB


class Pose(NamedTuple):
  """What varies between two birds of one species, as seen by the viewer.

  Attributes:
    tilt: turn of the whole bird, radians clockwise (as every angle here, for a
      bird that looks to the right).
    yaw: foreshortening of body, tail and wing along the body, 1 for none.
    tail_angle: turn of the tail against the body.
    wing_angle: turn of the wing against the body.
    head_angle: nod of the head, against the horizon.
    head_shift: [2] displacement of the head.
    gaze: 1 where the head looks forwards, -1 backwards.
    beak_yaw: foreshortening of the beak, 1 for none.
    sizes: relative size of each of `SIZED`.
    spots: [12, 2] displacement of the breast spots.
    plumage: colour of each of `PLUMAGE`.
    part_hsv: hue shift in degrees, saturation and value of each of `COLOURED`.
  """

  tilt: float
  yaw: float
  tail_angle: float
  wing_angle: float
  head_angle: float
  head_shift: np.ndarray
  gaze: float
  beak_yaw: float
  sizes: dict[str, float]
  spots: np.ndarray
  plumage: dict[str, RGB]
  part_hsv: dict[str, tuple[float, float, float]]


SIZED = (
  'body',
  'head',
  'crown',
  'beak',
  'wing',
  'bars',
  'tail',
  'fan',
  'band',
  'spots',
  'legs',
)
PLUMAGE = ('body', 'belly', 'wing', 'tail', 'head')
COLOURED = ('crown', 'beak', 'wing_bars', 'tail_band', 'breast_spots')


def rgb(hue_deg: float, saturation: float, value: float) -> RGB:
  """RGB in 0..255 of a hue in degrees, saturation and value in 0..1."""
  channels = colorsys.hsv_to_rgb(hue_deg / 360 % 1, saturation, value)
  return tuple(round(255 * channel) for channel in channels)


def spindle(
  length: float, width: Sequence[float], start: float = 0, stop: float = 1
) -> np.ndarray:
  """Part of a symmetric shape along the x axis, from `start` to `stop`.

  Args:
    length: length of the whole shape.
    width: half-widths at evenly spaced places from one end to the other.
    start: where the part begins, as a fraction of the length.
    stop: where it ends.

  Returns:
    [N, 2] polygon.
  """
  t = np.linspace(start, stop, 7)
  half = np.interp(t, np.linspace(0, 1, len(width)), width)
  upper = np.stack([length * t, -half], 1)
  return np.concatenate([upper, upper[::-1] * (1, -1)])


def ellipse(a: float, b: float, n: int = 20) -> np.ndarray:
  """Polygon [n, 2] of an ellipse around the origin, half-axes a and b."""
  return _circle(n) * (a, b)


@functools.cache
def _circle(n: int) -> np.ndarray:
  angles = np.linspace(0, 2 * np.pi, n, endpoint=False)
  return np.stack([np.cos(angles), np.sin(angles)], 1)


def turned(points: np.ndarray, angle: float, at=(0.0, 0.0)) -> np.ndarray:
  """Turns points clockwise (y is down) about the origin, then moves them."""
  c, s = np.cos(angle), np.sin(angle)
  return points @ np.array([[c, s], [-s, c]]) + at


# Outlines in units of the head's radius, seen from the middle of the head.
_BEAKS = {
  'cone': [(0.7, -0.5), (1.25, -0.25), (1.75, 0.2), (1.2, 0.5), (0.7, 0.6)],
  'dagger': [(0.8, -0.26), (2.45, 0.06), (2.45, 0.14), (0.8, 0.36)],
  'hook': [
    (0.7, -0.45),
    (1.3, -0.5),
    (1.75, -0.2),
    (1.85, 0.3),
    (1.65, 0.85),
    (1.45, 0.35),
    (0.75, 0.4),
  ],
}
_CROWN = np.array(
  [
    (0.85, -0.42),
    (0.7, -0.8),
    (0.35, -1.08),
    (-0.1, -1.2),
    (-0.6, -1.05),
    (-1.0, -0.6),
    (-1.02, -0.15),
    (-0.5, -0.42),
    (0.2, -0.48),
  ]
)
_TAIL = (0.07, 0.09, 0.11, 0.13, 0.145)
_WING = (0.02, 0.105, 0.14, 0.145, 0.13, 0.1, 0.06, 0.01)
# Lattice over the breast, so that dots don't touch.
_SPOTS = np.array(
  [
    (x + 0.035 * (row % 2), y)
    for row, y in enumerate((-0.015, 0.06, 0.135))
    for x in (0.1, 0.175, 0.25)
  ]
  + [(0.04, 0.2), (0.115, 0.2), (0.19, 0.2)]
)
_SPOT_CHOICE = {
  'sparse': [0, 2, 4, 7, 11],
  'dense': list(range(12)),
}
_LEG = np.array([(-0.014, 0), (0.014, 0), (0.014, 1), (-0.014, 1)])
_FOOT = np.array([(-0.04, 0.92), (0.07, 0.96), (0.07, 1.08), (-0.04, 1.08)])
_HEAD_RADIUS = 0.21
_LEG_COLOUR = (70, 60, 52)
_EYE_COLOURS = ((205, 200, 190), (18, 16, 16))


def bird_shapes(species: species_lib.Species, pose: Pose) -> list[Shape]:
  """The polygons of a bird in its own frame, from back to front."""
  return [
    *_legs(pose),
    *_tail(species, pose),
    *_body(species, pose),
    *_wing(species, pose),
    *_head(species, pose),
  ]


def outline(shapes: Sequence[Shape], pose: Pose) -> np.ndarray:
  """Points [N, 2] whose extent depends on the pose, not on the species.

  Beaks differ in length, so that every bird is measured with the longest.
  """
  points = [s.points for s in shapes if s.part != _PART['beak']]
  return np.concatenate([*points, _beak('dagger', pose)])


def _part_colour(pose: Pose, part: str, colour: str) -> RGB:
  shift, saturation, value = pose.part_hsv[part]
  return rgb(species_lib.HUES[colour] + shift, saturation, value)


def _legs(pose: Pose) -> list[Shape]:
  scale = (1, 0.27 * pose.sizes['legs'])
  # Legs stay upright in the image however the body tilts.
  return [
    Shape(
      turned(points * scale, -pose.tilt, (x, 0.12)), _PART['legs'], _LEG_COLOUR
    )
    for x in (-0.06, 0.07)
    for points in (_LEG, _FOOT)
  ]


def _tail(species: species_lib.Species, pose: Pose) -> list[Shape]:
  length = 0.4 * pose.sizes['tail']
  width = np.multiply(_TAIL, pose.sizes['fan'])
  band = 0.5 * pose.sizes['band']

  def piece(start, stop, part, colour):
    points = spindle(length, width, start, stop) * (-1, 1)
    points = turned(points, pose.tail_angle, (-0.26, 0.03))
    return Shape(points * (pose.yaw, 1), _PART[part], colour)

  shapes = [piece(0, 1, 'tail', pose.plumage['tail'])]
  if species.tail_band:
    colour = _part_colour(pose, 'tail_band', species.tail_band)
    shapes.append(piece(0.9 - band, 0.9, 'tail_band', colour))
  return shapes


def _head_at(pose: Pose) -> np.ndarray:
  return np.array([0.29 * pose.yaw, -0.25]) + pose.head_shift


def _body(species: species_lib.Species, pose: Pose) -> list[Shape]:
  size = pose.sizes['body']
  trunk = ellipse(0.36 * size * pose.yaw, 0.235 * size, 24)
  belly = ellipse(0.27 * size * pose.yaw, 0.13 * size) + (0.04, 0.09 * size)
  # The neck joins the shoulders to wherever the head has moved.
  x, y = _head_at(pose)
  neck = np.array(
    [
      (x - 0.14, y),
      (x + 0.14, y + 0.04),
      (0.31 * pose.yaw, 0.08),
      (-0.16, -0.1),
    ]
  )
  body = _PART['body']
  shapes = [
    Shape(neck, body, pose.plumage['body']),
    Shape(trunk, body, pose.plumage['body']),
    Shape(belly, body, pose.plumage['belly']),
  ]
  density, colour = species.breast_spots
  if colour:
    dot = ellipse(*[0.036 * pose.sizes['spots']] * 2, 8)
    centres = (_SPOTS + pose.spots)[_SPOT_CHOICE[density]]
    shapes += [
      Shape(
        dot + centre * (pose.yaw * size, size),
        _PART['breast_spots'],
        _part_colour(pose, 'breast_spots', colour),
      )
      for centre in centres
    ]
  return shapes


def _wing(species: species_lib.Species, pose: Pose) -> list[Shape]:
  length = 0.52 * pose.sizes['wing']
  width = np.multiply(_WING, pose.sizes['wing'])
  bar = 0.18 * pose.sizes['bars']

  def piece(start, stop, part, colour):
    points = spindle(length, width, start, stop) * (-1, 1)
    # Bars slant with the rows of feathers.
    points[:, 0] -= 0.35 * points[:, 1] * (part == 'wing_bars')
    points = turned(points, -0.2 + pose.wing_angle, (0.1, -0.09))
    return Shape(points * (pose.yaw, 1), _PART[part], colour)

  shapes = [piece(0, 1, 'wing', pose.plumage['wing'])]
  count, colour = species.wing_bars
  for start in (0.3, 0.58)[:count]:
    bar_colour = _part_colour(pose, 'wing_bars', colour)
    shapes.append(piece(start, start + bar, 'wing_bars', bar_colour))
  return shapes


def _on_head(points: np.ndarray, pose: Pose) -> np.ndarray:
  """Moves points in units of the head's radius to where the head is."""
  scaled = points * (_HEAD_RADIUS * pose.sizes['head'])
  nodded = turned(
    scaled * (pose.gaze, 1), pose.gaze * pose.head_angle - pose.tilt
  )
  return nodded + _head_at(pose)


def _beak(shape: str, pose: Pose) -> np.ndarray:
  root = (0.8, 0.1)
  points = (_BEAKS[shape] - np.array(root)) * pose.sizes['beak']
  return _on_head((points + root) * (pose.beak_yaw, 1), pose)


def _head(species: species_lib.Species, pose: Pose) -> list[Shape]:
  crown = _CROWN * (1, pose.sizes['crown'])
  eye = np.array([0.42, -0.08])
  head = _PART['head']
  return [
    Shape(
      _beak(species.beak.shape, pose),
      _PART['beak'],
      _part_colour(pose, 'beak', species.beak.colour),
    ),
    Shape(_on_head(ellipse(1, 1), pose), head, pose.plumage['head']),
    Shape(
      _on_head(crown, pose),
      _PART['crown'],
      _part_colour(pose, 'crown', species.crown),
    ),
    *(
      Shape(_on_head(ellipse(r, r, 10) + eye, pose), head, colour)
      for r, colour in zip((0.25, 0.16), _EYE_COLOURS)
    ),
  ]
