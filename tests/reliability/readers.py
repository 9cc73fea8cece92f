"""What the worker process calls: readers of the package, each on one file.

Each returns, or raises UserError. Modules are imported late, so that a worker
needs no more of them than its readers do.
"""

import hashlib
import json
import pathlib
import types

import numpy as np

from cmd_jax.errors import UserError

# What tests/reliability/test_hostile_masks.py says of its masks.
MASKS = dict(
  encoder_sha256='0' * 64,
  settings={'num_parts': 3, 'layers': [1, 2]},
  seed=0,
  num_images=2,
  names_sha256='1' * 64,
  mask_px=4,
)
ENCODER = types.SimpleNamespace(hash='2' * 64, preprocessing={}, source='here')


def image(path):
  from cmd_jax.data import canvas, image_files
  from cmd_jax.data.sources import base

  for min_px in (0, 16):
    collection = base.Source(
      'photographs',
      (),
      (path.name,),
      np.full(1, base.UNLABELLED),
      lambda i, px=min_px: base.Example(image_files.open_rgb(path, min_px=px)),
    )
    result = canvas.decode_example(collection, 0, 24)
    if isinstance(result, canvas.Skipped):
      raise UserError(f'{path}: {result.reason}')
    assert result.canvas.shape == (24, 24, 3)
    assert min(result.size) > 0


def _use(source):
  for name, label in zip(source.file_names, source.labels):
    assert isinstance(name, str)
    assert label == -1 or source.class_names[label]


def labels(path):
  from cmd_jax.data.sources.folder import folder_source

  for split in ('train', 'pretrain', 'test'):
    source = folder_source(str(path.parent), split, labels_file=path.name)
    _use(source)


def listing(path):
  from cmd_jax.data.sources.folder import folder_source

  folder = str(path.parent / 'photographs')
  source = folder_source(folder, 'train', labels_file='', index_file=str(path))
  _use(source)


def shard(path):
  from cmd_jax.data.sources.shards import shards_source

  source = shards_source(str(path))
  _use(source)
  for number in range(min(len(source.labels), 2)):
    try:
      source.load(number)
    except (OSError, ValueError) as error:
      reason = ' '.join(str(error).split())
      raise UserError(f'{path}: {reason[:1000]}') from error


def weights(path):
  from cmd_jax.convert import families, files

  tensors = files.read_tensors(path).tensors
  for tensor in tensors.values():
    # All of it is in memory, wherever the file says it is.
    tensor.tobytes()
  try:
    families.to_timm(tensors)
  except UserError as error:
    # Of a network that is none of ours, which is no fault of the file.
    assert str(error).isprintable() and len(str(error)) < 4000


def masks_manifest(path):
  from cmd_jax.parts import store

  masks = store.load_masks(path.parent, store.Manifest(**MASKS))
  assert masks.shape == (2, 4, 4) and masks.dtype == np.uint8


def masks_file(path):
  """The masks, with a manifest that says they are the right ones."""
  content = path.read_bytes()
  sha256 = hashlib.sha256(content).hexdigest()
  folder = path.parent / 'masks'
  folder.mkdir(exist_ok=True)
  for old in folder.iterdir():
    old.unlink()
  name = f'masks-{sha256[:16]}.npz'
  (folder / name).write_bytes(content)
  record = {'format': 1, 'file': name, 'file_sha256': sha256, **MASKS}
  (folder / 'manifest.json').write_text(json.dumps(record))
  masks_manifest(folder / 'manifest.json')


def chunks(path):
  from cmd_jax.parts import store

  manifest = store.Manifest(**MASKS)
  record = path.parent / 'manifest.json'
  record.write_text(json.dumps(manifest.flat()))
  found = store.Chunks(path.parent, manifest).get(
    path.stem, lambda: {'sums': np.zeros(3)}
  )
  assert all(isinstance(x, np.ndarray) for x in found.values())


def embeddings(path):
  from cmd_jax.export.embed import load_embeddings

  found = load_embeddings(path, ENCODER)
  assert found.vectors.ndim == 2 and found.vectors.dtype == np.float32
  assert len(found.file_names) == len(found.vectors)
  assert all(isinstance(name, str) for name in found.file_names)
  assert all(isinstance(item, str) for pair in found.skipped for item in pair)
  for name in found.file_names:
    assert '..' not in pathlib.PurePosixPath(name).parts
    assert not name.startswith('/')


def curves(path):
  from cmd_jax.report import history

  json.dumps(history.read_curves(path), allow_nan=False)


def scores(path):
  from cmd_jax.report import history
  from cmd_jax.rundir.workdir import read_json

  json.dumps(history.table(read_json(path)), allow_nan=False)


def matlab(path):
  from tfds_builders.stanford_cars import annotations

  annotations.read_split(path.read_bytes(), str(path))


def boxes(path):
  from tfds_builders.stanford_cars import annotations

  found = annotations.read_csv_boxes(path)
  assert np.isfinite([*found.values()]).all()


def birds(path):
  from tfds_builders import manual
  from tfds_builders.cub_200_2011 import annotations

  _, found = annotations.read_annotations(manual.Archive(path, 'CUB_200_2011'))
  assert all(np.isfinite(a.box).all() for a in found.values())


def photographs(path):
  from tfds_builders import manual, photos

  files = manual.Archive(path)
  for photo in photos.read_photos(files, ['a.jpg', 'b.png'], str(path)):
    assert photo.height > 0 and photo.width > 0


def mirror(path):
  from tfds_builders import manual, repacked

  found = repacked.parquet_files(
    manual.ManualFolder(path.parent), ('Robin', 'Wren')
  )
  if found:
    names = [name for split in found.labels.values() for name in split]
    list(found.files.read(names))
