"""Which files of a tar shard make a sample: its image and its label.

The layout of WebDataset takes a name apart at its first dot: `0001.seg.png` is
the file `seg.png` of the sample `0001`. File names of people have dots
elsewhere too (`a v1.5.jpg`). Both are read by what is beside them:

* An image with the extension alone (`0001.jpg`) is its sample's; of several
  such, that of the earlier extension. Others beside it (`0001.seg.png`) are no
  images of their own.
* An image of a longer name is a sample of its own if a label of that very name
  is there (`a v1.5.cls`), or if what is between the dots can be no extension
  (`5`), and the shorter name has no label.
* Else it is its sample's if it is the only one; of several (`0001.left.jpg`
  and `0001.right.jpg`) nothing tells which, and none is read.
"""

from __future__ import annotations

import collections
import posixpath
import re
import tarfile
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cmd_jax.data.sources.spelling import composed
from cmd_jax.files.safe_read import one_line, parse_json

# Metadata of a photograph are smaller.
_MAX_LABEL_BYTES = 2**20
_LABELS = ('.cls', '.txt', '.json')
# What writers of shards put before an extension; '5' or ' Smith' is no such.
_WORD = re.compile(r'[A-Za-z_][\w-]*(\.[A-Za-z_][\w-]*)*')

_BESIDE = 'beside'
_UNSURE = 'unsure'
_TWICE = 'twice'
_LONE = 'lone'
# How many files, and what became of them.
_NOTES = {
  _BESIDE: (
    '{:,} files of the shards are no images of their own: they belong to a '
    'sample that has an image (such as 0001.seg.png beside 0001.jpg)'
  ),
  _UNSURE: (
    '{:,} images of the shards are left out: their sample has several and '
    'none is called as the sample is (such as 0001.left.jpg and '
    '0001.right.jpg without 0001.jpg)'
  ),
  _TWICE: '{:,} images of the shards are left out: a later one has their name',
  _LONE: (
    '{:,} labels of the shards belong to no image: no image has their name'
  ),
}


class ShardImage(NamedTuple):
  """The image of a sample.

  Attributes:
    name: in the shard, the extension in lower case.
    label: text of its label, '' for none.
    offset: of its bytes in the shard.
    size: number of these bytes.
  """

  name: str
  label: str
  offset: int
  size: int


class Samples(NamedTuple):
  """What a shard holds.

  Attributes:
    images: one of each sample.
    left_out: number of files by why they are none: keys of `notes_on`.
  """

  images: list[ShardImage]
  left_out: collections.Counter[str]


class _Label(NamedTuple):
  """A label read, or why it cannot be: most errors are of files not used."""

  text: str
  error: ValueError | None = None


class _Files(NamedTuple):
  """The files of a shard that share a name up to their last dot.

  Attributes:
    images: by extension.
    labels: by extension.
  """

  images: dict[str, ShardImage]
  labels: dict[str, _Label]


def _parse_label(extension: str, content: bytes) -> str:
  """The text of a label; '' for none.

  Raises:
    ValueError: it is no text, or JSON other than an object.
  """
  text = composed(content.decode('utf-8-sig').strip())
  if extension != '.json':
    return text
  fields = parse_json(text)
  if not isinstance(fields, dict):
    raise ValueError(f'a .json file that holds no object: {text[:40]!r}')
  label = fields.get('class_name', fields.get('label', ''))
  return '' if label is None else composed(str(label))


def _read_label(
  tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str
) -> _Label:
  """Reads a label while the shard is read through: later it is far behind."""
  try:
    if member.size > _MAX_LABEL_BYTES:
      raise ValueError(
        f'the label of {one_line(member.name)} is larger than '
        f'{_MAX_LABEL_BYTES} bytes'
      )
    return _Label(_parse_label(extension, tar.extractfile(member).read()))
  except ValueError as error:
    return _Label('', error)


def _label_of(files: _Files) -> str:
  """The text of the first label; '' for none."""
  for extension in _LABELS:
    label = files.labels.get(extension, _Label(''))
    if label.error:
      raise label.error
    if label.text:
      return label.text
  return ''


def _group(
  tar: tarfile.TarFile,
  extensions: Sequence[str],
  left_out: collections.Counter[str],
) -> dict[str, dict[str, _Files]]:
  """{name up to the first dot: {'' or what follows to the last: files}}."""
  groups: dict[str, dict[str, _Files]] = {}
  for member in tar:
    folder, _, file = member.name.rpartition('/')
    # Of a sparse file the offset tells nothing, and the size anything.
    if not member.isreg() or member.issparse() or file.startswith('.'):
      continue
    stem, _, rest = file.partition('.')
    between, _, extension = rest.rpartition('.')
    extension = f'.{extension.lower()}'
    if extension not in (*extensions, *_LABELS):
      continue
    group = groups.setdefault(posixpath.join(folder, stem), {})
    files = group.setdefault(between, _Files({}, {}))
    if extension in _LABELS:
      files.labels[extension] = _read_label(tar, member, extension)
      continue
    name = member.name[: -len(extension)] + extension
    left_out[_TWICE] += extension in files.images
    files.images[extension] = ShardImage(
      name, '', member.offset_data, member.size
    )
  return groups


def _own(
  group: Mapping[str, _Files],
) -> tuple[list[_Files], list[_Files]]:
  """The files that are samples of their own, and others that have images."""
  bare = group.get('', _Files({}, {}))
  own, others = [], []
  for between, files in group.items():
    if not files.images:
      continue
    is_name = not _WORD.fullmatch(between) and not bare.labels
    is_own = not between or files.labels or is_name
    (own if is_own else others).append(files)
  return own, others


def _first_image(
  files: _Files, extensions: Sequence[str], label: str
) -> ShardImage:
  extension = min(files.images, key=extensions.index)
  return files.images[extension]._replace(label=label)


def samples_of(tar: tarfile.TarFile, extensions: Sequence[str]) -> Samples:
  """Finds the samples of a shard.

  Args:
    tar: the shard.
    extensions: of images, in lower case with the dot; where a sample has
      several, the earlier is its image.

  Returns:
    The images in the order in which their samples begin.

  Raises:
    ValueError: the label of an image can't be read.
    Exception: whatever tarfile raises for damaged headers.
  """
  left_out = collections.Counter()
  images = []
  for group in _group(tar, extensions, left_out).values():
    bare = group.get('', _Files({}, {}))
    own, others = _own(group)
    count = sum(len(x.images) for x in (*own, *others))
    if not own and len(others) == 1:
      own, labels = others, [_label_of(bare)]
      is_used = True
    else:
      labels = [_label_of(files) for files in own]
      is_used = bool(bare.images)
    images += [
      _first_image(files, extensions, label)
      for files, label in zip(own, labels)
    ]
    left_out[_BESIDE if own else _UNSURE] += count - len(own)
    left_out[_LONE] += bool(bare.labels) and not is_used
    left_out[_LONE] += sum(
      1
      for between, files in group.items()
      if between and files.labels and not files.images and not is_used
    )
  return Samples(images, +left_out)


def notes_on(left_out: Mapping[str, int]) -> list[str]:
  """Sentences about the files left out.

  Args:
    left_out: of `Samples`.
  """
  return [
    text.format(left_out[reason])
    for reason, text in _NOTES.items()
    if left_out.get(reason)
  ]
