"""`cmd-jax finetune`: the config of a fine-tuning, of a run or of weights."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from cmd_jax.config import builtin
from cmd_jax.convert import architecture, families, files, pretrained
from cmd_jax.errors import UserError
from cmd_jax.rundir.saved_run import read_config
from cmd_jax.rundir.workdir import Workdir

METHOD = 'finetune'
# What a run says of how its images are read, beside the images themselves.
_OF_IMAGES = ('dataset', 'decode_px', 'grey16_white')


class Start(NamedTuple):
  """What is fine-tuned.

  Attributes:
    path: value of config.init.path.
    network: value of config.init.network.
    encoder: name of its encoder.
    fields: what a config takes from it, a nested dict.
  """

  path: str
  network: str
  encoder: str
  fields: Mapping[str, Any]


def _start_of_run(path: str) -> Start:
  workdir = Workdir(path)
  config = read_config(workdir)
  if not workdir.has_checkpoint():
    raise UserError(
      f'{workdir.path} has no checkpoint: train that run, or name weights '
      'by --weights'
    )
  # Views are as large as those that the encoder was trained and scored on.
  fields = dict(
    model=config.model.to_dict(),
    canvas_px=config.canvas_px,
    augment=dict(global_px=config.augment.global_px),
    eval=dict(
      view_px=config.eval.view_px, crop_fraction=config.eval.crop_fraction
    ),
  )
  return Start(
    str(workdir.checkpoints), config.eval.network, config.model.name, fields
  )


def _start_of_weights(source: str) -> Start:
  if source in pretrained.WEIGHTS:
    name = 'efficientnet'
    fields = {'variant': pretrained.WEIGHTS[source].variant}
  else:
    tensors = files.read_tensors(pretrained.resolve(source)).tensors
    try:
      renamed = families.to_timm(tensors)
    except UserError as error:
      raise UserError(f'{source}: {error}') from error
    name = renamed.architecture
    fields = architecture.fields_that_fit(renamed)
  return Start(source, 'teacher', name, dict(model=fields))


def read_start(workdir: str | None, weights: str | None) -> Start:
  """What is fine-tuned.

  Args:
    workdir: of a run; None for weights.
    weights: file, name or address of weights; None for a run.

  Raises:
    UserError: neither a run with a checkpoint nor weights.
  """
  return _start_of_weights(weights) if weights else _start_of_run(workdir)


def words_for(start: Start) -> dict[str, str]:
  """The words of --config that fine-tuning needs, by what they are of."""
  return {'method': METHOD, 'start': 'pretrained', 'encoder': start.encoder}


def _usual(start: Start) -> ConfigDict:
  """The config of a folder with nothing changed."""
  words = ','.join(f'{key}={word}' for key, word in words_for(start).items())
  return builtin.folder(words).unlock()


def _fill(config: ConfigDict, usual: ConfigDict, fields: Mapping) -> None:
  """Sets the fields that nobody changed."""
  for name, value in fields.items():
    if isinstance(value, Mapping):
      _fill(config[name], usual[name], value)
    elif name in config and config[name] == usual.get(name):
      config[name] = tuple(value) if isinstance(value, list) else value


def config_of_images(workdir: str, start: Start) -> ConfigDict:
  """The config that fine-tunes on the images of a run.

  Args:
    workdir: of the run.
    start: what is fine-tuned.
  """
  config, of_run = _usual(start), read_config(Workdir(workdir)).to_dict()
  for name in _OF_IMAGES:
    config[name] = of_run[name]
  return config.lock()


def get_config(workdir: str) -> ConfigDict:
  """`config_of_images`, as `ml_collections.config_flags` asks a file for it.

  Args:
    workdir: of the run.

  Raises:
    ValueError: the directory is that of no run.
  """
  try:
    return config_of_images(workdir, _start_of_run(workdir))
  except UserError as error:
    raise ValueError(str(error)) from error


def start_from(config: ConfigDict, start: Start) -> ConfigDict:
  """Lets a config start from an encoder, and see images as that did.

  Args:
    config: of `method=finetune`; what differs from the built-in one stays.
    start: what is fine-tuned.

  Raises:
    UserError: a config of another method or encoder.
  """
  if config.method.name != METHOD:
    raise UserError(
      f'config.method.name is {config.method.name!r}, and finetune trains '
      f'{METHOD}: leave method= out of --config'
    )
  if config.model.name != start.encoder:
    raise UserError(
      f'config.model.name is {config.model.name!r}, but {start.path} has an '
      f'encoder of another architecture, {start.encoder!r}: leave encoder= out '
      'of --config'
    )
  config = config.copy_and_resolve_references().unlock()
  _fill(config, _usual(start), start.fields)
  config.init.update(path=start.path, network=start.network)
  return config.lock()


def default_output(workdir: str | None) -> pathlib.Path:
  """Where the fine-tuned run is written if nothing is said.

  Args:
    workdir: of the run that is fine-tuned; None for weights.

  Raises:
    UserError: nothing to name it by.
  """
  if not workdir:
    raise UserError(
      '--output is missing: name a directory for the fine-tuned run'
    )
  return pathlib.Path(os.path.expanduser(workdir)) / 'finetuned'
