from __future__ import annotations

import numpy as np
import pytest

from cmd_jax.data.canvas import Canvases
from cmd_jax.errors import UserError
from cmd_jax.evaluators.attention_hit import annotated_shares, attention_hit
from cmd_jax.evaluators.parts_hit import Keypoints


def _canvases(**annotations) -> Canvases:
  count = len(next(iter(annotations.values()), [0, 0]))
  fields = dict(part_ids=None, boxes=None) | annotations
  return Canvases(
    name='birds/test',
    images=np.zeros((count, 6, 6, 3), np.uint8),
    sizes=np.full((count, 2), 6, np.int32),
    labels=np.zeros(count, np.int32),
    file_names=tuple(map(str, range(count))),
    class_names=('x',),
    skipped=(),
    **fields,
  )


def test_mass_and_peak_by_hand():
  shares = np.array([[[1.0, 0.5], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.25]]])
  attention = np.array([[2.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 5.0]])
  got = attention_hit({'mil': attention}, {'object': shares})
  assert got == pytest.approx(
    {
      'object/mil_mass': ((0.5 + 0.125) + 0.25 * 5 / 8) / 2,
      'object/mil_peak': (1.0 + 0.25) / 2,
      'object/uniform': (1.5 / 4 + 0.25 / 4) / 2,
    }
  )


def test_looking_everywhere_alike_is_the_reference():
  shares = np.random.default_rng(0).random((5, 3, 3))
  got = attention_hit({'mil': np.full((5, 9), 0.2)}, {'box': shares})
  assert got['box/mil_mass'] == pytest.approx(got['box/uniform'])


def test_images_and_annotations_without_anything_are_left_out():
  shares = np.zeros((3, 2, 2))
  shares[1] = 1
  got = attention_hit(
    {'encoder': np.ones((3, 4))}, {'parts': shares, 'box': np.zeros((3, 2, 2))}
  )
  assert got == {
    'parts/encoder_mass': 1,
    'parts/encoder_peak': 1,
    'parts/uniform': 1,
  }


def test_shares_are_areas_of_masks_boxes_and_keypoints():
  part_ids = np.zeros((2, 6, 6), np.uint8)
  part_ids[0, :3, :3] = 4
  part_ids[0, 5, 5] = 2
  boxes = np.float32([[0, 0, 0.5, 0.5], [0.25, 0, 0.75, 1]])
  keypoints = Keypoints(
    np.float32([[[0.1, 0.9], [1.0, 1.0]], [[0.6, 0.2], [0.0, 0.0]]]),
    np.array([[True, True], [True, False]]),
    ('1', '2'),
  )
  canvases = _canvases(part_ids=part_ids, boxes=boxes)
  got = annotated_shares(canvases, (2, 2), part_ids=(2,), keypoints=keypoints)
  assert list(got) == ['object', 'parts', 'box', 'keypoints']
  np.testing.assert_allclose(got['object'][0], [[1, 0], [0, 1 / 9]], rtol=1e-5)
  np.testing.assert_allclose(got['parts'][0], [[0, 0], [0, 1 / 9]], rtol=1e-5)
  assert not got['object'][1].any()
  np.testing.assert_allclose(got['box'][0], [[1, 0], [0, 0]])
  np.testing.assert_allclose(got['box'][1], [[0.5, 0.5], [0.5, 0.5]])
  np.testing.assert_array_equal(got['keypoints'][0], [[0, 1], [0, 1]])
  np.testing.assert_array_equal(got['keypoints'][1], [[0, 0], [1, 0]])


def test_patches_need_not_tile_the_pixels():
  part_ids = np.zeros((1, 6, 6), np.uint8)
  part_ids[0, :2] = 1
  (shares,) = annotated_shares(_canvases(part_ids=part_ids), (4, 4))['object']
  np.testing.assert_allclose(shares[:, 0], [1, 1 / 3, 0, 0], atol=1e-6)
  assert shares.mean() == pytest.approx(1 / 3)


def test_a_split_without_annotations_is_refused():
  with pytest.raises(UserError, match='birds/test has no part masks, boxes'):
    annotated_shares(_canvases(), (2, 2))
