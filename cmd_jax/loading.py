"""`cmd_jax.load`: the encoder of a run or of a weight file."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import linen as nn
from ml_collections import ConfigDict

from cmd_jax.api import Encoder, Preprocessing
from cmd_jax.convert import pretrained, shards
from cmd_jax.convert.recognise import Recognised, recognise_encoder
from cmd_jax.errors import UserError
from cmd_jax.evaluators.classifier import Classifier, from_entry
from cmd_jax.models.pooling import check_pooling
from cmd_jax.rundir.saved_run import (
  SavedNetwork,
  describe_training,
  read_config,
  read_network,
)
from cmd_jax.rundir.workdir import Workdir

# The published evaluation: the shorter side to 256, the central 224 of it.
_VIEW_PX, _CROP_FRACTION = 224, 0.875


def _preprocessing_of(recognised: Recognised) -> Preprocessing:
  """What the file tells, or 224 pixels, fewer for smaller encoders."""
  try:
    fields = json.loads(recognised.metadata['preprocessing'])
    names = set(Preprocessing._fields).intersection(fields)
    return Preprocessing(**{name: fields[name] for name in names})
  except (KeyError, TypeError, ValueError):
    # Most files tell nothing of the kind.
    pass
  view_px = min(_VIEW_PX, getattr(recognised.encoder, 'image_px', _VIEW_PX))
  canvas_px = round(view_px / _CROP_FRACTION)
  return Preprocessing(canvas_px, view_px, _CROP_FRACTION)


def _classifier_of(workdir: Workdir, saved: SavedNetwork) -> Classifier | None:
  """The classifier of a run, if that of this checkpoint is calibrated."""
  entry = workdir.results().get('classifier')
  if saved.classifier is None or not entry or entry.get('step') != saved.step:
    return None
  return from_entry(saved.classifier, entry)


def _channels_of(workdir: Workdir, config: ConfigDict) -> dict[str, Any]:
  """The fields of `Preprocessing` about channels."""
  channels = config.model.get('channels', 3)
  if channels == 3:
    return {}
  found = workdir.results().get('image_statistics')
  if not found:
    raise UserError(
      f'{workdir.results_file} has no image_statistics, by which images of '
      f'{channels} channels are normalised: run cmd-jax train once more'
    )
  return {'channels': channels} | {
    name: tuple(found[name]) for name in ('mean', 'std')
  }


class _View(NamedTuple):
  """What `load` is asked for of `Preprocessing`; 0 and empty for the usual."""

  view_px: int
  pooling: str

  def change(self, encoder: nn.Module, usual: Preprocessing) -> Preprocessing:
    """The usual preprocessing with what is asked for.

    Raises:
      UserError: a pooling that the encoder does not have.
    """
    pooling = self.pooling or usual.pooling
    check_pooling(encoder, pooling, 'pooling')
    if self.view_px in (0, usual.view_px):
      return usual._replace(pooling=pooling)
    # Larger views show no more of images that are squashed to fewer pixels.
    canvas_px = round(self.view_px / (usual.crop_fraction or 1.0))
    return usual._replace(
      canvas_px=max(usual.canvas_px, canvas_px),
      view_px=self.view_px,
      pooling=pooling,
    )


def _load_run(
  path: pathlib.Path, network: str, batch_size: int, newest: bool, view: _View
) -> Encoder:
  workdir = Workdir(str(path))
  config = read_config(workdir)
  try:
    network = network or config.eval.network
    preprocessing = Preprocessing(
      config.canvas_px,
      config.eval.view_px,
      config.eval.crop_fraction or None,
      config.grey16_white,
      **_channels_of(workdir, config),
    )
    saved = read_network(workdir, network, config, newest=newest)
    training = describe_training(config, network, saved.step)
  except (AttributeError, KeyError) as error:
    raise UserError(
      f'{workdir.config_file} lacks a field ({str(error).splitlines()[0]}): it '
      'is not of this version; train again'
    ) from error
  best = saved.choice.best
  chosen = f', the best by {best["score"]}' if best else ''
  return Encoder(
    saved.encoder,
    saved.variables,
    view.change(saved.encoder, preprocessing),
    source=f'{network} of {path} after step {saved.step}{chosen}',
    training=training,
    mil=saved.mil,
    mil_params=saved.mil_params,
    classifier=_classifier_of(workdir, saved),
    batch_size=batch_size,
  )


def _load_weights(
  path: pathlib.Path,
  network: str,
  batch_size: int,
  view: _View,
  model: Mapping[str, Any],
) -> Encoder:
  recognised = recognise_encoder(path, network=network or 'teacher', **model)
  preprocessing = view.change(recognised.encoder, _preprocessing_of(recognised))
  return Encoder(
    recognised.encoder,
    recognised.imported.variables,
    preprocessing,
    source=f'{path}, {recognised.imported.report.family}',
    batch_size=batch_size,
  )


def _has_weights(folder: pathlib.Path) -> bool:
  """Whether a folder is one of weights rather than a run."""
  if Workdir(str(folder)).checkpoints.is_dir():
    return False
  return shards.has_weights(folder)


def load(
  path: str | os.PathLike[str],
  *,
  network: str = '',
  batch_size: int = 32,
  newest: bool = False,
  view_px: int = 0,
  pooling: str = '',
  **model: Any,
) -> Encoder:
  """Loads the encoder of a run or of a weight file; docs/api.md shows it.

  Of a run, the best checkpoint is taken if config.checkpoint.keep_best has kept
  it, and else the newest, with the attention of its method and the view of its
  evaluation; the images it was trained on are not needed. A weight file is
  anything that docs/weights.md lists; images are encoded at 224 pixels, or the
  encoder's own size where that is smaller, unless the file tells otherwise.

  Args:
    path: work directory of a run, weight file or folder of one, a name of
      cmd_jax.convert.pretrained.WEIGHTS such as 'efficientnet_lite0', or an
      address on the Hugging Face Hub, hf://owner/repo[@revision][/file].
    network: 'teacher' or 'student'; by default the one that the run evaluates,
      and the teacher of a file.
    batch_size: most images encoded at once.
    newest: of a run, whether the newest checkpoint is taken in any case.
    view_px: side of the views; 0 for the usual one.
    pooling: how embeddings are made, one of `models.pooling.POOLINGS`; empty
      for the usual way, 'encoder'.
    **model: for a weight file: fields of config.model that its tensors can't
      tell, such as num_heads, or norm_epsilon.

  Returns:
    The encoder.

  Raises:
    UserError: no run and no weights, no checkpoint, one of another model, or
      a view or a pooling that cannot be.
  """
  path = pretrained.resolve(path)
  if network not in ('', 'teacher', 'student'):
    raise UserError(f'network is {network!r}: choose teacher or student')
  if not path.exists():
    raise UserError(
      f'{path} does not exist: give the work directory of a run, a file of '
      f'weights, hf://OWNER/REPO, or one of {", ".join(pretrained.WEIGHTS)}'
    )
  view = _View(view_px, pooling)
  is_run = path.is_dir() and not _has_weights(path)
  if not is_run:
    return _load_weights(path, network, batch_size, view, model)
  if model:
    raise UserError(
      f'{path} is a run, whose model its config.json tells: leave out '
      f'{", ".join(model)}'
    )
  return _load_run(path, network, batch_size, newest, view)
