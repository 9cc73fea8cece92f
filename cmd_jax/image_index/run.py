"""`cmd-jax index build`, `add` and `search`."""

from __future__ import annotations

import csv
import io
import os
import pathlib
import sys
from typing import NamedTuple

import numpy as np

from cmd_jax.api import Encoder
from cmd_jax.data.canvas import Skipped, printable
from cmd_jax.errors import UserError
from cmd_jax.export.images import embed_blocks, list_images, none_readable
from cmd_jax.export.search_encoder import load_for_search
from cmd_jax.files import disk_errors
from cmd_jax.files.atomic import make_place, write_atomically
from cmd_jax.image_index import store
from cmd_jax.image_index.ranking import Ranked, rank
from cmd_jax.image_index.store import EncoderId, Index
from cmd_jax.image_index.update import Counts, stamp, update

ACTIONS = ('build', 'add', 'search')


class Request(NamedTuple):
  """What is asked for; the flags of the same names.

  Attributes:
    action: one of `ACTIONS`.
    index_dir: folder of the index.
    source: work directory of a run, or file or name of weights; None for the
      encoder that made the index.
    input: folder of images to build of or to add.
    query: image or folder of images to search for.
    query_class: class of the index whose images are searched for.
    output: CSV file of the results.
    top_k: results a query.
    newest: whether the newest checkpoint is used, not the best.
    view_px: side of the views; 0 for the one chosen for the encoder, or that
      of the index.
    pooling: of `models.pooling`; empty likewise.
  """

  action: str
  index_dir: str | None
  source: str | None = None
  input: str | None = None
  query: str | None = None
  query_class: str | None = None
  output: pathlib.Path = pathlib.Path('search.csv')
  top_k: int = 12
  newest: bool = False
  view_px: int = 0
  pooling: str = ''


class Queries(NamedTuple):
  """Q images that are searched for.

  Attributes:
    names: [Q] as the result names them.
    vectors: [Q, D] float32.
    rows: [Q] their rows of the index; -1 for those not in it.
  """

  names: list[str]
  vectors: np.ndarray
  rows: np.ndarray


def _view_of(encoder: EncoderId) -> str:
  fields = encoder.preprocessing
  pooling = fields.get('pooling', 'encoder')
  return f'views of {fields["view_px"]} px, pooling {pooling}'


def _load(
  request: Request, source: str, index: Index | None = None
) -> tuple[Encoder, EncoderId]:
  """An encoder, which must be that of an index if one is given.

  Raises:
    UserError: it cannot be loaded, or is another than that of the index.
  """
  view_px, pooling = request.view_px, request.pooling
  if index is not None:
    made_by = index.encoder.preprocessing
    view_px = view_px or made_by['view_px']
    pooling = pooling or made_by.get('pooling', 'encoder')
  encoder = load_for_search(
    source, newest=request.newest, view_px=view_px, pooling=pooling
  )
  path = os.path.expanduser(source)
  if os.path.exists(path):
    # The index outlives the folder that the program runs in.
    source = os.path.abspath(path)
  found = EncoderId(source, encoder.hash, encoder.preprocessing)
  if index is not None and not found.same_vectors(index.encoder):
    theirs = index.encoder
    raise UserError(
      f'{index.path} was made by another encoder ({theirs.source}, weights '
      f'{theirs.sha256[:12]}, {_view_of(theirs)}) than {encoder.source} '
      f'({found.sha256[:12]}, {_view_of(found)}): use that one, or build '
      'another index'
    )
  print(encoder.source, file=sys.stderr)
  return encoder, found


def _tell_skipped(skipped: tuple[Skipped, ...]) -> None:
  if skipped:
    print(
      f'{len(skipped)} unreadable image(s) skipped, the first is '
      f'{printable(skipped[0].file_name)}: {skipped[0].reason}',
      file=sys.stderr,
    )


def _describe(index: Index, counts: Counts) -> str:
  """The index after an update, in words."""
  lines = [
    f'{index.path}: {len(index.items.live)} images, {index.dim} features, '
    f'{len(index.items.class_names)} classes',
    f'added {counts.added} (of these changed: {counts.changed}), already there '
    f'{counts.unchanged}, vanished {counts.vanished}, unreadable '
    f'{len(counts.skipped)}',
  ]
  if index.lists:
    lines.append(
      f'{index.lists.probes} lists are looked at for a query; of the ten '
      f'nearest they have {index.lists.recall:.1%}'
    )
  return '\n'.join(lines)


def _build(request: Request, path: pathlib.Path) -> str:
  if not request.source:
    raise UserError('give one of --workdir, a run, and --weights, a file')
  folder = _folder(request)
  store.check_new(path)
  list_images(folder)
  encoder, encoder_id = _load(request, request.source)
  try:
    with store.locked(path):
      dim = encoder.embed(np.zeros((8, 8, 3), np.uint8)).shape[1]
      index = store.empty(path, folder, encoder_id, dim)
      index, counts = update(encoder, index, folder)
  except BaseException:
    if not (path / store.MANIFEST).exists():
      store.discard(path)
    raise
  _tell_skipped(counts.skipped)
  return _describe(index, counts)


def _add(request: Request, path: pathlib.Path) -> str:
  folder = _folder(request)
  index = store.open_index(path)
  list_images(folder)
  encoder, _ = _load(request, request.source or index.encoder.source, index)
  with store.locked(path):
    # Somebody may have added to it while the encoder was read.
    index, counts = update(encoder, store.open_index(path), folder)
  _tell_skipped(counts.skipped)
  return _describe(index, counts)


def _folder(request: Request) -> pathlib.Path:
  if not request.input:
    raise UserError('--input is missing: give a folder of images')
  return pathlib.Path(os.path.abspath(os.path.expanduser(request.input)))


def _queries_of_class(index: Index, name: str) -> Queries:
  known = index.items.class_names
  if name not in known:
    shown = ', '.join(known[:20]) + (', ...' if len(known) > 20 else '')
    raise UserError(
      f'--query_class={name} is no class of {index.path}: choose '
      f'{shown or "an index of images with classes"}'
    )
  live = index.items.live
  rows = live[index.items.labels[live] == known.index(name)]
  if not len(rows):
    raise UserError(
      f'--query_class={name} has no image that is still there: choose another'
    )
  names = [index.items.names[row] for row in rows]
  return Queries(names, np.array(index.vectors()[rows]), rows)


def _queries_of_files(request: Request, index: Index) -> Queries:
  """Of an image or a folder; those in the index are not encoded again."""
  path = pathlib.Path(os.path.expanduser(request.query))
  if path.is_dir():
    root, files = path, list_images(path)
  elif path.is_file():
    root, files = path.parent, [path.name]
  else:
    raise UserError(
      f'--query={request.query} does not exist: give an image or a folder'
    )
  items = index.items
  row_of = {items.names[row]: int(row) for row in items.live}
  rows = []
  for name in files:
    row = row_of.get(index.name_of(root / name), -1)
    if row >= 0 and tuple(items.stamps[row]) != stamp(root / name):
      row = -1
    rows.append(row)
  vectors = np.zeros((len(files), index.dim), np.float32)
  rows, known = np.array(rows), np.array(rows) >= 0
  vectors[known] = index.vectors()[rows[known]]
  missing = [name for name, is_known in zip(files, known) if not is_known]
  if missing:
    encoder, _ = _load(request, request.source or index.encoder.source, index)
    place_of = {name: place for place, name in enumerate(files)}
    skipped, unreadable = [], np.zeros(len(files), bool)
    for block in embed_blocks(
      encoder, root, missing, progress=len(missing) > 1
    ):
      skipped += block.skipped
      if block.names:
        places = [place_of[name] for name in block.names]
        vectors[places] = index.like_rows(block.vectors)
    unreadable[[place_of[x.file_name] for x in skipped]] = True
    if unreadable.all():
      raise none_readable(root, skipped)
    _tell_skipped(tuple(skipped))
    vectors, rows = vectors[~unreadable], rows[~unreadable]
    files = [name for name, bad in zip(files, unreadable) if not bad]
  return Queries([index.name_of(root / name) for name in files], vectors, rows)


def to_csv(index: Index, queries: Queries, found: Ranked) -> str:
  """A line for each result: the query, its rank, both cosines, file, class."""
  text, items = io.StringIO(), index.items
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(
    ['query', 'rank', 'likeness', 'similarity', 'file', 'class_name']
  )
  for query, *columns in zip(queries.names, *found):
    for place, (row, likeness, cosine) in enumerate(zip(*columns), 1):
      if row >= 0:
        label = items.labels[row]
        class_name = items.class_names[label] if label >= 0 else ''
        numbers = f'{likeness:.6f}', f'{cosine:.6f}'
        writer.writerow([query, place, *numbers, items.names[row], class_name])
  return text.getvalue()


def _table(index: Index, found: Ranked) -> str:
  """The result of one query as `cmd-jax search` shows it."""
  lines = ['rank  likeness  cosine  file']
  for place, (row, likeness, cosine) in enumerate(
    zip(*(column[0] for column in found)), 1
  ):
    if row >= 0:
      name = printable(index.items.names[row])
      lines.append(f'{place:4}  {likeness:8.3f}  {cosine:6.3f}  {name}')
  return '\n'.join(lines)


def _same_class(index: Index, queries: Queries, found: Ranked) -> str:
  """How often the nearest has the class of its query.

  Asked of queries whose class has other images in the index.
  """
  labels, in_index = index.items.labels, queries.rows >= 0
  asked = labels[queries.rows[in_index]]
  if not len(asked) or not found.rows.shape[1]:
    return ''
  first = found.rows[in_index, 0]
  of_live = labels[index.items.live]
  counts = np.bincount(
    of_live[of_live >= 0], minlength=len(index.items.class_names)
  )
  # The last is that of -1, no class.
  has_others = np.append(counts > 1, False)
  judged = has_others[asked] & (first >= 0) & (labels[first] >= 0)
  if not judged.any():
    return ''
  share = np.mean(asked[judged] == labels[first[judged]])
  return (
    f'the nearest has the class of its query for {share:.1%} of '
    f'{int(judged.sum())} queries\n'
  )


def _search(request: Request, path: pathlib.Path) -> str:
  if bool(request.query) == bool(request.query_class):
    raise UserError(
      'give one of --query, an image or a folder, and --query_class, a class '
      'of the index'
    )
  output = request.output.expanduser()
  if output.suffix != '.csv' or output.is_dir():
    raise UserError(f'--output is {output}: give a file that ends in .csv')
  if request.top_k < 1:
    raise UserError(f'--top_k is {request.top_k}: make it at least 1')
  index = store.open_index(path)
  if request.query_class:
    queries = _queries_of_class(index, request.query_class)
  else:
    queries = _queries_of_files(request, index)
  found = rank(index, queries.vectors, request.top_k, without=queries.rows)
  content = to_csv(index, queries, found)
  with disk_errors.writing(output):
    make_place(output)
    write_atomically(output, content)
  shown = ''
  if len(queries.names) == 1:
    shown = _table(index, found) + '\n\n'
  return (
    f'{shown}{_same_class(index, queries, found)}{output}: '
    f'{len(queries.names)} queries among {len(index.items.live)} images'
  )


def run(request: Request) -> str:
  """Does what is asked for.

  Args:
    request: what is asked for.

  Returns:
    What to print.

  Raises:
    UserError: anything about the request that cannot be.
  """
  if not request.index_dir:
    raise UserError('--index_dir is missing: name the folder of the index')
  path = pathlib.Path(os.path.abspath(os.path.expanduser(request.index_dir)))
  functions = {'build': _build, 'add': _add, 'search': _search}
  return functions[request.action](request, path)
