"""`cmd-jax cluster`: the images of a folder in groups of look-alikes."""

from __future__ import annotations

import csv
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from cmd_jax.errors import UserError, missing_extra
from cmd_jax.evaluators.features import principal_components, unit_rows
from cmd_jax.evaluators.whitening import apart_in
from cmd_jax.export.images import Embeddings
from cmd_jax.files import disk_errors
from cmd_jax.files.atomic import new_folder

ALONE = -1
_CSV = 'clusters.csv'
# Distances in more dimensions tell less and take longer.
_MAX_DIM = 64


class Clusters(NamedTuple):
  """Images in groups.

  Attributes:
    labels: [N] group of every image, the largest group first; `ALONE` for an
      image that is like no other.
    likeness: [N] cosine to the mean direction of the group, of vectors as they
      are told apart; 0 without a group.
  """

  labels: np.ndarray
  likeness: np.ndarray


def check(num_clusters: int, min_size: int) -> None:
  """Raises UserError for what cannot be, before the work begins."""
  _sklearn_cluster()
  if num_clusters < 0:
    raise UserError(
      f'--num_clusters is {num_clusters}: give 0, which finds out, or more'
    )
  if min_size < 2:
    raise UserError(
      f'--min_cluster_size is {min_size}: a group has at least 2 images'
    )


def check_count(num_clusters: int, count: int) -> None:
  """Raises UserError for more groups than images."""
  if not 0 <= num_clusters <= count:
    raise UserError(
      f'--num_clusters is {num_clusters}: give 0, which finds out, or at most '
      f'the number of images, {count}'
    )


def _sklearn_cluster() -> Any:
  try:
    import sklearn.cluster
  except ImportError as error:
    raise missing_extra(
      'cmd-jax cluster needs scikit-learn', 'cluster'
    ) from error
  return sklearn.cluster


def find_clusters(
  vectors: np.ndarray, num_clusters: int = 0, min_size: int = 5, seed: int = 0
) -> Clusters:
  """Groups embeddings as `search` tells them apart.

  Unit vectors, whitened by what neighbours among them differ in
  (`whitening.apart_in`), or centred where they are few, and projected to at
  most 64 principal components. How
  many groups there are is found by HDBSCAN (Campello et al. 2013) as
  scikit-learn has it, with the leaves of its tree, the smallest groups (the
  stablest are usually two); it leaves out images that are like no others. Or
  the number is given, and k-means finds that many and leaves out none.

  Args:
    vectors: [N, D].
    num_clusters: of k-means; 0 takes HDBSCAN.
    min_size: of a group that HDBSCAN finds.
    seed: of k-means.

  Raises:
    UserError: scikit-learn is not installed, a negative number, or fewer images
      than groups.
  """
  check(num_clusters, min_size)
  count, library = len(vectors), _sklearn_cluster()
  check_count(num_clusters, count)
  unit = unit_rows(vectors)
  unit = unit_rows(apart_in(unit)(unit))
  points = principal_components(unit, _MAX_DIM)
  if num_clusters:
    kmeans = library.KMeans(num_clusters, n_init=4, random_state=seed)
    labels = kmeans.fit_predict(points)
  elif count < min_size:
    labels = np.full(count, ALONE)
  else:
    labels = library.HDBSCAN(
      min_cluster_size=min_size, cluster_selection_method='leaf', copy=True
    ).fit_predict(points)
    labels = np.where(labels < 0, ALONE, labels)
  return _summarise(unit, labels)


def _summarise(unit: np.ndarray, labels: np.ndarray) -> Clusters:
  """Numbers the groups by size and compares their images with their means."""
  found, sizes = np.unique(labels[labels != ALONE], return_counts=True)
  ordered = np.full(len(labels), ALONE)
  likeness = np.zeros(len(labels))
  for number, group in enumerate(np.argsort(-sizes, kind='stable')):
    rows = np.flatnonzero(labels == found[group])
    mean = unit[rows].mean(axis=0)
    ordered[rows] = number
    likeness[rows] = unit[rows] @ mean / max(np.linalg.norm(mean), 1e-12)
  return Clusters(ordered, likeness)


def check_output(folder: pathlib.Path) -> None:
  """Raises UserError for a folder with something in it, before the work."""
  if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
    raise UserError(
      f'{folder} is there already: choose another --output, or delete it'
    )


def save_clusters(
  folder: pathlib.Path, embeddings: Embeddings, clusters: Clusters
) -> None:
  """Writes a folder of links for every group, and a table of all images.

  The images themselves are neither moved nor copied. A link is called by its
  place in the group, the most typical image first, and the image's name;
  `alone` holds those without a group; clusters.csv has the columns file,
  cluster and likeness.

  Args:
    folder: created as a whole; it must not be there.
    embeddings: of the images.
    clusters: of the images.

  Raises:
    UserError: the folder is there, or can't be written.
  """
  check_output(folder)
  with disk_errors.writing(folder):
    with new_folder(folder) as unfinished:
      _write_links(unfinished, embeddings, clusters)
      _write_table(unfinished / _CSV, embeddings, clusters)


def _write_links(
  folder: pathlib.Path, embeddings: Embeddings, clusters: Clusters
) -> None:
  root = embeddings.folder.absolute()
  for label in np.unique(clusters.labels):
    place = folder / ('alone' if label == ALONE else f'cluster_{label:03d}')
    place.mkdir()
    rows = np.flatnonzero(clusters.labels == label)
    rows = rows[np.argsort(-clusters.likeness[rows], kind='stable')]
    for rank, row in enumerate(rows):
      name = embeddings.file_names[row]
      # The last letters tell more than the first, and a name has 255 bytes;
      # what is left of a letter that is cut is cut as well.
      letters = os.fsencode(name.rpartition('/')[2])
      short = letters[-200:]
      if short != letters:
        short = short.lstrip(bytes(range(0x80, 0xC0)))
      short = os.fsdecode(short)
      (place / f'{rank:05d}_{short}').symlink_to(root / name)


def _write_table(
  path: pathlib.Path, embeddings: Embeddings, clusters: Clusters
) -> None:
  with open(
    path, 'w', encoding='utf-8', errors='surrogateescape', newline=''
  ) as file:
    writer = csv.writer(file, lineterminator='\n')
    writer.writerow(['file', 'cluster', 'likeness'])
    for name, label, likeness in zip(embeddings.file_names, *clusters):
      writer.writerow([name, label, f'{likeness:.6f}'])
