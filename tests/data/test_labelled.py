"""What a method that learns labels trains and validates on."""

import pickle

import numpy as np
import pytest

from cmd_jax.data.canvas import make_canvases
from cmd_jax.data.pipeline.lazy import lazy_canvases
from cmd_jax.data.pipeline.resident import resident_batches
from cmd_jax.data.pipeline.stream import streamed_batches
from cmd_jax.data.sources import labelled
from cmd_jax.data.sources.base import Source
from cmd_jax.data.sources.folder import folder_source
from cmd_jax.devices import sharding
from cmd_jax.errors import UserError
from tests import saved_runs


def _load(index):
  return index


def _source(labels, name='birds/train'):
  return Source(
    name,
    ('robin', 'tit', 'wren'),
    tuple(f'{i}.png' for i in range(len(labels))),
    np.asarray(labels, np.int32),
    _load,
  )


_EMPTY = _source([], 'birds/test')


def test_the_rows_that_are_taken_are_loaded():
  taken = labelled.take(_source([0, 1, -1, 2]), np.array([3, 1]))
  assert taken.file_names == ('3.png', '1.png')
  assert taken.labels.tolist() == [2, 1]
  assert pickle.loads(pickle.dumps(taken)).load(0) == 3


def test_a_fifth_of_each_class_is_held_out_and_nothing_unlabelled_is_trained():
  labels = [0] * 10 + [1] * 5 + [2] + [-1] * 4
  train, validation = labelled.split_labelled(_source(labels), None, _EMPTY)
  assert not set(train.file_names) & set(validation.file_names)
  assert np.bincount(train.labels).tolist() == [8, 4, 1]
  assert np.bincount(validation.labels).tolist() == [2, 1]
  # A class of one is said, not refused.
  assert 'wren' in train.notes[-1]
  again = labelled.split_labelled(_source(labels), None, _EMPTY)
  assert again.validation.file_names == validation.file_names


def test_a_validation_split_is_taken_instead():
  other = _source([1, -1, 0], 'birds/val')
  train, validation = labelled.split_labelled(_source([0, 0, 1]), other, _EMPTY)
  assert len(train.file_names) == 3
  assert validation.file_names == ('0.png', '2.png')


@pytest.mark.parametrize(
  'train, validation, test, words',
  [
    ([-1, -1], None, [], 'no labelled training images'),
    ([0, 0, -1], None, [], 'a single class'),
    ([0, 1, 2], None, [], 'label more'),
    ([0, 0, 1], None, [0, 2], r'birds/test .*test class.*wren'),
    ([0, 0, 1], [2], [], r'birds/val .*validation class.*wren'),
  ],
)
def test_what_cannot_be_learned_is_refused(train, validation, test, words):
  validation = None if validation is None else _source(validation, 'birds/val')
  with pytest.raises(UserError, match=words):
    labelled.split_labelled(
      _source(train), validation, _source(test, 'birds/test')
    )


def test_both_routes_send_the_labels_of_their_images(tmp_path):
  names = [f'{name}/{i}.png' for name in ('robin', 'tit') for i in range(4)]
  saved_runs.write_images(tmp_path, names)
  source = folder_source(str(tmp_path), 'train', test_fraction=0.0)
  options = dict(
    batch_size=4, seed=0, mesh=sharding.make_mesh(1), with_labels=True
  )
  resident = make_canvases(source, canvas_px=8)
  lazy = lazy_canvases(source, canvas_px=8)
  with (
    resident_batches(resident, **options) as kept,
    streamed_batches(lazy, source, **options) as streamed,
  ):
    for step in range(3):
      a, b = kept(step), streamed(step)
      np.testing.assert_array_equal(a.labels, source.labels[a.index])
      np.testing.assert_array_equal(a.labels, b.labels)
