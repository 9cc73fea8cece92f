"""Indexes whose vectors are whitened."""

import json
import pathlib

import numpy as np
import pytest

from cmd_jax.errors import UserError
from cmd_jax.export import search
from cmd_jax.export.images import Embeddings
from cmd_jax.image_index import ranking, store, whitened
from tests.image_index import drawn

_ENCODER = store.EncoderId('drawn', '0' * 64, {'view_px': 8})
_DIM = 10


def _draw(count, seed=0):
  rng = np.random.default_rng(seed)
  kinds = np.random.default_rng(9).normal(size=(20, _DIM))
  noise = rng.normal(size=(count, _DIM)) * np.linspace(0.1, 2, _DIM)
  return (9 + kinds[rng.integers(0, 20, count)] + noise).astype(np.float32)


@pytest.fixture
def index(tmp_path):
  path = tmp_path / 'index'
  path.mkdir()
  return store.empty(path, tmp_path, _ENCODER, _DIM)


def _add(index, vectors):
  """As `update` adds what the encoder gave."""
  index = drawn.append(index, index.like_rows(vectors))
  store.commit(whitened.with_whitening(index))
  return store.open_index(index.path)


def _rank(index, queries, k=7):
  return ranking.rank(index, index.like_rows(queries), k)


def _gallery(vectors):
  names = tuple(map(str, range(len(vectors))))
  return Embeddings(pathlib.Path('x'), names, vectors, ())


def test_it_ranks_as_search_does(index, monkeypatch):
  monkeypatch.setattr(whitened, '_BLOCK', 64)
  vectors, queries = _draw(260), _draw(6, 1)
  index = _add(index, vectors)
  assert index.whitened.images == 260
  found = _rank(index, queries)
  for query, rows, likeness in zip(queries, found.rows, found.likeness):
    want = search.search(query, _gallery(vectors), 7)
    np.testing.assert_array_equal(rows, want.rows)
    np.testing.assert_allclose(likeness, want.likeness, atol=1e-4)


def test_a_small_one_is_whitened_when_it_has_grown(index):
  vectors, queries = _draw(900), _draw(6, 1)
  index = _add(index, vectors[:150])
  assert index.whitened is None and index.vectors_file == store.VECTORS
  index = _add(index, vectors[150:250])
  assert index.whitened.images == 250
  # As it is, up to twice as many; then by all that there are.
  index = _add(index, vectors[250:400])
  assert index.whitened.images == 250
  index = _add(index, vectors[400:])
  assert index.whitened.images == 900
  found = _rank(index, queries)
  for query, rows in zip(queries, found.rows):
    want = search.search(query, _gallery(vectors), 7)
    assert len(set(rows) & set(want.rows)) >= 6
  # What no index on the disk is of is not there any more.
  index = _add(index, _draw(1, 5))
  kept = {path.name for path in index.path.iterdir()}
  assert {index.vectors_file, index.whitened.file} <= kept
  assert sum(name.startswith('vectors') for name in kept) == 1


def test_what_is_gone_is_not_learned_from(index):
  vectors = _draw(240)
  index = _add(index, vectors[:100])
  states = index.items.states.copy()
  states[:60] = store.GONE
  total = vectors[60:100].sum(0, dtype=np.float64)
  index = index._replace(items=index.items._replace(states=states, total=total))
  index = _add(index, vectors[100:])
  # 180 are left.
  assert index.whitened is None
  index = _add(index, _draw(40, 3))
  assert index.whitened.images == 220
  live = index.items.live
  np.testing.assert_allclose(
    index.items.mean, index.vectors()[live].mean(0), atol=1e-5
  )


def test_an_index_of_the_format_before_is_read(index):
  index = _add(index, _draw(150))
  file = index.path / store.MANIFEST
  manifest = json.loads(file.read_text())
  del manifest['vectors'], manifest['whitened']
  file.write_text(json.dumps(manifest | {'format_version': 1}))
  before = store.open_index(index.path)
  assert before.whitened is None and len(before.vectors()) == 150
  assert _add(before, _draw(100, 2)).whitened.images == 250


@pytest.mark.parametrize(
  'content', [b'junk', None], ids=['damaged', 'elsewhere']
)
def test_a_damaged_whitening_says_so(index, content):
  index = _add(index, _draw(220))
  if content:
    (index.path / index.whitened.file).write_bytes(content)
  else:
    file = index.path / store.MANIFEST
    text = file.read_text().replace('whitening-', '../whitening-')
    file.write_text(text)
  with pytest.raises(UserError, match='is damaged'):
    store.open_index(index.path)


def test_what_was_not_committed_is_not_there(index):
  vectors = _draw(150)
  index = _add(index, vectors)
  whitened.with_whitening(drawn.append(index, _draw(100, 2)))
  again = store.open_index(index.path)
  assert again.whitened is None and len(again.items.names) == 150
  np.testing.assert_array_equal(again.vectors(), vectors)
