import pathlib

import numpy as np
import pytest

from cmd_jax.errors import UserError
from cmd_jax.export import cluster
from cmd_jax.export.images import Embeddings

pytest.importorskip('sklearn')


def _groups(noise=0.05):
  """40, 30 and 20 look-alikes, and 4 that are like no other."""
  rng = np.random.default_rng(0)
  truth = np.repeat([0, 1, 2, -1], [40, 30, 20, 4])
  centres = 5 * rng.normal(size=(3, 10))
  vectors = centres[truth] + noise * rng.normal(size=(94, 10))
  vectors[truth < 0] = 5 * rng.normal(size=(4, 10))
  # Length means nothing.
  return vectors * rng.uniform(0.1, 9, (94, 1)), truth


def test_groups_are_found_and_ordered_by_size():
  vectors, truth = _groups()
  found = cluster.find_clusters(vectors, min_size=15)
  kept = truth >= 0
  np.testing.assert_array_equal(found.labels[kept], truth[kept])
  assert np.all(found.likeness[kept] > 0.99)
  # Four are too few for a group of their own.
  assert found.labels.max() == 2
  alone = found.labels == cluster.ALONE
  assert alone.any() and np.all(found.likeness[alone] == 0)


def test_a_given_number_of_groups_leaves_out_none():
  vectors, truth = _groups()
  kept = truth >= 0
  found = cluster.find_clusters(vectors[kept], num_clusters=3)
  np.testing.assert_array_equal(found.labels, truth[kept])
  assert set(cluster.find_clusters(vectors, 6).labels) == set(range(6))


def test_groups_are_told_apart_whatever_varies_within_them():
  rng = np.random.default_rng(0)
  truth = np.repeat(np.arange(8), 40)
  vectors = 0.4 + 0.05 * rng.normal(size=(320, 64))
  vectors[:, :8] += 0.5 * np.eye(8)[truth]
  # As much as what kinds differ in, and the same in all kinds.
  vectors[:, 8:11] += 0.5 * rng.normal(size=(320, 3))
  found = cluster.find_clusters(vectors, num_clusters=8)
  for kind in range(8):
    assert len(set(found.labels[truth == kind])) == 1
  # Below 200 images nothing is known of neighbours.
  few = cluster.find_clusters(vectors[::2], num_clusters=8)
  assert any(len(set(few.labels[truth[::2] == x])) > 1 for x in range(8))


def test_few_images_and_collapsed_encoders_have_groups_too():
  assert set(cluster.find_clusters(np.ones((3, 4)))[0]) == {cluster.ALONE}
  found = cluster.find_clusters(np.ones((30, 4)))
  assert len(found.labels) == 30
  assert np.isfinite(found.likeness).all()


def test_links_have_the_most_typical_first_and_originals_stay(tmp_path):
  names = ('a.png', 'b/a.png', f'{"x" * 200}.png', 'd.png')
  for name in names:
    (tmp_path / 'photos' / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / 'photos' / name).write_text(name)
  embeddings = Embeddings(tmp_path / 'photos', names, np.zeros((4, 2)), ())
  found = cluster.Clusters(
    np.array([0, 0, 0, cluster.ALONE]), np.array([0.7, 0.9, 0.8, 0.0])
  )
  out = tmp_path / 'out'
  cluster.save_clusters(out, embeddings, found)
  links = sorted((out / 'cluster_000').iterdir())
  assert [link.read_text() for link in links] == [names[1], names[2], names[0]]
  assert [link.name for link in links][::2] == ['00000_a.png', '00002_a.png']
  assert all(link.is_symlink() for link in links)
  assert [link.name for link in (out / 'alone').iterdir()] == ['00000_d.png']
  rows = (out / 'clusters.csv').read_text().splitlines()
  assert rows[:3] == [
    'file,cluster,likeness',
    'a.png,0,0.700000',
    'b/a.png,0,0.900000',
  ]
  assert sorted(path.name for path in tmp_path.iterdir()) == ['out', 'photos']
  with pytest.raises(UserError, match='is there already'):
    cluster.save_clusters(out, embeddings, found)
  for name in names:
    assert (tmp_path / 'photos' / name).read_text() == name


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
  def fail(*arguments):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(cluster, '_write_table', fail)
  embeddings = Embeddings(pathlib.Path('x'), ('a.png',), np.zeros((1, 2)), ())
  found = cluster.Clusters(np.array([0]), np.array([1.0]))
  with pytest.raises(UserError, match='No space left'):
    cluster.save_clusters(tmp_path / 'out', embeddings, found)
  assert not list(tmp_path.iterdir())
