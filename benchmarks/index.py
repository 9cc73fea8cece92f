"""An index of many vectors: built, opened, searched, how much it finds.

  python -m benchmarks.index --scratch=FOLDER [--num_vectors=1000000]
    [--usearch=i8]

Vectors are drawn: clusters of forty whose variances fall as 1 / (1 + i) over
the numbers, which is how those of efficientnet_lite0's features of groceries
fall. The index is that of `cmd-jax index`, whose search of 1,000 queries is
compared with an exact one. With --usearch the graph of usearch is built of the
same vectors, its candidates compared anew as those of the lists are.
"""

from __future__ import annotations

import pathlib
import shutil
import time
from collections.abc import Iterator

import numpy as np

from benchmarks import record
from cmd_jax.errors import UserError
from cmd_jax.evaluators.features import unit_rows
from cmd_jax.image_index import ranking, store

K = 10
_OF_A_CLUSTER, _SPREAD = 40, 0.7
_BLOCK = 1 << 16


def draw(
  count: int, centres: np.ndarray, scale: np.ndarray, seed: int
) -> Iterator[np.ndarray]:
  """Blocks of vectors around centres."""
  rng = np.random.default_rng(seed)
  for start in range(0, count, _BLOCK):
    size = min(_BLOCK, count - start)
    own = centres[rng.integers(0, len(centres), size)]
    noise = rng.normal(size=own.shape).astype(np.float32)
    yield own + _SPREAD * scale * noise


def fill(folder: pathlib.Path, count: int, dim: int):
  """An index without lists, and 1,000 queries like its vectors."""
  rng = np.random.default_rng(0)
  scale = (1 + np.arange(dim, dtype=np.float32)) ** -0.5
  clusters = max(count // _OF_A_CLUSTER, 1)
  centres = rng.normal(size=(clusters, dim)).astype(np.float32) * scale
  encoder = store.EncoderId('drawn', '0' * 64, {})
  folder.mkdir(parents=True)
  index = store.empty(folder, folder, encoder, dim)
  for block in draw(count, centres, scale, 1):
    store.append(index, block)
    first = len(index.items.names)
    names = [f'{first + i:08d}.jpg' for i in range(len(block))]
    stamps = np.zeros((len(block), 2), np.int64)
    items = store.extended(index.items, names, stamps, [''] * len(block), block)
    index = index._replace(items=items)
  return store.commit(index), next(draw(1000, centres, scale, 2))


def recall(found: np.ndarray, truth: np.ndarray) -> float:
  """Share of the true ten nearest that were found."""
  return float(
    np.mean([len({*a} & {*b}) / K for a, b in zip(found.tolist(), truth)])
  )


def measure_usearch(
  index: store.Index, queries: np.ndarray, truth: np.ndarray, dtype: str
) -> list[dict]:
  """The graph of usearch in place of the lists."""
  from usearch.index import Index

  mean, vectors = index.items.mean, index.vectors()
  graph = Index(ndim=index.dim, metric='cos', dtype=dtype)
  start = time.perf_counter()
  for first in range(0, len(vectors), _BLOCK):
    block = unit_rows(vectors[first : first + _BLOCK] - mean)
    graph.add(np.arange(first, first + len(block)), block)
  built = time.perf_counter() - start
  path = index.path / 'graph.usearch'
  graph.save(str(path))
  graph = Index.restore(str(path), view=True)
  rows = []
  around = unit_rows(queries - mean)
  for expansion in (64, 256):
    graph.expansion_search = expansion
    graph.search(around[:8], 4 * K)
    start = time.perf_counter()
    candidates = graph.search(around, 4 * K).keys.astype(int)
    compared = ranking.compare(
      queries, vectors, mean, candidates, index.items.states
    )
    order = np.argsort(-compared, axis=1)[:, :K]
    found = np.take_along_axis(candidates, order, axis=1)
    rows.append(
      {
        'what': f'usearch {dtype}, expansion {expansion}',
        'build_s': built,
        'search_s': time.perf_counter() - start,
        'recall@10': recall(found, truth),
        'megabytes': path.stat().st_size / 1e6,
      }
    )
  return rows


def main() -> None:
  """Measures, prints and writes."""
  parser = record.make_parser(__doc__)
  parser.add_argument('--scratch', type=pathlib.Path, required=True)
  parser.add_argument('--num_vectors', type=int, default=1_000_000)
  parser.add_argument('--dim', type=int, default=384)
  parser.add_argument('--usearch', choices=('bf16', 'f16', 'i8'))
  run = record.begin('index', parser)
  options = run.options
  folder = options.scratch / 'index'
  if folder.exists():
    raise UserError(f'{folder} is there already: choose another --scratch')
  try:
    index, queries = fill(folder, options.num_vectors, options.dim)
    start = time.perf_counter()
    truth = ranking.rank(index, queries, K).rows
    exact_s = time.perf_counter() - start
    start = time.perf_counter()
    index = store.commit(ranking.with_lists(index))
    built = time.perf_counter() - start
    start = time.perf_counter()
    index = store.open_index(folder)
    opened = time.perf_counter() - start
    rows = [{'what': 'exact', 'search_s': exact_s, 'recall@10': 1.0}]
    for name in ('lists, first search', 'lists, second search'):
      start = time.perf_counter()
      found = ranking.rank(index, queries, K).rows
      seconds = time.perf_counter() - start
      row = {
        'what': name,
        'build_s': built,
        'search_s': seconds,
        'recall@10': recall(found, truth),
      }
      if index.lists:
        size = (folder / index.lists.file).stat().st_size
        row |= {
          'megabytes': size / 1e6,
          'probes': index.lists.probes,
          'recall_told': index.lists.recall,
        }
      rows.append(row)
    if options.usearch:
      rows += measure_usearch(index, queries, truth, options.usearch)
  finally:
    shutil.rmtree(folder, ignore_errors=True)
  record.finish(
    run,
    rows,
    vectors=options.num_vectors,
    dim=options.dim,
    queries=len(queries),
    open_s=opened,
  )


if __name__ == '__main__':
  record.run_main(main)
