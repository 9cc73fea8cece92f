import sys

import numpy as np
import pytest

from cmd_jax.report import embedding_map


def _clusters(count, dim=12):
  rng = np.random.default_rng(0)
  which = np.arange(count) % 2
  centres = rng.normal(size=(2, dim)) * 4
  return which, centres[which] + rng.normal(size=(count, dim))


def _assert_fills_the_square(points, count):
  assert points.shape == (count, 2)
  assert points.min() >= -1e-6 and points.max() <= 1 + 1e-6
  assert np.ptp(points, axis=0).max() == pytest.approx(1)


def test_tsne_keeps_clusters_apart_and_is_repeatable():
  pytest.importorskip('openTSNE')
  which, vectors = _clusters(60)
  found = embedding_map.make_map(vectors)
  assert (found.method, found.note) == ('t-SNE', '')
  _assert_fills_the_square(found.points, 60)
  first, second = (found.points[which == k] for k in (0, 1))
  between = np.linalg.norm(first.mean(0) - second.mean(0))
  assert between > 3 * max(first.std(0).max(), second.std(0).max())
  again = embedding_map.make_map(vectors)
  np.testing.assert_array_equal(again.points, found.points)


def test_principal_components_stand_in_where_opentsne_is_missing(monkeypatch):
  monkeypatch.setitem(sys.modules, 'openTSNE', None)
  found = embedding_map.make_map(_clusters(60)[1])
  assert found.method == 'PCA'
  assert "'cmd_jax[report]'" in found.note
  _assert_fills_the_square(found.points, 60)


@pytest.mark.parametrize('count, dim', [(2, 12), (7, 1)])
def test_a_few_photographs_or_features_have_a_map_as_well(count, dim):
  found = embedding_map.make_map(_clusters(count, dim)[1])
  assert (found.method, found.note) == ('PCA', '')
  assert found.points.shape == (count, 2)
  assert np.isfinite(found.points).all()
