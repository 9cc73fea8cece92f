"""How well the groups of `cmd-jax cluster` are the categories.

  python -m benchmarks.clusters --photographs=FOLDER [--weights=WEIGHTS]

FOLDER has cub20, cars14, grocery81 and cub100_box227 or some of them, each with
its labels.csv. The test images of each set are embedded as `cmd-jax cluster`
does it and grouped twice: as it does, and by unit vectors that are centred
alone, as it did before. Groups are compared with the categories by the adjusted
mutual information (1 for the same, 0 for chance); an image without a group
counts as one of a further group.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
from sklearn.cluster import HDBSCAN, KMeans
from sklearn.metrics import adjusted_mutual_info_score

import cmd_jax
from benchmarks import record
from benchmarks.retrieval import SETS, read
from cmd_jax.errors import UserError
from cmd_jax.evaluators.features import principal_components, unit_rows
from cmd_jax.export.cluster import find_clusters

VIEW_PX = 320
POOLING = 'strength'


def _centred_alone(vectors: np.ndarray, count: int) -> np.ndarray:
  """Groups by unit vectors; see `find_clusters`."""
  points = principal_components(unit_rows(vectors), 64)
  if count:
    return KMeans(count, n_init=4, random_state=0).fit_predict(points)
  return HDBSCAN(
    min_cluster_size=5, cluster_selection_method='leaf', copy=True
  ).fit_predict(points)


def score_set(
  name: str, folder: pathlib.Path, weights: str
) -> list[dict[str, Any]]:
  """A row for each way to group a set."""
  photographs = read(folder)
  test = np.flatnonzero(photographs.splits == 'test')
  encoder = cmd_jax.load(weights, view_px=VIEW_PX, pooling=POOLING)
  vectors = encoder.embed([photographs.files[row] for row in test])
  labels = photographs.labels[test]
  rows = []
  for way, count in (('k-means', len(np.unique(labels))), ('HDBSCAN', 0)):
    groups = {
      'before': _centred_alone(vectors, count),
      'now': find_clusters(vectors, count).labels,
    }
    row = {'set': name, 'images': len(test), 'by': way}
    for when, found in groups.items():
      row[f'information, {when}'] = adjusted_mutual_info_score(labels, found)
      row[f'groups, {when}'] = int(found.max()) + 1
      row[f'alone, {when}'] = float((found < 0).mean())
    rows.append(row)
  return rows


def main() -> None:
  """Measures, prints and writes."""
  parser = record.make_parser(__doc__)
  parser.add_argument('--photographs', type=pathlib.Path, required=True)
  parser.add_argument('--weights', default='efficientnet_lite0')
  parser.add_argument('--sets', default='cub20,cars14,grocery81')
  run = record.begin('clusters', parser)
  options = run.options
  names = options.sets.split(',')
  if unknown := set(names) - set(SETS):
    raise UserError(f'--sets={unknown.pop()}: choose of {", ".join(SETS)}')
  rows = [
    row
    for name in names
    for row in score_set(name, options.photographs / name, options.weights)
  ]
  record.finish(run, rows, weights=options.weights)


if __name__ == '__main__':
  record.run_main(main)
