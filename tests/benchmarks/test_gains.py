"""What a run gains is read from the features that it kept."""

import json
import os

import numpy as np
import pytest

from benchmarks import gains
from cmd_jax.errors import UserError


def _keep(folder, encoder, split, vectors, labels, *, at, name='image'):
  path = (
    folder / f'{encoder}{split.replace("/", "").replace(" ", "")}_{name}.npz'
  )
  key = json.dumps(dict(encoder_sha256=encoder, split=split))
  names = np.array(['labels', 'vectors'])
  np.savez(path, key=np.array(key), names=names, vectors=vectors, labels=labels)
  os.utime(path, (at, at))


@pytest.fixture
def folder(tmp_path):
  """Features of a run that has learned to tell four classes apart."""
  rng = np.random.default_rng(0)
  labels = np.arange(48) % 4
  noise = rng.normal(size=(2, 48, 4)).astype(np.float32)
  for split, x in zip(('set/pretrain', 'set/test'), noise):
    # The later one by its name was written first.
    _keep(tmp_path, 'b', split, x, labels, at=1)
    apart = x + 8 * np.eye(4, dtype=np.float32)[labels]
    _keep(tmp_path, 'a', split, apart, labels, at=2)
  return tmp_path


def test_start_and_end_are_given_the_same_images(folder):
  asked = ('rank1', 'labels/50', 'all labels', '5 images a class')
  lines = gains.score_row([folder, folder], asked)
  assert tuple(line['asked'] for line in lines) == asked
  for line in lines:
    assert line['seeds'] == 2
    assert line['after'] > 0.95 > 0.6 > line['before']
    assert float(line['gain']) == pytest.approx(
      100 * (line['after'] - line['before']), abs=0.06
    )


def test_splits_of_tfds_are_told_apart(folder):
  for path in list(folder.iterdir()):
    arrays = dict(np.load(path))
    at = path.stat().st_mtime
    path.unlink()
    key = json.loads(str(arrays['key']))
    split = 'test' if key['split'] == 'set/test' else 'train'
    _keep(
      folder,
      key['encoder_sha256'],
      f'tests/1.0.0 {split}',
      arrays['vectors'],
      arrays['labels'],
      at=at,
    )
  (line,) = gains.score_row([folder], ['rank1'])
  assert line['after'] > 0.95 > 0.6 > line['before']


def test_what_search_finds_is_read_of_its_own_features(folder):
  with pytest.raises(UserError, match='features of 0 encoders'):
    gains.score_row([folder], ['rank1 as searched'])
  rng, labels = np.random.default_rng(1), np.arange(48) % 4
  for encoder, scale in (('b', 8), ('a', 0)):
    for split in ('set/pretrain', 'set/test'):
      x = rng.normal(size=(48, 4)) + scale * np.eye(4)[labels]
      _keep(
        folder, encoder, split, x, labels, at=3 - scale, name='strength_320'
      )
  (line,) = gains.score_row([folder], ['rank1 as searched'])
  # These were made to get worse, where the others get better.
  assert line['before'] == 1 and line['after'] < 0.5


def test_the_interval_is_over_images_and_seeds():
  alike = np.tile(np.arange(100) % 2, (3, 1)).astype(float)
  low, high = gains.interval(alike)
  assert 0.3 < low < 0.45 < 0.55 < high < 0.7
  # Seeds that differ widen it, however many images there are.
  apart = np.ones((3, 100)) * [[0], [0], [1]]
  assert gains.interval(apart) == (0, 1)


def test_shots_are_as_many_of_each_class_as_there_are():
  labels = np.array([0, 0, 0, 1, 1, 2])
  rows = gains.choose_shots(labels, 2, seed=0)
  np.testing.assert_array_equal(np.bincount(labels[rows]), [2, 2, 1])
  others = [gains.choose_shots(labels, 2, seed) for seed in range(9)]
  assert len({tuple(x) for x in others}) > 1


def test_a_run_whose_start_was_best_gains_nothing(folder):
  for path in folder.glob('b*'):
    path.unlink()
  before, after = gains.read_kept(folder)
  np.testing.assert_array_equal(before.train.vectors, after.train.vectors)


def test_a_run_that_is_not_finished_is_named(folder):
  for path in folder.glob('*settest*'):
    path.unlink()
  with pytest.raises(UserError, match='features of 0 encoders'):
    gains.read_kept(folder)


def test_runs_that_go_on_are_left_out(tmp_path):
  assert not gains.is_finished(tmp_path)
  for scores, finished in ({'init': {}}, False), ({'final': {}}, True):
    (tmp_path / 'results.json').write_text(json.dumps(scores))
    assert gains.is_finished(tmp_path) == finished
