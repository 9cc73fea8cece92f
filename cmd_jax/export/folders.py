"""What `cmd-jax embed`, `search`, `cluster` and `predict` do with a folder."""

from __future__ import annotations

import os
import pathlib
import sys
from typing import NamedTuple

import numpy as np

import cmd_jax
from cmd_jax.api import Encoder
from cmd_jax.data.canvas import printable
from cmd_jax.errors import UserError
from cmd_jax.export import cluster, embed, predict, search
from cmd_jax.export.images import Embeddings, embed_folder, list_images
from cmd_jax.export.search_encoder import load_for_search
from cmd_jax.files import disk_errors
from cmd_jax.files.atomic import make_place

MODES = ('embed', 'search', 'cluster', 'predict')


class Request(NamedTuple):
  """What is asked for; the flags of main.py of the same names.

  Attributes:
    source: work directory of a run, or file of weights.
    input: folder of images, or a file that `cmd-jax embed` wrote.
    output: file or folder to write.
    query: image to search for; None in the other modes.
    top_k: images to find.
    index: one of `search.INDEXES`.
    num_clusters: groups to make; 0 finds out.
    min_cluster_size: images of a group, at least.
    newest: whether the newest checkpoint is used, not the best.
    view_px: side of the views; 0 for the one chosen for the encoder.
    pooling: of `models.pooling`; empty for the one chosen for the encoder.
  """

  source: str
  input: str
  output: pathlib.Path
  query: str | None = None
  top_k: int = 12
  index: str = 'exact'
  num_clusters: int = 0
  min_cluster_size: int = 5
  newest: bool = False
  view_px: int = 0
  pooling: str = ''


def default_output(mode: str, workdir: str | None) -> pathlib.Path:
  """Where a mode writes: into the work directory, or into this folder."""
  name = {
    'embed': 'embeddings.parquet',
    'search': 'search.csv',
    'cluster': 'clusters',
    'predict': 'predictions.csv',
  }[mode]
  return pathlib.Path(workdir or '.').expanduser() / name


def _embeddings(encoder: Encoder, source: str) -> Embeddings:
  """Those of a folder, or of a file of them."""
  path = pathlib.Path(source).expanduser()
  if path.is_file():
    embeddings = embed.load_embeddings(path, encoder)
  else:
    embeddings = embed_folder(encoder, path)
  if not np.isfinite(embeddings.vectors).all():
    raise UserError(
      f'{encoder.source} gives features of {path} that are not finite: use '
      'another checkpoint or other weights'
    )
  if embeddings.skipped:
    name, reason = embeddings.skipped[0]
    print(
      f'{len(embeddings.skipped)} unreadable image(s) skipped, the first is '
      f'{printable(name)}: {reason}',
      file=sys.stderr,
    )
  return embeddings


def _check(mode: str, request: Request) -> None:
  """Refuses what can be known before an image is looked at."""
  if mode == 'cluster':
    cluster.check_output(request.output)
    cluster.check(request.num_clusters, request.min_cluster_size)
  else:
    if mode == 'embed':
      embed.check_output(request.output)
    elif mode == 'predict':
      predict.check_output(request.output)
    else:
      search.check(request.output, request.top_k, request.index)
      if not os.path.isfile(request.query):
        raise UserError(
          f'--query={request.query} is no file: give that of an image'
        )
    if request.output.is_dir():
      raise UserError(
        f'--output={request.output} is a folder: give the name of a file'
      )
  with disk_errors.writing(request.output):
    make_place(request.output)


def _embed(encoder: Encoder, request: Request) -> str:
  embeddings = _embeddings(encoder, request.input)
  embed.save_embeddings(request.output, encoder, embeddings)
  count, dim = embeddings.vectors.shape
  return f'{request.output}: {count} embeddings of {dim} features'


def _search(encoder: Encoder, request: Request) -> str:
  # First, because it may be no image and the folder large.
  query = encoder.embed(request.query)[0]
  gallery = _embeddings(encoder, request.input)
  if own := search.rows_of(gallery, pathlib.Path(request.query)):
    print(
      f'{printable(request.query)} is in --input and is not a result of itself',
      file=sys.stderr,
    )
  found = search.search(
    query, gallery, request.top_k, request.index, without=own
  )
  picture = search.save_results(
    request.output, pathlib.Path(request.query), gallery, found
  )
  return f'{search.table(gallery, found)}\n\n{request.output}\n{picture}'


def _cluster(encoder: Encoder, request: Request) -> str:
  path = pathlib.Path(request.input).expanduser()
  if request.num_clusters and not path.is_file():
    cluster.check_count(request.num_clusters, len(list_images(path)))
  embeddings = _embeddings(encoder, request.input)
  found = cluster.find_clusters(
    embeddings.vectors, request.num_clusters, request.min_cluster_size
  )
  cluster.save_clusters(request.output, embeddings, found)
  groups = found.labels.max() + 1
  alone = int((found.labels == cluster.ALONE).sum())
  return f'{request.output}: {groups} groups, {alone} images in none'


def _predict(encoder: Encoder, request: Request) -> str:
  classifier = predict.check_classifier(encoder)
  embeddings = _embeddings(encoder, request.input)
  predictions = predict.predict(classifier, embeddings.vectors)
  predict.save_predictions(
    request.output, classifier, embeddings.file_names, predictions
  )
  count, known = len(predictions.taken), int(predictions.is_known.sum())
  return (
    f'{request.output}: {count} images, {known} named, {count - known} not '
    f'among the {len(classifier.class_names)} classes'
  )


def run(mode: str, request: Request) -> str:
  """Does what is asked for.

  Args:
    mode: one of `MODES`.
    request: what is asked for.

  Returns:
    What to print.

  Raises:
    UserError: anything about the request that cannot be.
  """
  if not request.input:
    raise UserError(
      '--input is missing: give a folder of images, or a file that '
      'cmd-jax embed wrote'
    )
  if mode == 'search' and not request.query:
    raise UserError('--query is missing: give an image file')
  request = request._replace(
    output=request.output.expanduser(),
    query=os.path.expanduser(request.query or ''),
  )
  _check(mode, request)
  if mode == 'predict':
    # The classifier is of the vectors that it was trained on.
    encoder = cmd_jax.load(request.source, newest=request.newest)
  else:
    encoder = load_for_search(
      request.source,
      newest=request.newest,
      view_px=request.view_px,
      pooling=request.pooling,
    )
  print(encoder.source, file=sys.stderr)
  functions = {
    'embed': _embed,
    'search': _search,
    'cluster': _cluster,
    'predict': _predict,
  }
  return functions[mode](encoder, request)
