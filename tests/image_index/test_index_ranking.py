"""The ranking of an index against that of `cmd-jax search`."""

import pathlib

import numpy as np
import pytest

from cmd_jax.errors import UserError
from cmd_jax.export import search
from cmd_jax.export.images import Embeddings
from cmd_jax.image_index import inverted_lists, ranking, store
from tests.image_index import drawn

_ENCODER = store.EncoderId('drawn', '0' * 64, {'view_px': 8})


def _draw(count, seed=0, dim=12):
  """Vectors of a narrow cone, in clusters."""
  rng = np.random.default_rng(seed)
  centres = np.random.default_rng(9).normal(size=(20, dim))
  of = rng.integers(0, 20, count)
  noise = 0.5 * rng.normal(size=(count, dim))
  return (50 + centres[of] + noise).astype(np.float32)


@pytest.fixture
def make_index(tmp_path):
  def make(*blocks, dim=12):
    path = tmp_path / 'index'
    path.mkdir()
    index = store.empty(path, tmp_path, _ENCODER, dim)
    for block in blocks:
      index = store.commit(ranking.with_lists(drawn.append(index, block)))
    return store.open_index(path)

  return make


def _search(vectors, query, k, without=()):
  names = tuple(map(str, range(len(vectors))))
  gallery = Embeddings(pathlib.Path('x'), names, vectors, ())
  return search.search(query, gallery, k, without=without)


def test_it_agrees_with_search(make_index, monkeypatch):
  monkeypatch.setattr(ranking, '_BLOCK', 64)
  vectors, queries = _draw(150), _draw(5, 1)
  index = make_index(vectors[:90], vectors[90:])
  found = ranking.rank(index, queries, 7)
  for query, *columns in zip(queries, *found):
    want = _search(vectors, query, 7)
    np.testing.assert_array_equal(columns[0], want.rows)
    np.testing.assert_allclose(columns[1], want.likeness, atol=1e-4)
    np.testing.assert_allclose(columns[2], want.cosines, atol=1e-5)


def test_a_query_is_no_result_of_itself_nor_is_what_is_gone(make_index):
  vectors = _draw(60)
  index = make_index(vectors)
  states = index.items.states.copy()
  states[10:20] = store.GONE
  live = np.flatnonzero(states == store.LIVE)
  items = index.items._replace(
    states=states, total=vectors[live].sum(0, dtype=np.float64)
  )
  own = np.array([3, 25, -1])
  found = ranking.rank(
    index._replace(items=items), vectors[[3, 25, 30]], 100, without=own
  )
  for row, query, rows in zip(own, (3, 25, 30), found.rows):
    gone = () if row < 0 else (int(np.searchsorted(live, row)),)
    want = live[_search(vectors[live], vectors[query], 100, gone).rows]
    np.testing.assert_array_equal(rows[rows >= 0], want)


def test_lists_find_what_comparing_all_finds(make_index, monkeypatch):
  pytest.importorskip('faiss')
  monkeypatch.setattr(ranking, 'EXACT_UP_TO', 500)
  monkeypatch.setattr(inverted_lists, '_COMPONENTS', 9)
  vectors = _draw(3000)
  index = make_index(vectors[:2600], vectors[2600:])
  # The second block is too small to make lists anew, and is found by itself.
  assert index.lists.rows == 2600
  assert index.lists.recall >= 0.97 or index.lists.probes >= 128
  lists = inverted_lists.open_lists(index.path / index.lists.file, 12)
  assert lists.basis.shape == (12, 9)
  np.testing.assert_allclose(lists.basis.T @ lists.basis, np.eye(9), atol=1e-5)
  np.testing.assert_allclose(lists.mean, vectors[:2600].mean(0), rtol=1e-5)
  queries = _draw(40, 2)
  found = ranking.rank(index, queries, 10)
  want = ranking.rank(index._replace(lists=None), queries, 10)
  shared = [len({*a} & {*b}) for a, b in zip(found.rows, want.rows)]
  assert np.mean(shared) > 9.5
  assert (found.rows >= 2600).any() and (found.rows < 2600).any()
  # What both have, both rank and measure alike.
  same = found.rows[:, 0] == want.rows[:, 0]
  assert same.mean() > 0.9
  np.testing.assert_allclose(
    found.likeness[same, 0], want.likeness[same, 0], atol=1e-4
  )
  own = np.arange(5)
  found = ranking.rank(index, vectors[:5], 3, without=own)
  assert not (found.rows == own[:, None]).any() and (found.rows >= 0).all()


def test_damaged_lists_cost_time_alone(make_index, monkeypatch, capsys):
  pytest.importorskip('faiss')
  monkeypatch.setattr(ranking, 'EXACT_UP_TO', 200)
  vectors = _draw(400)
  index = make_index(vectors)
  path = index.path / index.lists.file
  path.write_bytes(path.read_bytes()[:100])
  found = ranking.rank(index, vectors[:2], 4)
  assert found.rows[:, 0].tolist() == [0, 1]
  assert 'is damaged' in capsys.readouterr().err


def test_without_faiss_all_rows_are_compared(make_index, monkeypatch, capsys):
  def missing():
    raise UserError('needs FAISS')

  monkeypatch.setattr(ranking, 'EXACT_UP_TO', 10)
  monkeypatch.setattr('cmd_jax.image_index.inverted_lists.load_faiss', missing)
  index = make_index(_draw(50))
  assert index.lists is None
  assert 'needs FAISS' in capsys.readouterr().err
  assert ranking.rank(index, _draw(1, 3), 5).rows.shape == (1, 5)
