from __future__ import annotations

import numpy as np
import pytest

from cmd_jax import errors
from cmd_jax.evaluators import parts_hit
from cmd_jax.evaluators.parts_hit import Keypoints, make_parts_hit

# Four images of four pixels: parts 1, 2 above, 3 and the background below.
_QUARTERS = np.tile(np.array([[1, 2], [3, 0]], np.uint8), (4, 1, 1))
_PLACES = {1: (0.2, 0.3), 2: (0.0, 1.0), 3: (0.5, 0.49), 0: (1.0, 0.5)}


def _keypoints(hits):
  """Keypoints that hit the given parts of _QUARTERS; None is not visible."""
  visible = np.array([[part is not None for part in row] for row in hits])
  positions = np.array(
    [[_PLACES.get(part, (np.nan, 7.0)) for part in row] for row in hits],
    np.float32,
  )
  kinds = tuple(f'kind {number}' for number in range(visible.shape[1]))
  return Keypoints(positions, visible, kinds)


def test_scores_are_their_formulas():
  hits = [
    [1, 2, 0, None],
    [1, 2, 0, None],
    [2, 2, 3, None],
    [0, None, 3, None],
  ]
  scores = make_parts_hit()(_QUARTERS, _keypoints(hits))
  # n(k, p) by kind: {1: 2, 2: 1, 0: 1}, {2: 3}, {3: 2, 0: 2}.
  assert scores['coverage'] == pytest.approx(8 / 11)
  assert scores['purity'] == pytest.approx((2 + 3 + 2) / 8)
  assert scores['completeness'] == pytest.approx((2 / 4 + 3 / 3 + 2 / 4) / 3)


def test_chance_is_the_mean_over_all_permutations_within_images():
  # With both orders of two kinds, image by image: n is [[a, b], [b, a]].
  hits = [[1, 2, None], [1, 2, None], [1, 2, None]]
  scores = make_parts_hit(num_permutations=4000)(
    _QUARTERS[:3], _keypoints(hits)
  )
  assert scores['purity'] == scores['completeness'] == 1
  # All three alike with probability 1/4, else two of three.
  expected = 1 / 4 + 3 / 4 * 2 / 3
  # The standard error is 0.0023.
  assert scores['purity_chance'] == pytest.approx(expected, abs=0.01)
  assert scores['completeness_chance'] == pytest.approx(expected, abs=0.01)


def test_one_part_is_complete_but_no_better_than_chance():
  hits = [[1, 1, None], [1, 1, 1], [1, 1, 1], [1, 1, None]]
  scores = make_parts_hit()(_QUARTERS, _keypoints(hits))
  assert scores == pytest.approx(
    {
      'purity': 0.4,
      'completeness': 1.0,
      'coverage': 1.0,
      'purity_chance': 0.4,
      'completeness_chance': 1.0,
      'purity_layout': 0.4,
      'completeness_layout': 1.0,
    }
  )


def test_layout_is_the_mean_over_all_exchanges_of_masks():
  masks = np.array([[[1, 2]], [[3, 1]]], np.uint8)
  positions = np.array([[[0, 0.2], [0, 0.7]], [[0, 0.7], [0, 0]]], np.float32)
  visible = np.array([[True, True], [True, False]])
  keypoints = Keypoints(positions, visible, ('eye', 'tail'))
  scores = make_parts_hit(num_permutations=4000)(masks, keypoints)
  assert scores['purity'] == scores['completeness'] == 1
  # Exchanged, the eyes hit parts 3 and 2, and the tail hits 1.
  assert scores['purity_layout'] == 1
  # The standard error is 0.002.
  assert scores['completeness_layout'] == pytest.approx(
    (1 + (1 / 2 + 1) / 2) / 2, abs=0.01
  )
  # Masks that do not look at the image tell no more than their layout.
  masks[1] = masks[0]
  scores = make_parts_hit()(masks, keypoints)
  for name in ('purity', 'completeness'):
    assert scores[name] == pytest.approx(scores[f'{name}_layout'])
    assert scores[name] < 1


def test_parts_that_mean_nothing_across_images_score_as_by_chance():
  rng = np.random.default_rng(0)
  hits = np.array([rng.permutation(np.arange(4)) for _ in range(400)])
  masks = np.tile(_QUARTERS[:1], (400, 1, 1))
  scores = make_parts_hit()(masks, _keypoints(hits.tolist()))
  for name in ('purity', 'completeness'):
    assert scores[name] == pytest.approx(scores[f'{name}_chance'], abs=0.03)
    assert 0.15 < scores[name] < 0.4


def test_background_alone_is_finite():
  scores = make_parts_hit()(0 * _QUARTERS, _keypoints([[1, 2]] * 4))
  assert set(scores.values()) == {0.0}


def test_seed_decides():
  keypoints = _keypoints([[1, 2, 3], [2, 1, 3], [1, 2, 0], [1, 3, 2]])
  one, again, other = (
    make_parts_hit(num_permutations=1, seed=seed)(_QUARTERS, keypoints)
    for seed in (0, 0, 3)
  )
  assert one == again != other


def _write(tmp_path, *rows):
  path = tmp_path / 'parts.csv'
  path.write_text('\n'.join(['file,part_id,x,y,visible', *rows]) + '\n')
  return path


def test_reads_points_of_the_images_asked_for(tmp_path):
  path = _write(
    tmp_path,
    'b/2.jpg,10,30,5,1',
    'a/1.jpg,2,100,40,1',
    'other.jpg,3,9999,0,1',
    'b/2.jpg,2,0,0,0',
    'b/2.jpg,9,6.25,0,1',
  )
  sizes = np.array([[40, 100], [10, 50], [8, 8]])
  keypoints = parts_hit.read_keypoints(path, ['a/1.jpg', 'b/2.jpg', 'c'], sizes)
  assert keypoints.kinds == ('2', '9', '10')
  np.testing.assert_array_equal(
    keypoints.visible, [[1, 0, 0], [0, 1, 1], [0, 0, 0]]
  )
  np.testing.assert_allclose(keypoints.positions[0, 0], [1, 1])
  np.testing.assert_allclose(
    keypoints.positions[1, 1:], [[0, 1 / 8], [0.5, 0.6]]
  )


@pytest.mark.parametrize(
  'rows, words',
  [
    (['a,1,101,5,1'], ['line 2', '101', '100 x 40']),
    (['a,1,5,5,1', 'a,beak,5,5,1'], ['line 3', 'whole numbers']),
    (['a,1,5,5'], ['line 2', 'whole numbers']),
    (['b,1,5,5,1'], ['no visible keypoint', "'a'"]),
    (['a,1,5,5,0'], ['no visible keypoint']),
  ],
)
def test_bad_tables_are_explained(tmp_path, rows, words):
  with pytest.raises(errors.UserError) as caught:
    parts_hit.read_keypoints(
      _write(tmp_path, *rows), ['a'], np.array([[40, 100]])
    )
  assert all(word in str(caught.value) for word in words)


def test_bad_files_are_explained(tmp_path):
  path = tmp_path / 'none.csv'
  with pytest.raises(errors.UserError, match='cannot read'):
    parts_hit.read_keypoints(path, ['a'], np.array([[4, 4]]))
  path.write_text('file,x,y\n')
  with pytest.raises(errors.UserError, match='no column part_id, visible'):
    parts_hit.read_keypoints(path, ['a'], np.array([[4, 4]]))


def test_what_cannot_be_scored_is_refused():
  keypoints = _keypoints([[1, None]] * 4)
  with pytest.raises(ValueError, match='masks'):
    make_parts_hit()(_QUARTERS[:3], keypoints)
  hidden = keypoints._replace(visible=np.zeros((4, 2), bool))
  with pytest.raises(errors.UserError, match='no keypoint is visible'):
    make_parts_hit()(_QUARTERS, hidden)
  with pytest.raises(ValueError, match='num_permutations'):
    make_parts_hit(num_permutations=0)
