"""Fingerprints, near duplicates and copies."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cmd_jax.data.inspect import near_duplicates
from cmd_jax.data.inspect.twins import find_twins


def _canvases(count, canvas_px=48, seed=0):
  """Different smooth pictures."""
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 256, (count, 7, 7, 3), dtype=np.uint8)
  return np.stack(
    [
      np.asarray(
        Image.fromarray(x).resize(
          (canvas_px, canvas_px), Image.Resampling.BICUBIC
        )
      )
      for x in coarse
    ]
  )


def _pairs(prints):
  blocks = [np.stack(block, 1) for block in near_duplicates.near_pairs(prints)]
  return {tuple(map(int, pair)) for block in blocks for pair in block}


def _prints(hashes):
  """Fingerprints with the given hashes, whose thumbnails are all alike."""
  thumbs = np.tile(np.arange(256, dtype=np.uint8), (len(hashes), 1))
  return near_duplicates.Prints(hashes, thumbs, np.zeros(len(hashes), bool))


def test_hash_is_that_of_a_plain_cosine_transform():
  canvas = _canvases(1, canvas_px=32)[0]
  grey = np.asarray(Image.fromarray(canvas).convert('L')).astype(float)
  coefficients = np.zeros((11, 11))
  x = (2 * np.arange(32) + 1) * np.pi / 64
  for u in range(11):
    for v in range(11):
      coefficients[u, v] = (grey * np.outer(np.cos(u * x), np.cos(v * x))).sum()
  order = sorted(
    ((u, v) for u in range(11) for v in range(11)),
    key=lambda uv: (sum(uv), uv),
  )
  bits = [coefficients[uv] > 0 for uv in order[1:65]]
  (found,) = near_duplicates.make_prints(canvas[None]).hashes
  found = np.unpackbits(np.array([found]).view(np.uint8))
  np.testing.assert_array_equal(found, bits)


@pytest.mark.parametrize('canvas_px', [24, 50, 96])
def test_changed_pictures_are_found_and_different_ones_are_not(canvas_px):
  canvases = _canvases(60, canvas_px)
  images = [Image.fromarray(x) for x in canvases]
  smaller = [x.resize((canvas_px * 2 // 3,) * 2).resize(x.size) for x in images]
  darker = (canvases * 0.8).astype(np.uint8)
  grey = [x.convert('L').convert('RGB') for x in images]
  everything = np.concatenate([canvases, smaller, darker, grey])
  found = _pairs(near_duplicates.make_prints(everything))
  count = len(canvases)
  expected = {
    (a * count + i, b * count + i)
    for i in range(count)
    for a in range(4)
    for b in range(a + 1, 4)
  }
  assert found == expected


def test_rows_are_read_in_the_order_asked_for():
  canvases = _canvases(150)
  rows = np.array([140, 3, 70, 3])
  some = near_duplicates.make_prints(canvases, rows)
  whole = near_duplicates.make_prints(canvases)
  for a, b in zip(some, whole):
    np.testing.assert_array_equal(a, b[rows])


def test_no_images_have_no_duplicates():
  prints = near_duplicates.make_prints(_canvases(1)[:0])
  assert prints.hashes.shape == (0,)
  assert _pairs(prints) == set()


def test_flat_pictures_are_no_duplicates_of_each_other():
  flat = np.repeat(np.arange(0, 250, 50, dtype=np.uint8), 24 * 24 * 3)
  flat = flat.reshape(5, 24, 24, 3)
  grain = np.random.default_rng(0).integers(0, 2, flat.shape, np.uint8)
  prints = near_duplicates.make_prints(np.concatenate([flat, flat + grain]))
  assert prints.is_flat.all()
  assert _pairs(prints) == set()
  assert not near_duplicates.make_prints(_canvases(20)).is_flat.any()


def test_a_near_hash_alone_is_not_enough():
  prints = _prints(np.zeros(2, np.uint64))
  assert _pairs(prints) == {(0, 1)}
  prints.thumbs[1] = prints.thumbs[1, ::-1]
  assert _pairs(prints) == set()


def test_bands_find_all_that_comparing_all_pairs_finds(monkeypatch):
  rng = np.random.default_rng(0)
  hashes = rng.integers(0, 2**64, 40, dtype=np.uint64)
  copies = [hashes]
  for distance in range(1, 15):
    flips = [rng.choice(64, distance, replace=False) for _ in hashes]
    masks = [sum(1 << int(bit) for bit in flip) for flip in flips]
    copies.append(hashes ^ np.array(masks, np.uint64))
  prints = _prints(np.concatenate(copies))
  plain = _pairs(prints)
  assert {(0, 40 * distance) for distance in range(1, 11)} <= plain
  assert (0, 440) not in plain
  monkeypatch.setattr(near_duplicates, '_ALL_PAIRS_UP_TO', 10)
  assert _pairs(prints) == plain
  # Equal hashes share all bands, and are still compared once.
  found = [
    (i, j)
    for rows in near_duplicates._pairs_by_bands(np.zeros(9, np.uint64), False)
    for i, j in zip(*rows)
  ]
  assert len(found) == len(set(found)) == 36


def test_copies_are_equal_byte_for_byte():
  canvases = _canvases(6)
  canvases[4] = canvases[1]
  canvases[5] = canvases[1]
  canvases[3] = canvases[0]
  canvases[3, 0, 0, 0] ^= 1
  prints = near_duplicates.make_prints(canvases)
  assert prints.hashes[3] == prints.hashes[0]
  owner = near_duplicates.first_copies(prints, canvases.__getitem__)
  np.testing.assert_array_equal(owner, [0, 1, 2, 3, 1, 1])


def test_twins_by_split_and_label():
  # A is in both splits, B nearly so, C twice in one, D with two labels.
  canvases = _canvases(5)
  a, b, c, d, e = canvases
  darker = (canvases * 0.9).astype(np.uint8)
  rows = [
    (a, 0, 0), (b, 0, 1), (c, 0, 2), (c, 0, 2), (d, 0, 3), (e, 0, 4),
    (a, 1, 0), (darker[1], 1, 1), (darker[3], 1, 0), (darker[3], 1, -1),
  ]  # fmt: skip
  images, splits, labels = (np.array(x) for x in zip(*rows))
  prints = near_duplicates.make_prints(images)
  owner = near_duplicates.first_copies(prints, images.__getitem__)
  found = find_twins(prints, owner, splits, labels, num_splits=2)
  np.testing.assert_array_equal(
    found.twins,
    np.array(
      [[0, 0, 1, 1, 0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 1, 0, 0, 0, 1, 1]], bool
    ).T,
  )
  np.testing.assert_array_equal(
    found.copies,
    np.array(
      [[0, 0, 1, 1, 0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 1, 1]], bool
    ).T,
  )
  assert np.flatnonzero(found.conflicts).tolist() == [4, 8]
  pairs = {tuple(map(int, pair)): int(d) for pair, d in zip(*found[3:])}
  assert pairs.keys() == {(0, 6), (1, 7), (2, 3), (4, 8), (8, 9)}
  assert [pair for pair, distance in pairs.items() if distance < 0] == [
    (0, 6),
    (2, 3),
    (8, 9),
  ]


def test_flat_copies_are_no_twins():
  images = np.zeros((4, 16, 16, 3), np.uint8)
  prints = near_duplicates.make_prints(images)
  owner = near_duplicates.first_copies(prints, images.__getitem__)
  found = find_twins(
    prints, owner, np.array([0, 0, 1, 1]), np.arange(4), num_splits=2
  )
  assert not found.twins.any() and not len(found.pairs)
