"""Tar shards as a data source, in the layout of WebDataset.

A sample is the files of a shard that share a name up to the first dot of its
last part: `0001.jpg` with `0001.cls` (an integer or a class name),
`0001.txt` (a class name) or `0001.json` (with `label` or `class_name`),
wherever in the shard they are. `shard_samples` tells which image is a sample's.
The offsets of the images are listed once and kept, so that any image can be
read without reading what is before it.
"""

from __future__ import annotations

import array
import collections
import concurrent.futures
import functools
import glob
import io
import json
import os
import posixpath
import re
import tarfile
from collections.abc import Sequence
from typing import IO, Any, NamedTuple

import fsspec
import numpy as np
import tqdm

from cmd_jax.data import image_files, image_formats
from cmd_jax.data.inspect import kinds
from cmd_jax.data.sources import index, shard_samples
from cmd_jax.data.sources.base import UNLABELLED, Example, Source
from cmd_jax.errors import UserError, missing_extra
from cmd_jax.files.safe_read import one_line

# A text of more digits is no number.
_NUMBER = re.compile(r'-?[0-9]{1,18}')
_RANGE = re.compile(r'\{(\d+)\.\.(\d+)\}')
# Shards listed at a time; a listing waits for storage more than it computes.
_IN_PARALLEL = 16


class _Listed(NamedTuple):
  """The images of one shard.

  Attributes:
    names: of the images, '<shard>/<name in the shard>'.
    labels: texts of their labels, '' for none.
    offsets: [K] of the images' bytes in the shard.
    sizes: [K] number of these bytes.
    left_out: number of files by the reason, see `shard_samples.Samples`.
  """

  names: list[str]
  labels: list[str]
  offsets: array.array
  sizes: array.array
  left_out: collections.Counter[str]


def _expand(pattern: str) -> list[str]:
  """Number ranges in braces: 'a-{00..02}.tar' -> a-00, a-01, a-02."""
  found = _RANGE.search(pattern)
  if found is None:
    return [pattern]
  first, last = found.groups()
  return [
    url
    for number in range(int(first), int(last) + 1)
    for url in _expand(
      pattern[: found.start()]
      + str(number).zfill(len(first))
      + pattern[found.end() :]
    )
  ]


def list_urls(pattern: str) -> list[str]:
  """The shards that a pattern names, sorted.

  Args:
    pattern: path or fsspec URL ('gs://bucket/train-*.tar') with `*`, `?` or
      number ranges ('{0000..0146}'); several, separated by spaces.

  Raises:
    UserError: none is there, or the storage can't be read.
  """
  urls = []
  for part in pattern.split():
    for url in _expand(os.path.expanduser(part)):
      try:
        files, path = fsspec.url_to_fs(url)
        found = files.glob(path)
      except ImportError as error:
        if not url.startswith(('gs:', 'gcs:')):
          raise UserError(f'{url} cannot be opened: {error}') from error
        raise missing_extra(f'{url} needs gcsfs', 'gcs') from error
      except (OSError, ValueError) as error:
        raise UserError(
          f'cannot look for the shards {url} ({error}): check the pattern'
        ) from error
      if not found and not glob.has_magic(path) and len(_expand(part)) > 1:
        raise UserError(
          f'{url} does not exist, but {part} names it: fetch it, or set '
          'config.dataset to those there are'
        )
      urls += [files.unstrip_protocol(name) for name in found]
  if not urls:
    raise UserError(
      f'no shards match {pattern!r}: set config.dataset.train and test, '
      "e.g. '/data/train-{000..009}.tar'"
    )
  return sorted(set(urls))


def _list_shard(url: str, title: str) -> _Listed:
  listed = _Listed(
    [], [], array.array('q'), array.array('q'), collections.Counter()
  )
  try:
    with (
      fsspec.open(url, 'rb') as file,
      tarfile.open(fileobj=file, mode='r:') as tar,
    ):
      samples = shard_samples.samples_of(tar, image_formats.EXTENSIONS)
      for image in samples.images:
        listed.names.append(f'{title}/{image.name}')
        listed.labels.append(image.label)
        listed.offsets.append(image.offset)
        listed.sizes.append(image.size)
      listed.left_out.update(samples.left_out)
      _check_end(file, tar)
  except tarfile.TarError as error:
    raise UserError(
      f'{url} cannot be listed ({one_line(error)}): it must be a whole '
      'tar file that is not compressed'
    ) from error
  # What tarfile raises for damaged headers is nearly anything.
  except Exception as error:
    raise UserError(f'{url} cannot be listed: {one_line(error)}') from error
  return listed


def _check_end(file: IO[bytes], tar: tarfile.TarFile) -> None:
  """Raises ReadError for a shard cut between members: it has no end mark."""
  members = tar.getmembers()
  blocks = -(-members[-1].size // 512) if members else 0
  file.seek(members[-1].offset_data + 512 * blocks if members else 0)
  if file.read(512) != bytes(512):
    raise tarfile.ReadError('it is cut off')


def _list_all(urls: Sequence[str]) -> dict[str, np.ndarray]:
  """The arrays of an index of shards."""
  labels, offsets, sizes = [], array.array('q'), array.array('q')
  shards, left_out = array.array('i'), collections.Counter()
  titles = [posixpath.basename(url) for url in urls]
  if len(set(titles)) < len(titles):
    titles = urls

  def names():
    with concurrent.futures.ThreadPoolExecutor(_IN_PARALLEL) as pool:
      found = pool.map(_list_shard, urls, titles)
      bar = tqdm.tqdm(
        found, 'list', len(urls), unit=' shards', delay=2, disable=None
      )
      for number, listed in enumerate(bar):
        labels.extend(listed.labels)
        offsets.extend(listed.offsets)
        sizes.extend(listed.sizes)
        shards.extend([number] * len(listed.names))
        left_out.update(listed.left_out)
        yield from listed.names

  names_ = index.Names.of(names())
  texts = sorted(set(labels) - {''})
  id_of = {text: number for number, text in enumerate(texts)}
  return {
    'blob': names_.blob,
    'ends': names_.ends,
    'texts': np.frombuffer(json.dumps(texts).encode(), np.uint8),
    'notes': np.frombuffer(
      json.dumps(shard_samples.notes_on(left_out)).encode(), np.uint8
    ),
    'labels': np.array([id_of.get(t, UNLABELLED) for t in labels], np.int32),
    'offsets': np.frombuffer(offsets, np.int64),
    'sizes': np.frombuffer(sizes, np.int64),
    'shards': np.frombuffer(shards, np.int32),
  }


def _stamp(url: str) -> list[Any]:
  """What changes with a shard: its size, and its time or version."""
  files, path = fsspec.url_to_fs(url)
  info = files.info(path)
  version = next(
    (info[k] for k in ('mtime', 'etag', 'ETag', 'md5Hash') if k in info), ''
  )
  return [info['size'], str(version)]


def _is_whole(arrays: dict[str, np.ndarray], num_shards: int) -> bool:
  """Whether the arrays of an index fit together."""
  names, texts = index.names_of(arrays), index.strings(arrays, 'texts')
  if names is None or texts is None or index.strings(arrays, 'notes') is None:
    return False
  ends = {
    'labels': (UNLABELLED, len(texts)),
    'shards': (0, num_shards),
    'offsets': (0, 2**62),
    'sizes': (0, 2**62),
  }
  return all(
    index.has_numbers(arrays, name, len(names), *bounds)
    for name, bounds in ends.items()
  )


def _list_once(urls: Sequence[str]) -> dict[str, np.ndarray]:
  """Lists shards, or reads what an earlier listing of them found."""
  with concurrent.futures.ThreadPoolExecutor(_IN_PARALLEL) as pool:
    stamps = list(pool.map(_stamp, urls))
  key = {'shards': list(zip(urls, stamps))}
  path = index.default_path({'shards': list(urls)})
  kept = index.read_index(path, key)
  if kept is None or not _is_whole(kept, len(urls)):
    kept = _list_all(urls)
    index.write_index(path, key, **kept)
  return kept


class _Shards:
  """Reads images out of shards; can be pickled."""

  def __init__(
    self,
    urls: Sequence[str],
    arrays: dict[str, np.ndarray],
    decode_px: int,
    grey16_white: int,
    channels: int,
  ) -> None:
    self._urls, self._decode_px = urls, decode_px
    self._grey16_white, self._channels = grey16_white, channels
    self._shards, self._offsets, self._sizes = (
      arrays[name] for name in ('shards', 'offsets', 'sizes')
    )

  def __call__(self, number: int) -> Example:
    files, path = _open(self._urls[self._shards[number]])
    start = int(self._offsets[number])
    content = files.cat_file(path, start, start + int(self._sizes[number]))
    return Example(
      image_files.open_image(
        io.BytesIO(content),
        channels=self._channels,
        min_px=self._decode_px,
        grey16_white=self._grey16_white,
      )
    )


@functools.lru_cache(maxsize=4096)
def _open(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
  return fsspec.url_to_fs(url)


def shards_source(
  pattern: str,
  class_pattern: str = '',
  *,
  decode_px: int = 0,
  grey16_white: int = kinds.TOP,
  channels: int = 3,
) -> Source:
  """Lists the images of tar shards.

  Labels that are all integers are classes in their order, else they are sorted
  as text.

  Args:
    pattern: of the shards, see `list_urls`; '' gives a source without examples.
    class_pattern: of the shards whose labels are classes as well: all splits of
      a set need the same ones.
    decode_px: see `image_files.open_rgb`.
    grey16_white: see `image_files.open_rgb`.
    channels: C of the images, see `image_files.open_image`.

  Returns:
    The source, in the order of the shards. It can be pickled.

  Raises:
    UserError: no shards, shards that can't be listed, or without images.
  """
  urls = list_urls(pattern) if pattern.strip() else []
  arrays = _list_once(urls) if urls else _list_all([])
  texts = index.strings(arrays, 'texts')
  known = set(texts)
  if class_pattern.strip():
    more = _list_once(list_urls(class_pattern))
    known.update(index.strings(more, 'texts'))
  notes = index.strings(arrays, 'notes')
  if urls and not len(arrays['labels']):
    told = f' ({"; ".join(notes)})' if notes else ''
    raise UserError(
      f'{pattern} has no images{told}: put files there that end in '
      f'{", ".join(image_formats.EXTENSIONS)}'
    )
  is_number = all(map(_NUMBER.fullmatch, known))
  class_names = sorted(known, key=int if is_number else None)
  label_of = {name: label for label, name in enumerate(class_names)}
  # The last one is what UNLABELLED indexes.
  labels = np.array([*map(label_of.get, texts), UNLABELLED], np.int32)
  return Source(
    name=f'shards {pattern.strip() or "(none)"}',
    class_names=tuple(class_names),
    file_names=index.Names(arrays['blob'], arrays['ends']),
    labels=labels[arrays['labels']],
    load=_Shards(urls, arrays, decode_px, grey16_white, channels),
    notes=notes,
    channels=channels,
  )
