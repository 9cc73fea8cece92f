from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax import errors
from cmd_jax.evaluators import iou
from cmd_jax.evaluators.part_segmentation import (
  PartMaps,
  make_part_segmentation,
)
from cmd_jax.models import fcn

_DECODER = fcn.make_decoder(num_classes=3, channels=(8,))
_RECIPE = dict(num_steps=40, num_checkpoints=4, learning_rate=0.03)


def _split(count: int, seed: int, noise: float = 0.3) -> PartMaps:
  """Masks of whole cells, and features that tell the part up to noise."""
  rng = np.random.default_rng(seed)
  cells = rng.integers(0, 3, (count, 4, 4))
  codes = np.array([[9, 0, 0, 5], [0, 0.01, 0, 5], [0, 0, 2, 5]])
  scales = np.array([9, 0.01, 2, 0])
  maps = codes[cells] + noise * scales * rng.normal(size=(count, 4, 4, 4))
  masks = cells.repeat(2, axis=1).repeat(2, axis=2)
  return PartMaps(maps.astype(np.float16), masks.astype(np.uint8))


_TRAIN, _TEST = _split(24, 0), _split(12, 1)


@pytest.fixture(scope='module')
def scores() -> dict[str, float]:
  return make_part_segmentation(_DECODER, **_RECIPE)(_TRAIN, _TEST)


def test_learns_what_the_features_tell(scores):
  assert set(scores) == {'miou', 'miou_last'}
  # Interpolation blurs the edges of the cells, so 1 is out of reach; a single
  # predicted class would have 1/9.
  assert scores['miou'] > 0.65 and scores['miou_last'] > 0.65
  rng = np.random.default_rng(2)
  blind = [
    data._replace(maps=rng.normal(size=data.maps.shape).astype(np.float16))
    for data in (_TRAIN, _TEST)
  ]
  assert make_part_segmentation(_DECODER, **_RECIPE)(*blind)['miou'] < 0.3


def test_is_deterministic_and_takes_all_images_by_default(scores):
  again = make_part_segmentation(_DECODER, labelled_images=24, **_RECIPE)
  assert again(_TRAIN, _TEST) == scores
  other = make_part_segmentation(_DECODER, seed=1, **_RECIPE)
  assert other(_TRAIN, _TEST) != scores


def test_features_of_any_scale_score_alike(scores):
  scale = np.array([0.5, 4, 2, 0.25], np.float16)
  wide = [data._replace(maps=data.maps * scale) for data in (_TRAIN, _TEST)]
  ours = make_part_segmentation(_DECODER, **_RECIPE)(*wide)
  assert ours['miou'] == pytest.approx(scores['miou'], abs=1e-3)


def test_fewer_labels_are_a_subset_and_the_others_are_not_looked_at():
  evaluate = make_part_segmentation(_DECODER, labelled_images=6, **_RECIPE)
  expected = evaluate(_TRAIN, _TEST)
  chosen = np.random.default_rng(0).permutation(24)
  garbage = _TRAIN.maps.copy(), _TRAIN.masks.copy()
  for array in garbage:
    array[chosen[6:]] = 1
  assert evaluate(PartMaps(*garbage), _TEST) == expected
  garbage[1][chosen[5]] = 2
  assert evaluate(PartMaps(*garbage), _TEST) != expected


def test_the_order_of_test_images_matters_to_the_folds_alone(scores):
  evaluate = make_part_segmentation(_DECODER, **_RECIPE)
  reversed_test = PartMaps(*(array[::-1] for array in _TEST))
  assert evaluate(_TRAIN, reversed_test)['miou_last'] == pytest.approx(
    scores['miou_last'], abs=1e-6
  )


def test_overlaps_and_mean_iou_are_counts():
  predicted = jnp.array([[[0, 0], [1, 1]], [[2, 2], [0, 0]]])
  masks = jnp.array([[[0, 1], [1, 1]], [[2, 0], [0, 0]]], jnp.uint8)
  intersections, unions = iou.overlaps(predicted, masks, 4)
  np.testing.assert_array_equal(intersections, [[1, 2, 0, 0], [2, 0, 1, 0]])
  np.testing.assert_array_equal(unions, [[2, 3, 0, 0], [3, 0, 2, 0]])
  # Class 3 is nowhere and counts as 0.
  expected = (3 / 5 + 2 / 3 + 1 / 2 + 0) / 4
  assert iou.mean_iou(
    np.asarray(intersections), np.asarray(unions)
  ) == pytest.approx(expected)


def test_a_fold_chooses_and_the_others_are_scored():
  # Eleven images of ten pixels: the checkpoints differ on images 2 and 3, the
  # second fold, and on the last, which is in no fold.
  intersections = np.full((3, 11, 1), 5)
  intersections[0, 2:4] = 1
  intersections[2, 10] = 9
  unions = np.full((3, 11, 1), 10)
  folds = iou.cross_validate(intersections, unions)
  # Elsewhere all are equal, and the first is taken.
  np.testing.assert_array_equal(folds.checkpoint, [0, 1, 0, 0, 0])
  np.testing.assert_allclose(folds.miou, [37 / 90, 0.5, *[37 / 90] * 3])
  with pytest.raises(errors.UserError, match='4 test image'):
    iou.cross_validate(intersections[:, :4], unions[:, :4])


@pytest.mark.parametrize(
  'kwargs, words',
  [
    (dict(num_steps=0), ['num_steps is 0']),
    (dict(batch_size=-1), ['batch_size is -1']),
    (dict(learning_rate=0.0), ['learning_rate is 0.0']),
    (dict(labelled_images=-2), ['labelled_images is -2']),
    (dict(num_steps=3, num_checkpoints=4), ['4 checkpoints', '3 steps']),
  ],
)
def test_wrong_arguments_are_explained(kwargs, words):
  with pytest.raises(errors.UserError) as caught:
    make_part_segmentation(_DECODER, **kwargs)
  assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
  'train, test, words',
  [
    (_split(5, 0), _TEST, ['labelled_images is 6', 'only 5']),
    (
      _TRAIN,
      _TEST._replace(masks=_TEST.masks + 1),
      ['test', 'part 3', '0 to 2'],
    ),
    (
      _TRAIN._replace(maps=np.where(_TRAIN.maps > 10, np.inf, _TRAIN.maps)),
      _TEST,
      ['train', 'not finite'],
    ),
    (PartMaps(*(x[:0] for x in _TRAIN)), _TEST, ['train', 'no images']),
  ],
)
def test_what_cannot_be_scored_is_refused(train, test, words):
  evaluate = make_part_segmentation(_DECODER, labelled_images=6, **_RECIPE)
  with pytest.raises(errors.UserError) as caught:
    evaluate(train, test)
  assert all(word in str(caught.value) for word in words)


def test_mismatched_arrays_are_refused():
  evaluate = make_part_segmentation(_DECODER, **_RECIPE)
  with pytest.raises(ValueError, match=r'masks \[N, H, W\]'):
    evaluate(_TRAIN._replace(masks=_TRAIN.masks[1:]), _TEST)
  with pytest.raises(ValueError, match='maps of train'):
    evaluate(_TRAIN._replace(maps=_TRAIN.maps[..., :3]), _TEST)
