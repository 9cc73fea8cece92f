"""The weights that a run starts from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from cmd_jax.convert import pretrained, shards
from cmd_jax.convert.load import (
  Imported,
  Report,
  load_encoder,
  report_of_lost,
)
from cmd_jax.errors import UserError
from cmd_jax.models.layers import images_like
from cmd_jax.parts.store import hash_variables
from cmd_jax.rundir.saved_run import method_name, read_config, read_network
from cmd_jax.rundir.workdir import Workdir


def run_of(path: str) -> Workdir | None:
  """The run that a path names; None for anything else.

  Args:
    path: folder `checkpoints` of a run, or its work directory, where weights
      that were exported into it go first.
  """
  resolved = pretrained.resolve(path)
  if not resolved.is_dir():
    return None
  workdir = Workdir(str(resolved))
  if shards.has_weights(resolved) or not workdir.checkpoints.is_dir():
    workdir = Workdir(str(resolved.parent))
    if resolved != workdir.checkpoints:
      return None
  return workdir if workdir.config_file.is_file() else None


def _shapes(variables: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_leaves_with_path(variables)
  return {jax.tree_util.keystr(path): np.shape(x) for path, x in leaves}


def _import_run(
  workdir: Workdir, encoder: nn.Module, network: str, image_px: int
) -> Imported:
  """The encoder of a run's best checkpoint if it keeps it, or its newest."""
  config = read_config(workdir)
  saved = read_network(workdir, network, config)
  image = images_like(encoder, image_px)
  here = _shapes(jax.eval_shape(encoder.init, jax.random.key(0), image))
  there = _shapes(saved.variables)
  if here != there:
    differing = sorted(
      name
      for name in here.keys() | there.keys()
      if here.get(name) != there.get(name)
    )
    raise UserError(
      f'{workdir.path} has another encoder, a {config.model.name}, than '
      f'config.model, a {type(encoder).__name__} ({len(differing)} arrays '
      f'differ, the first is {differing[0]}): use --config=FILE:encoder='
      f'{config.model.name} with the fields of config.model in '
      f'{workdir.config_file}'
    )
  return Imported(
    dict(saved.variables),
    Report(
      path=str(workdir.checkpoints),
      sha256=hash_variables(saved.variables),
      format=f'step {saved.step}',
      family=f'{network} of a run of {method_name(config.method)}',
      matched=tuple(there),
      missing=(),
      unexpected=(),
      resized=(),
      cast=(),
      notes=(),
    ),
  )


def import_encoder(
  config: ConfigDict, encoder: nn.Module, lost_start: Mapping[str, Any] | None
) -> Imported | None:
  """What config.init names; None where the encoder is drawn at random.

  Args:
    config: of the run.
    encoder: that the weights are for.
    lost_start: of a run that goes on, what its weights were if they are gone.

  Raises:
    UserError: weights that cannot be read, or of another encoder.
  """
  init = config.init
  if not init.path:
    return None
  if lost_start:
    # Drawn in place of what is in no file: the checkpoint has what follows.
    return Imported(None, report_of_lost(lost_start))
  if workdir := run_of(init.path):
    image_px = config.augment.global_px
    return _import_run(workdir, encoder, init.network, image_px)
  channels = config.model.get('channels', 3)
  if channels != 3:
    raise UserError(
      f'config.model.channels is {channels}, and the weights of {init.path} '
      'are for 3: start from nothing (--config=NAME:start=scratch), or from a '
      f'run with {channels} channels'
    )
  return load_encoder(init.path, encoder, network=init.network)
