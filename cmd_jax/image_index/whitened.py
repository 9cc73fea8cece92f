"""An index whose vectors are whitened, so that it ranks as `search` does.

The mean, which `ranking` takes off, is that of the live rows at any time.
"""

from __future__ import annotations

import io
import os

import numpy as np

from cmd_jax.evaluators.whitening import (
  MIN_VECTORS,
  learn_whitening,
  project,
)
from cmd_jax.files.atomic import write_atomically
from cmd_jax.image_index.store import Index, Whitened

# Images that it is learned of, at most.
_LEARNED_OF = 20_000
# Once there are so many times as many images it is learned anew.
_GROWTH = 2
_BLOCK = 1 << 13


def with_whitening(index: Index) -> Index:
  """The index with all rows whitened by what neighbours among them differ in.

  From 200 images on, and anew when there are twice as many. The index on the
  disk is that with the next `commit`, and until then what it was.

  Args:
    index: whose rows are appended.
  """
  live = index.items.live
  known = index.whitened.images * _GROWTH if index.whitened else MIN_VECTORS
  if len(live) < known:
    return index
  vectors = index.vectors()
  back = None
  if index.whitened:
    back = np.linalg.inv(index.whitened.matrix).astype(np.float32)

  def of_encoder(rows: np.ndarray | slice) -> np.ndarray:
    block = np.array(vectors[rows])
    return block if back is None else project(block, back)

  rng = np.random.default_rng(0)
  sample = live
  if len(live) > _LEARNED_OF:
    sample = np.sort(rng.choice(live, _LEARNED_OF, replace=False))
  learned = learn_whitening(of_encoder(sample))
  if learned is None:
    return index
  number = index.generation + 1
  file, is_live = f'vectors-{number}.f32', np.zeros(len(vectors), bool)
  is_live[live] = True
  total = np.zeros(index.dim)
  with open(index.path / file, 'wb') as stream:
    for start in range(0, len(vectors), _BLOCK):
      rows = slice(start, start + _BLOCK)
      block = project(of_encoder(rows), learned.matrix)
      total += block[is_live[rows]].sum(0, dtype=np.float64)
      stream.write(np.ascontiguousarray(block, '<f4').tobytes())
    stream.flush()
    os.fsync(stream.fileno())
  buffer = io.BytesIO()
  np.savez(buffer, matrix=learned.matrix)
  name = f'whitening-{number}.npz'
  write_atomically(index.path / name, buffer.getvalue())
  return index._replace(
    items=index.items._replace(total=total),
    vectors_file=file,
    whitened=Whitened(name, learned.matrix, len(live)),
    # Of vectors that are no more.
    lists=None,
  )
