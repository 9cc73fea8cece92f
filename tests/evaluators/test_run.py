from __future__ import annotations

import types

import numpy as np
import pytest

from cmd_jax.errors import UserError
from cmd_jax.evaluators import (
  EVALUATORS,
  Features,
  Splits,
  check_protocol,
  evaluate,
  explain_protocols,
  make_evaluators,
  remark_on_labels,
  why_not_scored,
)
from tests import scored_runs

# Those that score vectors, whatever is added.
_OF_VECTORS = [
  name
  for name, factory in EVALUATORS.items()
  if factory.__qualname__.startswith(('_of_vectors', '_as_searched'))
]
# Of the protocols so far, in their order.
_METRICS = [
  'knn/20/top1',
  'knn/20/top5',
  'linear/logreg/top1',
  'linear/esvit4/top1',
  'labels/10/top1',
  'labels/10/top1_std',
  'labels/20/top1',
  'labels/20/top1_std',
  'labels/50/top1',
  'labels/50/top1_std',
  'labels/100/top1',
  'retrieval/test-vs-train/rank1',
  'retrieval/test-vs-train/rank5',
  'retrieval/test-vs-train/mAP',
  'retrieval/test-vs-train-centred/rank1',
  'retrieval/test-vs-train-centred/rank5',
  'retrieval/test-vs-train-centred/mAP',
  'retrieval/search/rank1',
  'retrieval/search/rank5',
  'retrieval/search/mAP',
  'retrieval/loo-test/rank1',
  'retrieval/loo-test/rank5',
  'retrieval/loo-test/mAP',
  'retrieval/cmd-ratio9/rank1',
  'retrieval/cmd-ratio9/rank5',
  'retrieval/cmd-ratio9/mAP100',
]
_SETTINGS = scored_runs.CONFIG['eval']


class _Network:
  """Whose splits are their own features."""

  def embeddings(self, split, **as_searched):
    assert as_searched in ({}, _SETTINGS['search'])
    return split

  last_blocks = embeddings


@pytest.mark.parametrize(
  'train, test, words',
  [
    ([0, 0, -1], [0], 'all labelled images are of one class, robin'),
    ([0, 1], [0], None),
    ([0, 0], [1], None),
    # What is not scored is told otherwise.
    ([0, 0], [-1], None),
  ],
)
def test_one_class_is_remarked_on(train, test, words):
  splits = [
    types.SimpleNamespace(
      name='set', labels=np.array(labels), class_names=('robin', 'wren')
    )
    for labels in (train, test)
  ]
  said = remark_on_labels(Splits(*splits))
  assert said is None if words is None else said.startswith(words)


def _scores(names, train, test):
  return evaluate(
    make_evaluators(names, _SETTINGS), _Network(), Splits(train, test)
  )


def _features(count: int, seed: int = 0, classes: int = 3) -> Features:
  rng = np.random.default_rng(seed)
  labels = (np.arange(count) % classes).astype(np.int32)
  centres = np.random.default_rng(99).normal(size=(classes, 8))
  vectors = centres[labels] + rng.normal(size=(count, 8))
  return Features(
    vectors.astype(np.float32),
    labels,
    tuple(f'class {i}' for i in range(classes)),
    tuple(f'{i}.jpg' for i in range(count)),
  )


def test_unknown_protocol_lists_the_valid_ones():
  with pytest.raises(UserError) as caught:
    check_protocol('knn/21')
  assert '\n' not in str(caught.value)
  for name in ('knn/21', *EVALUATORS):
    assert name in str(caught.value)


def test_evaluate_names_every_metric():
  got = _scores(_OF_VECTORS, _features(60), _features(30, 1))
  assert list(got)[: len(_METRICS)] == _METRICS
  assert all(type(v) is float and 0 <= v <= 1 for v in got.values())


@pytest.mark.parametrize('name', _OF_VECTORS)
def test_unlabelled_rows_are_dropped(name):
  train, test = _features(60), _features(30, 1)

  def with_unlabelled(features: Features) -> Features:
    rows = np.repeat(np.arange(len(features.labels)), 2)
    labels, vectors = features.labels[rows], features.vectors[rows]
    labels[1::2] = -1
    vectors[1::2] = np.nan
    names = tuple(features.file_names[i] for i in rows)
    return Features(vectors, labels, features.class_names, names)

  want = _scores([name], train, test)
  assert _scores([name], with_unlabelled(train), with_unlabelled(test)) == want


@pytest.mark.parametrize('name', _OF_VECTORS)
@pytest.mark.parametrize('split', [0, 1])
def test_what_cannot_be_scored_is_one_line(name, split):
  splits = [_features(20), _features(10, 1)]
  good = splits[split]
  broken = good.vectors.copy()
  broken[3, 2] = np.inf
  for bad, message in (
    (good._replace(labels=np.full_like(good.labels, -1)), 'no labels'),
    (good._replace(vectors=broken), f'1 of {len(broken)} .*not finite'),
    (good._replace(class_names=('x', 'y', 'z')), 'different classes'),
  ):
    splits[split] = bad
    (evaluator,) = make_evaluators([name], _SETTINGS)
    with pytest.raises(UserError, match=message) as caught:
      evaluator.run(_Network(), Splits(*splits))
    assert name in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize('name', _OF_VECTORS)
@pytest.mark.parametrize('value', [0.0, 3.7])
def test_collapsed_encoder_gives_finite_metrics(name, value):
  train, test = (
    f._replace(vectors=np.full_like(f.vectors, value))
    for f in (_features(60), _features(30, 1))
  )
  got = _scores([name], train, test)
  assert np.isfinite(list(got.values())).all()
  # Everything looks like class 0, a third of the test examples, and all of
  # every ninth. Left out itself, the first sees the second, of class 1.
  first = got.get(f'{name}/top1', got.get(f'{name}/rank1'))
  want = {'retrieval/cmd-ratio9': 1, 'retrieval/loo-test': 0.3}
  np.testing.assert_allclose(first, want.get(name, 1 / 3))


@pytest.mark.parametrize('name', _OF_VECTORS)
def test_one_class_and_one_example(name):
  def scores(train: Features, test: Features) -> set[float]:
    got = _scores([name], train, test)
    assert got.pop(f'{name}/top1_std', 0) == 0
    return set(got.values())

  one = _features(1)
  # Nothing is left where one of one is left out.
  assert scores(one, one) == {0.0 if name.endswith('loo-test') else 1.0}
  assert scores(_features(9, classes=1), _features(4, 1, classes=1)) == {1.0}


@pytest.mark.parametrize('name', EVALUATORS)
def test_an_evaluator_has_the_name_under_which_it_is_listed(name):
  (evaluator,) = make_evaluators([name], _SETTINGS)
  assert evaluator.name == name


def test_every_protocol_is_explained_in_a_sentence():
  names = [f'{name}/top1' for name in EVALUATORS]
  words = explain_protocols([*names, *names, 'gone/rank1'])
  assert list(words) == list(EVALUATORS)
  assert all(words.values())


@pytest.mark.parametrize('missing', ['train', 'test', 'test labels'])
def test_without_labels_what_needs_them_is_left_out(missing):
  """The reason is told, and `parts/hit` is scored all the same."""
  splits = scored_runs.make_experiment(
    labelled=missing != 'train', test=missing != 'test'
  ).splits
  if missing == 'test labels':
    splits.test.labels[:] = -1
  last = splits.test or splits.train
  boxes = np.tile(np.float32([0, 0, 0.5, 1]), (len(last.images), 1))
  splits = Splits(
    *(x if x is not last else x._replace(boxes=boxes) for x in splits)
  )

  class Network:
    def attention(self, split):
      assert split.boxes is boxes
      attention = np.float32([0.5, 0.1, 0.2, 0.2])
      return {'mil': np.tile(attention, (len(boxes), 1))}

  evaluators = make_evaluators(['knn/20', 'parts/hit'], _SETTINGS)
  assert evaluate(evaluators, Network(), splits) == pytest.approx(
    {
      'parts/hit/box/mil_mass': 0.6,
      'parts/hit/box/mil_peak': 1,
      'parts/hit/box/uniform': 0.5,
    }
  )
  what = 'training' if missing == 'train' else 'test'
  reason = why_not_scored(splits)
  assert f'no labelled {what} images in birds/train' in reason
  assert why_not_scored(scored_runs.make_experiment().splits) is None


def test_labels_lost_in_reading_are_no_labels():
  class Network:
    def embeddings(self, split):
      if split is splits.test:
        return split._replace(labels=np.full_like(split.labels, -1))
      return split

  splits = Splits(_features(60), _features(30, 1))
  assert evaluate(make_evaluators(['knn/20']), Network(), splits) == {}


def test_attention_is_asked_of_a_network_that_has_it():
  class Network:
    def attention(self, split):
      return {}

  splits = scored_runs.make_experiment().splits
  with pytest.raises(UserError, match='neither the method nor the encoder'):
    evaluate(make_evaluators(['parts/hit'], _SETTINGS), Network(), splits)


def test_part_masks_and_a_facet_are_asked_for_before_training():
  (evaluator,) = make_evaluators(['seg/pascub5'], _SETTINGS)
  encoder = scored_runs.make_encoder_module()
  splits = scored_runs.make_experiment().splits
  with pytest.raises(UserError, match='not all splits have part masks'):
    evaluator.check(encoder, splits)
  splits = Splits(
    *(x._replace(part_ids=x.images[..., 0] // 100) for x in splits)
  )
  evaluator.check(encoder, splits)
  with pytest.raises(UserError, match='not all splits have part masks'):
    evaluator.check(encoder, splits._replace(test=None))
  for section, words in (
    ({'facet': 'value'}, "facet is 'value'"),
    ({'decoder': 'unet'}, "decoder 'unet' is unknown"),
  ):
    fields = {'segmentation': _SETTINGS['segmentation'] | section}
    (evaluator,) = make_evaluators(['seg/pascub5'], fields)
    with pytest.raises(UserError, match=words):
      evaluator.check(encoder, splits)


def test_parts_are_segmented_in_the_maps_of_the_network():
  fields = _SETTINGS['segmentation'] | dict(
    num_steps=40, num_checkpoints=2, learning_rate=0.03, channels=(8,)
  )
  (evaluator,) = make_evaluators(['seg/pascub5'], {'segmentation': fields})

  class Network:
    def feature_maps(self, split, *, view_px, facet):
      assert (view_px, facet) == (fields['view_px'], fields['facet'])
      maps = np.eye(3)[split.part_ids[:, ::4, ::4]]
      return maps.astype(np.float16)

  def with_masks(split, seed):
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 3, (len(split.images), 4, 4), np.uint8)
    return split._replace(part_ids=cells.repeat(4, 1).repeat(4, 2))

  splits = scored_runs.make_experiment().splits
  splits = Splits(*(with_masks(x, i) for i, x in enumerate(splits)))
  scores = evaluate([evaluator], Network(), splits)
  assert list(scores) == ['seg/pascub5/miou', 'seg/pascub5/miou_last']
  assert min(scores.values()) > 0.5
