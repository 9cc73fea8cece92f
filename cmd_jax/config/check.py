"""Refuses configs that cannot be, before anything is loaded."""

from __future__ import annotations

from ml_collections import ConfigDict

from cmd_jax.devices import sharding
from cmd_jax.errors import UserError
from cmd_jax.evaluators import check_protocol
from cmd_jax.evaluators.part_segmentation import PROTOCOL

NETWORKS = ('teacher', 'student')


def check_config(config: ConfigDict) -> None:
  """Checks choices and numbers that no factory checks.

  Raises:
    UserError: the field, its value and what it may be.
  """
  for field, value, choices in (
    ('parallel.mode', config.parallel.mode, sharding.MODES),
    ('eval.network', config.eval.network, NETWORKS),
    ('init.network', config.init.network, NETWORKS),
  ):
    if value not in choices:
      raise UserError(
        f'config.{field} is {value!r}: choose one of {", ".join(choices)}'
      )
  for field, value in (
    ('batch_size', config.batch_size),
    ('total_epochs', config.total_epochs),
    ('canvas_px', config.canvas_px),
    ('eval.batch_size', config.eval.batch_size),
    ('log.every_steps', config.log.every_steps),
    ('checkpoint.every_steps', config.checkpoint.every_steps),
    ('checkpoint.keep', config.checkpoint.keep),
  ):
    if value < 1:
      raise UserError(f'config.{field} is {value}: it must be at least 1')
  for protocol in config.eval.protocols:
    check_protocol(protocol)
  _check_sizes(config)


def _check_sizes(config: ConfigDict) -> None:
  for field, value in (
    ('parallel.num_devices', config.parallel.num_devices),
    *(
      (f'model.{name}', config.model[name])
      for name in ('width', 'depth', 'num_heads', 'num_registers')
      if isinstance(config.model.get(name), int)
    ),
    ('augment.num_local', config.augment.num_local),
    ('decode_px', config.decode_px),
    ('stream.num_workers', config.stream.num_workers),
    ('stream.ahead', config.stream.ahead),
    ('optim.skip_non_finite_steps', config.optim.skip_non_finite_steps),
  ):
    if value < 0:
      raise UserError(f'config.{field} is {value}: it must be at least 0')
  # A ResNet takes any size.
  patch_px = config.model.get('patch_px', 1)
  for field, value in (
    ('model.image_px', config.model.get('image_px', patch_px)),
    ('augment.global_px', config.augment.global_px),
    ('augment.local_px', config.augment.local_px),
    ('eval.view_px', config.eval.view_px),
    *_part_sizes(config),
  ):
    if patch_px < 1 or value < patch_px or value % patch_px:
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
