import numpy as np

from cmd_jax.curation.duplicates import NO_GROUP, Duplicates
from cmd_jax.curation.neighbours import ASKED, look_around
from cmd_jax.data.sources.given_labels import Labels
from cmd_jax.evaluators.features import unit_rows
from cmd_jax.evaluators.nearest import find_nearest


def _duplicates(count, *groups):
  numbers, kept = np.full(count, NO_GROUP), np.arange(count)
  for number, rows in enumerate(groups):
    numbers[rows], kept[rows] = number, rows[0]
  none = np.zeros((0, 2), int)
  return Duplicates(none, none[:, 0], np.zeros(0), numbers, kept)


def _nearest(vectors):
  return find_nearest(vectors, vectors, ASKED, own=np.arange(len(vectors)))


def _look(vectors, labels, duplicates=None, voters=None):
  labels = np.array(labels, np.int32)
  names = tuple(map(str, range(labels.max() + 1)))
  nearest = _nearest(vectors)
  return look_around(
    nearest,
    nearest if voters is None else _nearest(voters),
    duplicates or _duplicates(len(vectors)),
    Labels(labels, names, ('',) * len(labels)),
  )


def _classes(count=30, noise=0.25):
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(3, 16))
  labels = np.repeat(np.arange(3), count)
  return unit_rows(
    centres[labels] + noise * rng.normal(size=(3 * count, 16))
  ), labels


def test_labels_that_neighbours_contradict_are_suspected():
  vectors, labels = _classes()
  wrong = [0, 31, 62]
  given = labels.copy()
  given[wrong] = (labels[wrong] + 1) % 3
  given[5] = -1
  found = _look(vectors, given)
  np.testing.assert_array_equal(np.flatnonzero(found.suspected >= 0), wrong)
  np.testing.assert_array_equal(found.suspected[wrong], labels[wrong])
  assert found.margins[wrong].min() > 0.5
  np.testing.assert_allclose(found.shares.sum(1), 1, rtol=1e-6)


def test_those_vote_that_search_finds_and_typical_is_what_cosines_say():
  vectors, labels = _classes()
  wrong = [0, 31, 62]
  given = labels.copy()
  given[wrong] = (labels[wrong] + 1) % 3
  # Nothing is told apart by the plain vectors.
  plain = unit_rows(np.random.default_rng(1).normal(size=vectors.shape))
  found = _look(plain, given, voters=vectors)
  np.testing.assert_array_equal(np.flatnonzero(found.suspected >= 0), wrong)
  np.testing.assert_array_equal(
    found.typicality, _look(plain, labels).typicality
  )


def test_a_class_of_one_image_and_no_labels_are_not_judged():
  vectors, labels = _classes()
  labels[3] = 3
  found = _look(vectors, labels)
  assert found.suspected[3] == -1 and (found.suspected != 3).all()
  none = _look(vectors, np.full(len(vectors), -1))
  assert (none.suspected == -1).all() and (none.margins == 0).all()


def test_duplicates_do_not_vouch_for_each_other():
  vectors, labels = _classes()
  # Three copies of one photograph, all under the same wrong name.
  vectors[1] = vectors[2] = vectors[0]
  labels[:3] = 1
  assert _look(vectors, labels).margins[0] < 0.5
  found = _look(vectors, labels, _duplicates(len(labels), np.arange(3)))
  assert (found.suspected[:3] == 0).all() and found.margins[0] > 0.5


def test_what_is_like_no_other_is_an_outlier():
  vectors, labels = _classes()
  stranger = np.zeros((1, 16), np.float32)
  stranger[0, 0] = 1
  stranger -= vectors.mean(0) * (stranger @ vectors.mean(0))
  vectors = np.concatenate([vectors, unit_rows(-vectors.sum(0)[None])])
  found = _look(vectors, [*labels, -1])
  assert found.typicality.argmin() == len(labels)
  assert found.is_outlier[-1] and found.is_outlier.sum() < 6
