import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans

from cmd_jax.parts import features, points
from cmd_jax.parts import kmeans as kmeans_module
from cmd_jax.parts.kmeans import kmeans, kmeans_of_maps

_K, _GRID = 5, (8, 6)


def _maps(count=3, seed=0):
  rng = np.random.default_rng(seed)
  shapes = ((2, 3, 7), (4, 3, 5), (8, 6, 4), (11, 9, 2))
  return [rng.normal(2.0, 1.0, (count, *s)).astype(np.float32) for s in shapes]


def _keys(count=3):
  root = jax.random.key(0)
  return jnp.stack([jax.random.fold_in(root, i) for i in range(count)])


def _inertia(x, centres, labels):
  return np.square(x - centres[labels]).sum()


@pytest.fixture(scope='module')
def clustered():
  maps = _maps()
  dense = np.asarray(features.hypercolumn(maps, _GRID), np.float64)
  result = kmeans_of_maps(maps, _keys(), grid=_GRID, num_clusters=_K)
  return maps, dense.reshape(3, 48, -1), jax.tree.map(np.asarray, result)


def test_products_and_sums_are_those_of_the_resized_points():
  maps = [x[0] for x in _maps()]
  dense = np.asarray(features.hypercolumn([x[None] for x in maps], _GRID))
  dense = dense.reshape(48, -1)
  rng = np.random.default_rng(1)
  centres = rng.normal(size=(3, 18)).astype(np.float32)
  weights = rng.uniform(size=(48, 3)).astype(np.float32)
  index = jnp.array([0, 17, 47])

  @jax.jit
  def compute(maps):
    factored = points.make_points(maps, _GRID)
    moved, mean = points.centre(factored)
    return (
      factored.products(centres),
      factored.sums(weights),
      factored.squares(),
      factored.take(index),
      mean,
      moved.squares(),
    )

  expected = (
    dense @ centres.T,
    weights.T @ dense,
    np.square(dense).sum(1),
    dense[index],
    dense.mean(0),
    np.square(dense - dense.mean(0)).sum(1),
  )
  for ours, theirs in zip(compute(maps), expected, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_result_is_a_fixed_point_of_lloyd(clustered):
  _, dense, result = clustered
  for x, labels, centres, inertia in zip(
    dense, result.labels, result.centres, result.inertia
  ):
    distances = np.square(x[:, None] - centres).sum(-1)
    np.testing.assert_array_equal(labels, distances.argmin(1))
    means = np.stack([x[labels == k].mean(0) for k in range(_K)])
    np.testing.assert_allclose(centres, means, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(inertia, distances.min(1).sum(), rtol=1e-4)


def test_inertia_is_no_higher_than_scikit_learns(clustered):
  _, dense, result = clustered
  theirs = [KMeans(_K, n_init=1, random_state=0).fit(x).inertia_ for x in dense]
  assert result.inertia.sum() <= np.sum(theirs)


def test_an_image_alone_is_clustered_as_in_a_batch(clustered):
  maps, _, result = clustered
  alone = kmeans_of_maps(
    [x[1:2] for x in maps], _keys()[1:2], grid=_GRID, num_clusters=_K
  )
  np.testing.assert_array_equal(alone.labels[0], result.labels[1])
  np.testing.assert_array_equal(alone.centres[0], result.centres[1])


def test_side_by_side_is_as_one_by_one(clustered):
  maps, _, result = clustered
  chunked = kmeans_of_maps(maps, _keys(), grid=_GRID, num_clusters=_K, chunk=2)
  np.testing.assert_array_equal(chunked.labels, result.labels)


@pytest.mark.parametrize('warm_start', [True, False])
def test_separate_clouds_are_found_however_uneven(warm_start):
  rng = np.random.default_rng(0)
  truth = np.repeat(np.arange(4), [180, 8, 7, 5])
  cloud = 20 * rng.normal(size=(4, 6))[truth] + rng.normal(size=(200, 6))
  result = kmeans(
    jnp.array(cloud[None], jnp.float32),
    _keys(1),
    num_clusters=4,
    warm_start=warm_start,
  )
  pairs = set(zip(truth.tolist(), np.asarray(result.labels[0]).tolist()))
  assert len(pairs) == 4


@pytest.fixture(scope='module')
def small():
  return jax.jit(
    lambda x, active: kmeans(
      x, _keys(1), num_clusters=4, num_active=active, max_steps=20
    )
  )


@pytest.mark.parametrize('distinct', [1, 3, 4])
def test_no_more_distinct_points_than_clusters(small, distinct):
  corners = np.array([[0, 0], [0, 9], [9, 0], [9, 9]], np.float32)
  x = corners[np.arange(6) % distinct]
  result = small(x[None], jnp.array([4]))
  assert np.isfinite(result.centres).all()
  assert float(result.inertia[0]) == 0.0
  assert len(np.unique(result.labels)) == distinct


def test_fewer_active_clusters(small):
  x = np.random.default_rng(0).normal(size=(1, 6, 2)).astype(np.float32)
  inertia = []
  for active in range(1, 5):
    result = small(x, jnp.array([active]))
    assert set(np.unique(result.labels)) == set(range(active))
    inertia.append(float(result.inertia[0]))
  assert inertia == sorted(inertia, reverse=True)
  np.testing.assert_allclose(
    inertia[0], np.square(x[0] - x[0].mean(0)).sum(), rtol=1e-5
  )


def test_an_empty_cluster_gets_the_farthest_point():
  repaired = kmeans_module._repair(
    jnp.zeros(4, jnp.int32),
    jnp.array([1.0, 5.0, 2.0, 3.0]),
    jnp.array([False, True, True]),
  )
  np.testing.assert_array_equal(repaired, [0, 1, 0, 2])
