import collections

import numpy as np
import pytest

from tfds_builders.toybirds import render
from tfds_builders.toybirds import toybirds_dataset_builder as builder_lib
from tfds_builders.toybirds.species import HUES, SPECIES, differing_parts

PART_FIELDS = ('crown', 'beak', 'wing_bars', 'tail_band', 'breast_spots')
# Parts that every bird has, and those that only some species have.
COMMON = {'background', 'body', 'head', 'crown', 'beak', 'wing', 'tail', 'legs'}


def _draw(species_id, seed, px=64, config=None):
  rng = np.random.default_rng(seed)
  return render.draw_bird(species_id, rng, px, config or render.RenderConfig())


def _expected_parts(species):
  parts = set(COMMON)
  if species.wing_bars.count:
    parts.add('wing_bars')
  if species.tail_band:
    parts.add('tail_band')
  if species.breast_spots.density != 'none':
    parts.add('breast_spots')
  return parts


def test_species_are_distinct_and_the_nearest_differ_in_one_or_two_parts():
  assert len(SPECIES) == 24
  assert len({s.name for s in SPECIES}) == 24
  looks = np.array(
    [[repr(getattr(s, part)) for part in PART_FIELDS] for s in SPECIES]
  )
  distances = (looks[:, None] != looks[None]).sum(-1)
  np.fill_diagonal(distances, 99)
  assert set(distances.min(1)) == {1, 2}
  for i in (0, 7, 23):
    for j in range(24):
      if i != j:
        parts = differing_parts(SPECIES[i], SPECIES[j])
        assert len(parts) == distances[i, j]


@pytest.mark.parametrize('part', PART_FIELDS)
def test_every_value_of_a_part_occurs_in_several_species(part):
  counts = collections.Counter(getattr(s, part) for s in SPECIES)
  assert len(counts) >= 5
  assert min(counts.values()) >= 3
  assert max(counts.values()) <= 8


def test_hues_stay_apart_under_colour_jitter():
  hues = np.sort(list(HUES.values()))
  gaps = np.diff(np.append(hues, hues[0] + 360))
  assert gaps.min() >= 50


def test_equal_seeds_give_equal_drawings_and_others_differ():
  a, b, c = _draw(5, 1), _draw(5, 1), _draw(5, 2)
  for x, y in zip(a, b):
    np.testing.assert_array_equal(x, y)
  assert np.mean(a.image != c.image) > 0.8


@pytest.mark.parametrize('px', [32, 48, 64, 96, 128, 224])
def test_every_resolution_shows_the_same_scene(px):
  drawing, reference = _draw(3, 4, px), _draw(3, 4, 64)
  assert drawing.image.shape == (px, px, 3)
  assert drawing.image.dtype == np.uint8
  assert drawing.part_ids.shape == (px, px)
  assert drawing.part_ids.dtype == np.uint8
  # Edges are rounded to pixels of 1 / 32 at worst.
  np.testing.assert_allclose(drawing.box, reference.box, atol=0.05)
  np.testing.assert_allclose(
    drawing.image.mean((0, 1)), reference.image.mean((0, 1)), atol=6
  )


def test_species_change_nothing_but_their_parts():
  quiet = render.RenderConfig(grain=0.0)
  own = [
    render.PART_NAMES.index(name)
    for name in ('crown', 'beak', 'wing_bars', 'tail_band', 'breast_spots')
  ]
  for seed in range(8):
    a = _draw(0, seed, config=quiet)
    for species_id in (4, 11, 16, 23):
      b = _draw(species_id, seed, config=quiet)
      parts = np.isin(a.part_ids, own) | np.isin(b.part_ids, own)
      # Antialiasing carries a part's colour to the pixels next to it.
      near = parts.copy()
      for axis in (0, 1):
        for shift in (-1, 1):
          near |= np.roll(near, shift, axis)
      assert parts.any()
      # A part that a twig hides but for a sliver is background in the map.
      changed = (a.image != b.image).any(-1) | (a.part_ids != b.part_ids)
      assert changed[~near].mean() < 0.002
      assert near.mean() < 0.4


def test_drawing_consumes_the_same_randomness_for_every_species():
  after = []
  for species_id in range(24):
    rng = np.random.default_rng(9)
    render.draw_bird(species_id, rng, 32)
    after.append(rng.random())
  assert len(set(after)) == 1


def test_boxes_are_tight_and_within_the_configured_size():
  for seed in range(40):
    drawing = _draw(seed % 24, seed)
    top, left, bottom, right = np.round(drawing.box * 64).astype(int)
    bird = drawing.part_ids > 0
    outside = bird.copy()
    outside[top:bottom, left:right] = False
    assert not outside.any()
    for edge in (
      bird[top],
      bird[bottom - 1],
      bird[:, left],
      bird[:, right - 1],
    ):
      assert edge.any()
    assert max(bottom - top, right - left) <= 0.95 * 64 + 2


def test_all_parts_of_a_species_are_drawn_and_no_others():
  plain = render.RenderConfig(twigs=(0, 0))
  seen = set()
  for species_id, species in enumerate(SPECIES):
    ids = np.unique(_draw(species_id, species_id, config=plain).part_ids)
    names = {render.PART_NAMES[i] for i in ids}
    assert names == _expected_parts(species)
    seen |= names
  assert seen == set(render.PART_NAMES)


def test_parts_have_their_species_colours():
  plain = render.RenderConfig(
    twigs=(0, 0), tint=0.0, gain=(1.0, 1.0), gradient=0.0, grain=0.0
  )
  for species_id, species in enumerate(SPECIES):
    drawing = _draw(species_id, 100 + species_id, 128, plain)
    crown = drawing.part_ids == render.PART_NAMES.index('crown')
    colour = np.median(drawing.image[crown], 0) / 255
    expected = HUES[species.crown]
    # Hue by the hexagon's formula, not by the drawing code's.
    r, g, b = colour
    hue = np.degrees(np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b))
    assert abs((hue - expected + 180) % 360 - 180) < 15, species.name


def test_twigs_hide_parts_and_count_as_background():
  bare = render.RenderConfig(twigs=(0, 0), grain=0.0)
  hidden = 0
  for seed in range(10):
    a = _draw(2, seed, config=bare)
    b = _draw(2, seed, config=bare._replace(twigs=(3, 3)))
    changed = a.part_ids != b.part_ids
    assert not b.part_ids[changed].any()
    hidden += changed.sum()
  assert hidden > 0


def test_raw_pixels_do_not_tell_the_species():
  # Enough to see a gross leak; 1/24 is chance.
  def pixels(split, n):
    drawn = [builder_lib.draw_example(split, i, 32) for i in range(n)]
    images = np.stack([d.image for d, _ in drawn]).reshape(n, -1)
    return images.astype(np.float32) / 255, np.array([y for _, y in drawn])

  train, train_labels = pixels('train', 480)
  test, test_labels = pixels('test', 240)
  distances = (train**2).sum(1) - 2 * test @ train.T
  hits = train_labels[distances.argmin(1)] == test_labels
  assert hits.mean() < 0.11


def test_any_example_can_be_drawn_alone():
  together = [builder_lib.draw_example('train', i, 32) for i in range(30)]
  alone, label = builder_lib.draw_example('train', 29, 32)
  np.testing.assert_array_equal(alone.image, together[29][0].image)
  assert label == together[29][1]
  other_split, _ = builder_lib.draw_example('test', 29, 32)
  assert (other_split.image != alone.image).mean() > 0.8


def test_the_full_splits_are_balanced():
  config = builder_lib.Builder.builder_configs['64px']
  for n in (config.train_examples, config.test_examples):
    assert n % len(SPECIES) == 0
  assert (config.train_examples, config.test_examples) == (2400, 960)
