"""Refuses configs that cannot be, before anything is loaded."""

from __future__ import annotations

from ml_collections import ConfigDict

from cmd_jax.config import vocabulary
from cmd_jax.config.fields import check_fields
from cmd_jax.errors import UserError
from cmd_jax.evaluators import check_protocol
from cmd_jax.evaluators.part_segmentation import PROTOCOL


def check_config(config: ConfigDict) -> None:
  """Checks every field by itself, and sizes against each other.

  Raises:
    UserError: the field, its value and what it may be.
  """
  check_fields(config.to_dict())
  _check_channels(config)
  for protocol in config.eval.protocols:
    check_protocol(protocol)
  _check_sizes(config)
  epochs = config.optim.freeze_encoder_epochs
  if epochs and not config.init.path:
    raise UserError(
      f'config.optim.freeze_encoder_epochs is {epochs}, but the encoder is '
      'drawn at random: set config.init.path to weights to start from (all of '
      'them: cmd-jax weights), or --config=NAME:start=scratch'
    )
  _check_neighbours(config)
  if config.checkpoint.keep_best and not config.eval.every_epochs:
    raise UserError(
      f'config.checkpoint.keep_best is {config.checkpoint.keep_best!r}, which '
      'is not known while config.eval.every_epochs is 0: set that to 1, say'
    )
  if config.checkpoint.patience and not config.checkpoint.keep_best:
    raise UserError(
      f'config.checkpoint.patience is {config.checkpoint.patience}, but no '
      'score says what is better: name one by config.checkpoint.keep_best, or '
      'set 0'
    )


def _check_neighbours(config: ConfigDict) -> None:
  """Refuses neighbours where they would say nothing, or something wrong."""
  count, method = config.num_neighbours, config.method.name
  if not count:
    return
  if method in vocabulary.METHODS_OF_SINGLE_IMAGES:
    raise UserError(
      f'config.num_neighbours is {count}, which is for methods that take two '
      f'views for the same thing, and method={method} looks at each image for '
      'itself: set 0, or use another method, such as method=cmd'
    )
  if not config.init.path:
    raise UserError(
      f'config.num_neighbours is {count}, but an encoder that is drawn at '
      'random knows no neighbours: set config.init.path to weights to start '
      'from (all of them: cmd-jax weights), or config.num_neighbours=0'
    )


def _check_channels(config: ConfigDict) -> None:
  """Refuses what is made for photographs alone."""
  channels = config.model.get('channels', 3)
  if channels == 3:
    return
  name = config.method.name
  if 'parts' in config or 'teacher' in config.method:
    raise UserError(
      f'config.model.channels is {channels}, and method={name} is for '
      'photographs, of 3 channels: use another method, such as method=cmd'
    )


def _check_sizes(config: ConfigDict) -> None:
  # A ResNet takes any size.
  patch_px = config.model.get('patch_px', 1)
  for field, value in (
    ('model.image_px', config.model.get('image_px', patch_px)),
    ('augment.global_px', config.augment.global_px),
    ('augment.local_px', config.augment.local_px),
    ('eval.view_px', config.eval.view_px),
    *_part_sizes(config),
  ):
    if value < patch_px or value % patch_px:
      raise UserError(
        f'config.{field} is {value}: it must be a multiple of '
        f'config.model.patch_px, which is {patch_px}'
      )


def _part_sizes(config: ConfigDict) -> list[tuple[str, int]]:
  sizes = []
  if 'parts' in config:
    sizes.append(('parts.view_px', config.parts.view_px))
  if PROTOCOL in config.eval.protocols:
    view_px = config.eval.segmentation.view_px
    sizes.append(('eval.segmentation.view_px', view_px))
  return sizes
