"""k-NN and retrieval against the released eval_knn.py and retrieval.py."""

import numpy as np
import pytest

from cmd_jax.evaluators import Features, knn, retrieval
from tests.parity import golden


def _features(vectors, labels):
  return Features(
    vectors,
    labels.astype(np.int32),
    tuple(f'class {index}' for index in range(labels.max() + 1)),
    tuple(f'{index}.png' for index in range(len(labels))),
  )


def _splits(fixture, prefix):
  labels = [fixture[f'{prefix}{split}_labels'] for split in ('train', 'test')]
  train, test = (
    _features(fixture[f'{prefix}{split}_features'], own)
    for split, own in zip(('train', 'test'), labels)
  )
  names = max(train.class_names, test.class_names, key=len)
  return train._replace(class_names=names), test._replace(class_names=names)


@golden.fixtures('retrieval_knn')
def test_every_ninth_test_image_queries_the_rest(fixture):
  train, test = _splits(fixture, 'in/')
  scores = retrieval.make_cmd_ratio9()(train, test)
  assert scores['rank1'] == pytest.approx(float(fixture['ratio/rank1']))
  assert scores['rank5'] == pytest.approx(float(fixture['ratio/rank5']))
  assert scores['mAP100'] == pytest.approx(
    float(fixture['ratio/mAP100']), rel=1e-6
  )


@golden.fixtures('retrieval_knn')
def test_test_images_query_the_training_images(fixture):
  train, test = _splits(fixture, 'in/')
  scores = retrieval.make_retrieval()(train, test)
  assert scores['rank1'] == pytest.approx(float(fixture['origin/rank1']))
  assert scores['rank5'] == pytest.approx(float(fixture['origin/rank5']))
  # Their average precision is cut at 100 places, this protocol's is not.
  ranking = retrieval._rank_all('origin', test, train, 2**20)
  assert ranking.cut_precision.mean() == pytest.approx(
    float(fixture['origin/mAP100']), rel=1e-6
  )


@golden.fixtures('retrieval_knn')
@pytest.mark.parametrize('size', ['small', 'large'])
@pytest.mark.parametrize('k', [10, 20])
def test_knn(fixture, size, k):
  train, test = _splits(fixture, f'knn_{size}/')
  scores = knn.make_knn(k=k, temperature=0.07)(train, test)
  for top in (1, 5):
    assert scores[f'top{top}'] == pytest.approx(
      float(fixture[f'knn_{size}/k{k}_top{top}']) / 100
    )
