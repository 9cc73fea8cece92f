"""Draws toy birds: polygons, a cluttered ground, and a map of the parts.

A drawing is made in two steps. First everything that does not depend on the
species (pose, sizes, shades, light, clutter, twigs) is drawn from the random
generator, always in the same order and amount. Then the bird is put together
from the species' parts without using the generator again. Two species drawn
from equal generators therefore differ only in their parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from tfds_builders.toybirds import anatomy
from tfds_builders.toybirds import species as species_lib
from tfds_builders.toybirds.anatomy import PART_NAMES as PART_NAMES
from tfds_builders.toybirds.anatomy import Shape

Range = tuple[float, float]


class RenderConfig(NamedTuple):
  """How strongly the things vary that say nothing of the species.

  Ranges are (low, high) of a uniform distribution; single numbers are the
  half-width of a symmetric one around 0, or around 1 for factors.

  Attributes:
    fill: longer side of the whole bird as a fraction of the image's side.
    flip: probability that the bird looks to the left.
    yaw: foreshortening of the body and tail along its axis, 1 for none.
    tilt_deg: turn of the whole bird in the image, degrees; negative lifts the
      breast.
    tail_deg: angle of the tail against the body, degrees.
    wing_deg: angle of the wing against the body, degrees.
    head_deg: nod of the head against the horizon, degrees.
    head_shift: displacement of the head, as a fraction of the body's length.
    look_back: probability that the head looks backwards.
    beak_yaw: foreshortening of the beak, 1 for none.
    size: relative variation of the size of every part.
    part_hue_deg: variation of each part's hue, degrees.
    part_value: range of each part's HSV value.
    part_saturation: range of each part's HSV saturation.
    body_value: range of the HSV value of the plumage.
    body_saturation: range of the HSV saturation of the plumage.
    ground_value: range of the HSV value of the ground.
    clutter_value: range of the HSV value of each leaf and stalk on it.
    ground_saturation: range of the saturation of ground, clutter and twigs.
    ground_noise: amplitude of the ground's noise, as a fraction of white.
    clutter: least and greatest number of leaves and stalks behind the bird.
    twigs: least and greatest number of twigs in front of the bird.
    twig_width: thickness of a twig as a fraction of the image's side.
    gain: range of the brightness factor of the light.
    gradient: greatest change of the light from the middle to an edge.
    tint: relative variation of the light's red, green and blue.
    grain: standard deviation of the sensor noise, as a fraction of white.
  """

  fill: Range = (0.6, 0.95)
  flip: float = 0.5
  yaw: Range = (0.8, 1.0)
  tilt_deg: Range = (-45.0, 5.0)
  tail_deg: float = 25.0
  wing_deg: float = 9.0
  head_deg: float = 16.0
  head_shift: float = 0.05
  look_back: float = 0.2
  beak_yaw: Range = (0.75, 1.0)
  size: float = 0.12
  part_hue_deg: float = 8.0
  part_value: Range = (0.8, 1.0)
  part_saturation: Range = (0.8, 1.0)
  body_value: Range = (0.45, 0.65)
  body_saturation: Range = (0.0, 0.06)
  ground_value: Range = (0.4, 0.6)
  clutter_value: Range = (0.15, 0.9)
  ground_saturation: Range = (0.0, 0.06)
  ground_noise: float = 0.1
  clutter: tuple[int, int] = (8, 16)
  twigs: tuple[int, int] = (0, 2)
  twig_width: Range = (0.015, 0.035)
  gain: Range = (0.5, 1.25)
  gradient: float = 0.4
  tint: float = 0.02
  grain: float = 0.02


class Drawing(NamedTuple):
  """A drawn bird.

  Attributes:
    image: [H, W, 3] uint8 RGB.
    part_ids: [H, W] uint8 index into `PART_NAMES`; whatever a twig covers is
      background.
    box: [4] float32 (top, left, bottom, right), the smallest box around the
      pixels that are not background, as fractions of the height and width.
  """

  image: np.ndarray
  part_ids: np.ndarray
  box: np.ndarray


def draw_bird(
  species_id: int,
  rng: np.random.Generator,
  px: int,
  config: RenderConfig = RenderConfig(),  # noqa: B008
) -> Drawing:
  """Draws one bird.

  Equal generators give the same scene at every size and for every species, up
  to the species' parts and the sensor noise (which is drawn last, per pixel).

  Args:
    species_id: index into `species.SPECIES`.
    rng: source of all randomness of the drawing; advanced.
    px: side of the image, pixels.
    config: strength of the variation.

  Returns:
    The image, its part ids and the bird's box.
  """
  species = species_lib.SPECIES[species_id]
  # Supersampling that pays off falls with the resolution.
  side = px * (3 if px <= 64 else 2)
  pose = _draw_pose(rng, config)
  place = _draw_place(rng, config)
  ground, clutter = _draw_ground(rng, config)
  twigs = _draw_twigs(rng, config)
  light = _draw_light(rng, px, config)

  image = Image.fromarray(ground).resize((side, side), Image.Resampling.BICUBIC)
  part_ids = Image.new('L', (side, side))
  brush, part_brush = ImageDraw.Draw(image), ImageDraw.Draw(part_ids)
  bird = _placed(anatomy.bird_shapes(species, pose), pose, place)
  for shape in (*clutter, *bird, *twigs):
    points = (shape.points * side).ravel().tolist()
    brush.polygon(points, shape.colour)
    part_brush.polygon(points, shape.part)

  pixels = np.asarray(image.reduce(side // px), np.float32) * light
  pixels += rng.normal(0, 255 * config.grain, (px, px, 1)).astype(np.float32)
  small = np.asarray(part_ids.resize((px, px), Image.Resampling.NEAREST))
  return Drawing(
    image=np.clip(pixels + 0.5, 0, 255).astype(np.uint8),
    part_ids=small,
    box=_tight_box(small),
  )


def _tight_box(part_ids: np.ndarray) -> np.ndarray:
  rows = np.flatnonzero(part_ids.any(1))
  columns = np.flatnonzero(part_ids.any(0))
  edges = [rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]
  return np.asarray(edges, np.float32) / np.float32(len(part_ids))


class _Place(NamedTuple):
  """Where the bird is: see `RenderConfig.fill` and `flip`."""

  fill: float
  spare: np.ndarray  # [2] in 0..1, share of the free room left of and above it
  mirror: float


def _symmetric(
  rng: np.random.Generator, half_width: float, size: int | tuple | None = None
) -> np.ndarray | float:
  return rng.uniform(-half_width, half_width, size)


def _draw_pose(rng: np.random.Generator, config: RenderConfig) -> anatomy.Pose:
  hue, saturation = rng.uniform(15, 100), rng.uniform(*config.body_saturation)
  value = rng.uniform(*config.body_value)
  # In the order of `anatomy.PLUMAGE`.
  shades = rng.uniform(
    (-0.02, 0.05, -0.22, -0.18, -0.1), (0.02, 0.2, -0.1, 0, 0)
  )
  plumage = [
    anatomy.rgb(hue, saturation, float(np.clip(value + shade, 0.12, 1)))
    for shade in shades
  ]
  n = len(anatomy.COLOURED)
  part_hsv = zip(
    _symmetric(rng, config.part_hue_deg, n).tolist(),
    rng.uniform(*config.part_saturation, n).tolist(),
    rng.uniform(*config.part_value, n).tolist(),
  )
  sizes = 1 + _symmetric(rng, config.size, len(anatomy.SIZED))
  return anatomy.Pose(
    tilt=np.radians(rng.uniform(*config.tilt_deg)),
    yaw=rng.uniform(*config.yaw),
    tail_angle=_symmetric(rng, np.radians(config.tail_deg)),
    wing_angle=_symmetric(rng, np.radians(config.wing_deg)),
    head_angle=_symmetric(rng, np.radians(config.head_deg)),
    head_shift=_symmetric(rng, config.head_shift, 2),
    gaze=-1.0 if rng.random() < config.look_back else 1.0,
    beak_yaw=rng.uniform(*config.beak_yaw),
    sizes=dict(zip(anatomy.SIZED, sizes.tolist())),
    spots=_symmetric(rng, 0.012, (12, 2)),
    plumage=dict(zip(anatomy.PLUMAGE, plumage)),
    part_hsv=dict(zip(anatomy.COLOURED, part_hsv)),
  )


def _draw_place(rng: np.random.Generator, config: RenderConfig) -> _Place:
  return _Place(
    fill=rng.uniform(*config.fill),
    spare=rng.uniform(0, 1, 2),
    mirror=-1.0 if rng.random() < config.flip else 1.0,
  )


def _placed(
  shapes: list[Shape], pose: anatomy.Pose, place: _Place
) -> Iterator[Shape]:
  """Takes shapes from the bird's frame to fractions of the image's side."""
  flip = np.array([place.mirror, 1.0])
  outline = anatomy.turned(anatomy.outline(shapes, pose), pose.tilt) * flip
  low, high = outline.min(0), outline.max(0)
  scale = place.fill / (high - low).max()
  corner = (1 - scale * (high - low)) * place.spare
  for shape in shapes:
    points = anatomy.turned(shape.points, pose.tilt) * flip
    yield shape._replace(points=(points - low) * scale + corner)


# Sides of the noise's octaves and their amplitudes. The largest is the side of
# the ground before it is enlarged; none depends on the resolution, so that the
# draws don't either.
_OCTAVES = {4: 1.0, 8: 0.9, 16: 0.7, 64: 0.35}


def _draw_ground(
  rng: np.random.Generator, config: RenderConfig
) -> tuple[np.ndarray, list[Shape]]:
  """Noise [64, 64, 3] uint8 and the clutter of leaves and stalks before it."""
  base = anatomy.rgb(
    rng.uniform(20, 150),
    rng.uniform(*config.ground_saturation),
    rng.uniform(*config.ground_value),
  )
  side = max(_OCTAVES)
  noise = np.zeros((side, side), np.float32)
  for octave, amplitude in _OCTAVES.items():
    grid = rng.standard_normal((octave, octave), np.float32)
    image = Image.fromarray(grid).resize((side,) * 2, Image.Resampling.BILINEAR)
    noise += amplitude * np.asarray(image)
  ground = np.asarray(base) + 255 * config.ground_noise * noise[..., None]
  least, most = config.clutter
  leaves = _leaves(
    rng, rng.integers(least, most + 1), (0.05, 0.4), (0.08, 0.4), config
  )
  return np.clip(ground, 0, 255).astype(np.uint8), leaves


def _leaves(
  rng: np.random.Generator,
  n: int,
  length: Range,
  slimness: Range,
  config: RenderConfig,
) -> list[Shape]:
  """Leaf shapes anywhere in the image; slim ones look like stalks."""
  centres = rng.uniform(-0.05, 1.05, (n, 1, 2))
  angles = rng.uniform(0, np.pi, n)
  lengths = rng.uniform(*length, n)
  widths = lengths * rng.uniform(*slimness, n)
  hues = rng.uniform(20, 150, n).tolist()
  saturations = rng.uniform(*config.ground_saturation, n).tolist()
  values = rng.uniform(*config.clutter_value, n).tolist()
  along = np.stack([np.cos(angles), np.sin(angles)], 1) * lengths[:, None]
  across = np.stack([-np.sin(angles), np.cos(angles)], 1) * widths[:, None]
  points = anatomy.ellipse(0.5, 0.5, 10) @ np.stack([along, across], 1)
  return [
    Shape(outline, 0, anatomy.rgb(*hsv))
    for outline, *hsv in zip(points + centres, hues, saturations, values)
  ]


def _draw_twigs(rng: np.random.Generator, config: RenderConfig) -> list[Shape]:
  """Twigs from edge to edge, each with a leaf, in front of the bird."""
  least, most = config.twigs
  shapes = []
  for _ in range(rng.integers(least, most + 1)):
    width = rng.uniform(*config.twig_width)
    points = anatomy.spindle(2.0, (width / 2, width / 3)) - (1, 0)
    points = anatomy.turned(
      points, rng.uniform(0, np.pi), rng.uniform(0.1, 0.9, 2)
    )
    bark = anatomy.rgb(
      rng.uniform(20, 60),
      rng.uniform(*config.ground_saturation),
      rng.uniform(0.15, 0.5),
    )
    shapes.append(Shape(points, 0, bark))
    shapes += _leaves(rng, 1, (0.05, 0.14), (0.3, 0.5), config)
  return shapes


def _draw_light(
  rng: np.random.Generator, px: int, config: RenderConfig
) -> np.ndarray:
  """Factors [px, px, 3] of the light: gain, gradient and tint."""
  direction = rng.uniform(0, 2 * np.pi)
  slope = rng.uniform(0, config.gradient)
  axis = np.linspace(-1, 1, px, dtype=np.float32)
  ramp = np.cos(direction) * axis[:, None] + np.sin(direction) * axis
  gain = rng.uniform(*config.gain)
  tint = 1 + _symmetric(rng, config.tint, 3)
  factors = gain * (1 + slope * ramp)[..., None] * tint
  return factors.astype(np.float32)
