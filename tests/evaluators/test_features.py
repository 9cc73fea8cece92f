from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.errors import UserError
from cmd_jax.evaluators import (
  EVALUATORS,
  OF_MAPS,
  Features,
  evaluate,
  extract_features,
  get_evaluator,
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


def _plain(images: np.ndarray, sizes: np.ndarray) -> np.ndarray:
  mean = images.astype(np.float64).mean(axis=(1, 2))
  return np.concatenate([mean, sizes[:, :1] / sizes[:, 1:]], axis=1)


def _images(count: int) -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng(1)
  images = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
  return images, rng.integers(1, 99, (count, 2)).astype(np.int32)


@pytest.mark.parametrize('batch_size', [1, 3, 4, 11, 64])
def test_extract_features_equals_one_pass_and_compiles_once(batch_size):
  images, sizes = _images(11)
  traces = []

  @jax.jit
  def encode(images, sizes):
    traces.append(images.shape)
    mean = images.astype(jnp.float32).mean(axis=(1, 2))
    return jnp.concatenate([mean, sizes[:, :1] / sizes[:, 1:]], axis=1)

  got = extract_features(encode, images, sizes, batch_size=batch_size)
  assert traces == [(batch_size, 4, 4, 3)]
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, _plain(images, sizes), rtol=1e-5)


def test_extract_features_casts_bfloat16():
  images, sizes = _images(3)
  encode = jax.jit(lambda x, _: x[:, 0, 0].astype(jnp.bfloat16))
  got = extract_features(encode, images, sizes, batch_size=2)
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, images[:, 0, 0], rtol=1e-2)


def test_extract_features_refuses_wrong_shapes():
  images, sizes = _images(3)
  with pytest.raises(UserError, match='no images'):
    extract_features(_plain, images[:0], sizes[:0])
  with pytest.raises(ValueError, match='3 images but 2 sizes'):
    extract_features(_plain, images, sizes[:2])
  with pytest.raises(ValueError, match=r'must give \[2, D\]'):
    extract_features(lambda x, _: x, images, sizes, batch_size=2)


def test_unknown_protocol_lists_the_valid_ones():
  with pytest.raises(UserError) as caught:
    get_evaluator('knn/21')
  assert '\n' not in str(caught.value)
  for name in ('knn/21', *EVALUATORS, *OF_MAPS):
    assert name in str(caught.value)


def test_evaluate_names_every_metric():
  got = evaluate(list(EVALUATORS), _features(60), _features(30, 1))
  assert list(got) == [
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
    'retrieval/loo-test/rank1',
    'retrieval/loo-test/rank5',
    'retrieval/loo-test/mAP',
    'retrieval/cmd-ratio9/rank1',
    'retrieval/cmd-ratio9/rank5',
    'retrieval/cmd-ratio9/mAP100',
  ]
  assert all(type(v) is float and 0 <= v <= 1 for v in got.values())


@pytest.mark.parametrize('name', list(EVALUATORS))
def test_unlabelled_rows_are_dropped(name):
  train, test = _features(60), _features(30, 1)

  def with_unlabelled(features: Features) -> Features:
    rows = np.repeat(np.arange(len(features.labels)), 2)
    labels, vectors = features.labels[rows], features.vectors[rows]
    labels[1::2] = -1
    vectors[1::2] = np.nan
    names = tuple(features.file_names[i] for i in rows)
    return Features(vectors, labels, features.class_names, names)

  want = evaluate([name], train, test)
  assert evaluate([name], with_unlabelled(train), with_unlabelled(test)) == want


@pytest.mark.parametrize('name', list(EVALUATORS))
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
    with pytest.raises(UserError, match=message) as caught:
      evaluate([name], *splits)
    assert name in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize('name', list(EVALUATORS))
@pytest.mark.parametrize('value', [0.0, 3.7])
def test_collapsed_encoder_gives_finite_metrics(name, value):
  train, test = (
    f._replace(vectors=np.full_like(f.vectors, value))
    for f in (_features(60), _features(30, 1))
  )
  got = evaluate([name], train, test)
  assert np.isfinite(list(got.values())).all()
  # Everything looks like class 0, a third of the test examples, and all of
  # every ninth. Left out itself, the first sees the second, of class 1.
  first = got.get(f'{name}/top1', got.get(f'{name}/rank1'))
  want = {'retrieval/cmd-ratio9': 1, 'retrieval/loo-test': 0.3}
  np.testing.assert_allclose(first, want.get(name, 1 / 3))


@pytest.mark.parametrize('name', list(EVALUATORS))
def test_one_class_and_one_example(name):
  def scores(train: Features, test: Features) -> set[float]:
    got = evaluate([name], train, test)
    assert got.pop(f'{name}/top1_std', 0) == 0
    return set(got.values())

  one = _features(1)
  # Nothing is left where one of one is left out.
  assert scores(one, one) == {0.0 if name.endswith('loo-test') else 1.0}
  assert scores(_features(9, classes=1), _features(4, 1, classes=1)) == {1.0}
