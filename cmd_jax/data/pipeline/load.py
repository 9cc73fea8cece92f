"""The images of a run, wherever they are kept."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cmd_jax.data.canvas import Canvases, make_canvases
from cmd_jax.data.channels import IMAGENET, RGB, Statistics, measure
from cmd_jax.data.inspect.kinds import TOP
from cmd_jax.data.pipeline.lazy import lazy_canvases
from cmd_jax.data.pipeline.order import batch_indices
from cmd_jax.data.pipeline.residency import choose_placement
from cmd_jax.data.pipeline.resident import check_num_examples, resident_batches
from cmd_jax.data.sources.base import Source
from cmd_jax.data.sources.labelled import split_labelled
from cmd_jax.devices import processes
from cmd_jax.errors import UserError


def _hash_of_data(*splits: Canvases | None) -> str:
  """Hash of what is in the splits and in which order."""
  digest = hashlib.sha256()
  for split in splits:
    if split is not None:
      digest.update(json.dumps(list(split.file_names)).encode())
      digest.update(split.labels.tobytes())
  return digest.hexdigest()


def load_source(
  dataset: dict,
  split: str,
  decode_px: int,
  grey16_white: int = TOP,
  channels: int = RGB,
) -> Source:
  """One split of the set that a config names.

  Args:
    dataset: config.dataset as a dict.
    split: name of the split.
    decode_px: pixels that the shorter side of a JPEG keeps which is decoded at
      a smaller scale.
    grey16_white: see `image_files.open_rgb`.
    channels: of the images.

  Raises:
    UserError: fields that do not fit the kind of source, or its own reasons.
  """
  source, dataset = dataset['source'], dict(dataset)
  decoding = dict(decode_px=decode_px, grey16_white=grey16_white)
  for key in ('source', 'pretrain_split', 'test_split', 'validation_split'):
    dataset.pop(key, None)
  needed = {'tfds': 'name', 'folder': 'path', 'shards': 'train'}.get(source)
  if needed and needed not in dataset:
    raise UserError(
      f'config.dataset.source is {source!r}, but config.dataset has no '
      f'{needed!r}: use configs/folder.py for folders, configs/shards.py for '
      'shards, another for TFDS'
    )
  if source == 'tfds':
    from cmd_jax.data.sources.tfds_source import tfds_source

    # An empty string is how a config says None.
    if channels != RGB:
      raise UserError(
        f'config.model.channels is {channels}, and sets of TFDS are read with '
        '3: leave it out, or use a folder or shards'
      )
    options = {key: value or None for key, value in dataset.items()}
    return tfds_source(split=split, **decoding, **options)
  decoding['channels'] = channels
  if source == 'folder':
    from cmd_jax.data.sources.folder import folder_source

    return folder_source(split=split, **decoding, **dataset)
  if source == 'shards':
    from cmd_jax.data.sources.shards import shards_source

    if split not in dataset:
      raise UserError(
        f'config.dataset has no {split!r}: choose one of {", ".join(dataset)}'
      )
    return shards_source(dataset[split], ' '.join(dataset.values()), **decoding)
  raise UserError(
    f'config.dataset.source is {source!r}: choose one of tfds, folder, shards'
  )


class Data(NamedTuple):
  """The images of a run.

  Attributes:
    pretrain: the images trained on.
    test: the images evaluated on; None if there are none.
    sha256: hash of the names and labels of both.
    route: 'device' or 'stream'.
    placement: one line: where they are, and why.
    make_batches: (part ids [N, R, R] or None, neighbours [N, k] or None) ->
      context of (step -> `Batch`); puts the images on the devices, or streams
      them.
    batch_indices: step, from 0 -> [B] numbers of its examples.
    validation: the images whose labels are asked for while it trains; None
      where training images ask each other, or nothing is asked.
      Of a method that learns labels no training image is among them.
    statistics: by which views are normalised.
  """

  pretrain: Canvases
  test: Canvases | None
  sha256: str
  route: str
  placement: str
  make_batches: Callable
  batch_indices: Callable[[int], np.ndarray]
  validation: Canvases | None = None
  statistics: Statistics = IMAGENET

  @property
  def name(self) -> str:
    """Name of the data set."""
    return self.pretrain.name


def _load_split(config: ConfigDict, name: str) -> Source:
  """The split of a use: 'pretrain', 'test' or 'validation'."""
  return load_source(
    config.dataset.to_dict(),
    config.dataset[f'{name}_split'],
    config.decode_px or config.canvas_px,
    config.grey16_white,
    config.model.get('channels', RGB),
  )


def _load_validation(config: ConfigDict, make: Callable) -> Canvases | None:
  """The validation split if it is asked for and has labels.

  Args:
    config: of the run.
    make: (source, canvas_px=...) -> its canvases.
  """
  if not config.eval.every_epochs or not config.dataset.validation_split:
    return None
  source = _load_split(config, 'validation')
  if not np.any(np.asarray(source.labels) >= 0):
    return None
  # Only the first process scores.
  make = make if processes.is_main_process() else lazy_canvases
  return make(source, canvas_px=config.canvas_px)


def _load_labelled(
  config: ConfigDict, pretrain: Source, test: Source
) -> tuple[Source, Source]:
  """The sources that a method which learns labels trains and validates on."""
  validation = None
  if config.dataset.validation_split:
    validation = _load_split(config, 'validation')
  return split_labelled(pretrain, validation, test)


def load_data(
  config: ConfigDict,
  mesh: Mesh,
  *,
  route_before: str | None = None,
  with_labels: bool = False,
) -> Data:
  """Lists the images of a config and decodes them, or prepares to stream them.

  Args:
    config: as cmd_jax/config/published.py makes it.
    mesh: the devices.
    route_before: of the run that goes on; None for a new one.
    with_labels: whether the method learns labels: labelled images alone are
      trained on then, and those that validate are none of them.

  Raises:
    UserError: no images, or fewer than a batch.
  """
  canvas_px = config.canvas_px
  pretrain, test = (_load_split(config, name) for name in ('pretrain', 'test'))
  validation = None
  if with_labels:
    pretrain, validation = _load_labelled(config, pretrain, test)
  route, reason = choose_placement(
    config.placement,
    num_pretrain=len(pretrain.file_names),
    num_test=len(test.file_names),
    canvas_px=canvas_px,
    channels=pretrain.channels,
    with_parts='parts' in config,
    mesh=mesh,
    route_before=route_before,
  )
  if route == 'stream' and config.parallel.steps_per_dispatch > 1:
    raise UserError(
      f'config.parallel.steps_per_dispatch is '
      f'{config.parallel.steps_per_dispatch}, which needs the images on the '
      'devices, but they are streamed: use 1, or config.placement=device'
    )
  make = lazy_canvases if route == 'stream' else make_canvases
  canvases = make(pretrain, canvas_px=canvas_px)
  processes.assert_same_on_all('the training images', _hash_of_data(canvases))
  check_num_examples(canvases, config.batch_size)

  def make_batches(part_ids=None, neighbours=None):
    options = dict(
      batch_size=config.batch_size,
      seed=config.seed,
      mesh=mesh,
      part_ids=part_ids,
      neighbours=neighbours,
      with_labels=with_labels,
    )
    if route == 'device':
      return resident_batches(
        canvases,
        steps_per_dispatch=config.parallel.steps_per_dispatch,
        **options,
      )
    # Imported late: few runs need Grain.
    from cmd_jax.data.pipeline.stream import streamed_batches

    return streamed_batches(canvases, pretrain, **options, **config.stream)

  test_canvases = None
  if test.file_names:
    # Only the first process scores; the others never look at these.
    make = make if processes.is_main_process() else lazy_canvases
    test_canvases = make(test, canvas_px=canvas_px)
  return Data(
    canvases,
    test_canvases,
    processes.broadcast_from_main(
      lambda: _hash_of_data(canvases, test_canvases)
    ),
    route,
    reason,
    make_batches,
    functools.partial(
      batch_indices,
      config.seed,
      num_examples=len(canvases.images),
      batch_size=config.batch_size,
    ),
    make(validation, canvas_px=canvas_px)
    if validation is not None
    else _load_validation(config, make),
    measure(canvases.images),
  )
