import numpy as np
import pytest

from cmd_jax.evaluators import validation
from cmd_jax.evaluators.features import Features


def _features(vectors, labels):
  names = tuple(map(str, range(len(labels))))
  vectors = np.asarray(vectors, np.float32)
  return Features(vectors, np.asarray(labels, np.int32), tuple('abcd'), names)


def test_of_few_images_all_are_looked_at():
  labels = np.repeat([0, 1, 2, 3, -1], [10, 5, 2, 1, 7])
  np.testing.assert_array_equal(validation.choose_images(labels), np.arange(25))


def test_of_many_images_those_with_labels_are_looked_at_first():
  labels = np.full(3 * validation.MAX_IMAGES, -1)
  labels[::100] = 0
  rows = validation.choose_images(labels)
  assert len(rows) == validation.MAX_IMAGES
  assert (np.diff(rows) > 0).all()
  assert set(np.flatnonzero(labels == 0)) <= set(rows)
  # Spread over the whole set.
  assert rows[-1] > 2.9 * validation.MAX_IMAGES
  np.testing.assert_array_equal(rows, validation.choose_images(labels))


@pytest.mark.parametrize(
  'labels, can', [([0, 1, -1, -1], False), ([0, 1, 1], True), ([-1], False)]
)
def test_a_question_needs_two_images_of_a_class(labels, can):
  assert validation.can_ask(np.array(labels)) == can


def test_images_ask_each_other():
  # 0 and 1 are neighbours of one class, 3 is of it too and nearest to 2. The
  # classes of 2 and of 4 are theirs alone, and 5 has none.
  vectors = [[1, 0], [1, 0.1], [0, 1], [0.1, 1], [-1, -1], [-1, -1.1]]
  images = _features(vectors, [0, 0, 1, 0, 2, -1])
  scores = validation.score_labelled(images, None)
  assert scores['rank1'] == pytest.approx(2 / 3)
  assert set(scores) == {'knn', 'rank1'}
  assert scores['knn'] == pytest.approx(2 / 3)
  alone = _features(vectors[:3], [0, 1, -1])
  assert validation.score_labelled(alone, None) == {}


def test_held_out_labels_are_asked_for():
  train = _features([[1, 0], [1, 0.1], [0, 1], [0, 2]], [0, 0, 1, -1])
  # The nearest of the third has no label; then the one of class 1 is.
  queries = _features([[2, 0], [0, 1], [0, 2], [1, 1]], [0, 0, 1, -1])
  scores = validation.score_labelled(train, queries)
  assert scores['rank1'] == pytest.approx(2 / 3)
  assert scores['knn'] == pytest.approx(2 / 3)
  nobody = queries._replace(labels=np.full(4, -1, np.int32))
  assert validation.score_labelled(train, nobody) == {}
  assert validation.score_labelled(nobody, queries) == {}


def test_neighbours_that_stay_are_counted():
  vectors = np.array([[1, 0], [9, 1], [0, 2], [-1, 8]], np.float32)
  scores, nearest = validation.score_unlabelled(vectors, None)
  assert scores.keys() == {'rankme'}
  scores, _ = validation.score_unlabelled(vectors, nearest)
  assert scores['stable_neighbours'] == 1
  moved = vectors[[0, 2, 1, 3]]
  scores, _ = validation.score_unlabelled(moved, nearest)
  assert scores['stable_neighbours'] == 0
  # Of other images nothing is known.
  scores, _ = validation.score_unlabelled(vectors, nearest[:3])
  assert 'stable_neighbours' not in scores
