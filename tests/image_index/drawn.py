"""Indexes of vectors that are drawn."""

import numpy as np

from cmd_jax.image_index import store


def append(index, rows):
  """The index with rows behind its own, which are not committed."""
  first = len(index.items.names)
  store.append(index, rows)
  items = store.extended(
    index.items,
    [f'{first + i}.png' for i in range(len(rows))],
    np.zeros((len(rows), 2), np.int64),
    [''] * len(rows),
    rows,
  )
  return index._replace(items=items)
