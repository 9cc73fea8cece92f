"""What a run gains with few labels is read from the features that it kept."""

import json
import os

import numpy as np
import pytest

from benchmarks import few_labels
from cmd_jax.errors import UserError


def _keep(folder, encoder, split, vectors, labels, *, at):
  path = folder / f'{encoder}{split.replace("/", "")}_image.npz'
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


def test_start_and_end_are_given_the_same_images(folder, monkeypatch):
  monkeypatch.setattr(few_labels, 'SHARES', (50,))
  given, shots = few_labels.score_run(folder)
  assert given['given'] == 'labels/50'
  assert (given['images'], shots['images']) == (24, 20)
  for row in (given, shots):
    assert row['trained'] > 0.95 > 0.6 > row['frozen']
    assert row['gain'] == pytest.approx(row['trained'] - row['frozen'])
    low, high = row['gain_95']
    assert 0 < low < row['gain'] < high


def test_shots_are_as_many_of_each_class_as_there_are():
  labels = np.array([0, 0, 0, 1, 1, 2])
  rows = few_labels.choose_shots(labels, 2, seed=0)
  np.testing.assert_array_equal(np.bincount(labels[rows]), [2, 2, 1])
  others = [few_labels.choose_shots(labels, 2, seed) for seed in range(9)]
  assert len({tuple(x) for x in others}) > 1


def test_a_run_whose_start_was_best_gains_nothing(folder):
  for path in folder.glob('b*'):
    path.unlink()
  before, after = few_labels.read_kept(folder)
  np.testing.assert_array_equal(before.train.vectors, after.train.vectors)


def test_a_run_that_is_not_finished_is_named(folder):
  for path in folder.glob('*settest*'):
    path.unlink()
  with pytest.raises(UserError, match='features of 0 encoders'):
    few_labels.read_kept(folder)
