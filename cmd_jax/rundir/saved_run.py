"""A run read back from its work directory alone, without its images."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import linen as nn
from ml_collections import ConfigDict

from cmd_jax.errors import UserError
from cmd_jax.models import heads, make_encoder, partial
from cmd_jax.models.layers import images_like
from cmd_jax.rundir.best import Choice, choose_step
from cmd_jax.rundir.workdir import Workdir


class SavedNetwork(NamedTuple):
  """The encoder of a run's best checkpoint if it keeps it, or its newest.

  Attributes:
    encoder: the module.
    variables: what it is applied to, adapters merged in; numpy arrays.
    mil: multi-instance attention over its tokens; None for a method without.
    mil_params: parameters of `mil`, if it has any.
    choice: which checkpoint that is, and why.
    classifier: `kernel` and `bias` of a method that learns labels; None for
      others.
  """

  encoder: nn.Module
  variables: Mapping[str, Any]
  mil: nn.Module | None
  mil_params: Mapping[str, Any]
  choice: Choice
  classifier: Mapping[str, Any] | None = None

  @property
  def step(self) -> int:
    """Steps that the checkpoint has taken."""
    return self.choice.step


def read_config(workdir: Workdir) -> ConfigDict:
  """The config that a run was started with.

  Fields that the program did not have then have this program's defaults.

  Raises:
    UserError: the directory is that of no run, or of a newer program's.
  """
  if not workdir.config_file.is_file():
    what = 'has no config.json' if workdir.path.is_dir() else 'does not exist'
    raise UserError(
      f'{workdir.path} is no work directory of a run, it {what}: give the '
      '--workdir of a run'
    )
  return ConfigDict(workdir.read_config())


def get_config(workdir: str) -> ConfigDict:
  """The config of a run, as `ml_collections.config_flags` asks a file for it.

  Args:
    workdir: of the run.

  Raises:
    ValueError: the directory is that of no run.
  """

  def with_tuples(value: Any) -> Any:
    # JSON has lists alone, and a flag makes a tuple.
    if isinstance(value, Mapping):
      return {name: with_tuples(x) for name, x in value.items()}
    return tuple(map(with_tuples, value)) if isinstance(value, list) else value

  try:
    config = read_config(Workdir(workdir))
  except UserError as error:
    raise ValueError(str(error)) from error
  return ConfigDict(with_tuples(config.to_dict())).lock()


def method_name(method: Mapping[str, Any]) -> str:
  """The method and, where it is not the paper's, its variant.

  Args:
    method: config.method.
  """
  variant = method.get('variant', 'paper')
  name = method['name']
  return name if variant == 'paper' else f'{name}_{variant}'


def describe_training(
  config: ConfigDict, network: str, step: int
) -> dict[str, str]:
  """How a network was trained, for people.

  Args:
    config: of the run.
    network: 'teacher' or 'student'.
    step: steps that it has taken.

  Returns:
    `method`, `dataset`, as its own kind of source names it, `network` and
    `steps`.
  """
  dataset = config.dataset
  names = (dataset.get(field) for field in ('path', 'train', 'name'))
  return {
    'method': method_name(config.method),
    'dataset': next(filter(None, names), dataset['source']),
    'network': network,
    'steps': str(step),
  }


def _read_arrays(
  path: pathlib.Path, params: str, stats: str
) -> tuple[Mapping, Mapping]:
  """Parameters and batch statistics under two names of a `TrainState`.

  Everything else in the checkpoint, such as the optimiser's moments, is left
  unread.
  """
  handler = ocp.PyTreeCheckpointHandler()
  sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  try:
    there = handler.metadata(path).tree
    wanted = {params: there[params]}
    if stats in (there.get('method_state') or {}):
      wanted['method_state'] = {stats: there['method_state'][stats]}
    wanted = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      wanted,
    )
    restored = handler.restore(
      path,
      args=ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
      ),
    )
  except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    raise UserError(
      f'the checkpoint {path.parent} cannot be read ({lines[0]}): move that '
      'folder elsewhere to use the one before it'
    ) from error
  restored = jax.device_get(restored)
  return restored[params], restored.get('method_state', {}).get(stats, {})


def _check_fits(
  encoder: nn.Module, variables: Mapping[str, Any], image_px: int, where: str
) -> None:
  """Raises UserError unless the arrays are those of the encoder."""

  def shapes(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.shape(x) for path, x in leaves}

  there = shapes(variables)
  images = images_like(encoder, image_px)
  here = shapes(jax.eval_shape(encoder.init, jax.random.key(0), images))
  differing = [
    f'{name} is {there.get(name, "missing")} there and '
    f'{here.get(name, "missing")} by the config'
    for name in sorted(there.keys() | here.keys())
    if there.get(name) != here.get(name)
  ]
  if differing:
    raise UserError(
      f'{where} is the checkpoint of another model than its config.json says '
      f'({len(differing)} arrays differ: {differing[0]}): restore the '
      'config.json of that run'
    )


def make_mil_attention(
  config: ConfigDict, encoder: nn.Module
) -> nn.Module | None:
  """The multi-instance attention of a run's method.

  Args:
    config: of the run.
    encoder: whose tokens are attended to.

  Returns:
    Tokens [B, N, D] -> attention [B, N]; None for a method without.
  """
  method = config.method
  if 'mil' not in method:
    return None
  return heads.make_attention(method.pooling, dtype=encoder.dtype, **method.mil)


def read_network(
  workdir: Workdir,
  network: str,
  config: ConfigDict | None = None,
  *,
  newest: bool = False,
) -> SavedNetwork:
  """Reads the encoder of a run's best checkpoint if it keeps it, or its newest.

  Args:
    workdir: of the run.
    network: 'teacher' or 'student'.
    config: from `read_config`; None reads it.
    newest: whether it is the newest in any case.

  Raises:
    UserError: no checkpoint, a damaged one, or one of another model.
  """
  choice = choose_step(workdir.checkpoints, newest=newest)
  config = read_config(workdir) if config is None else config
  path = (workdir.checkpoints / str(choice.step) / 'state').absolute()
  params, stats = _read_arrays(
    path,
    'teacher_params' if network == 'teacher' else 'params',
    f'{network}_stats',
  )
  encoder = make_encoder(**config.model)
  variables = {'params': params['encoder']}
  if 'lora' in params:
    scale = config.lora.alpha / config.lora.rank
    variables['params'] = jax.device_get(
      partial.merge_lora(params['encoder'], params['lora'], scale)
    )
  if 'encoder' in stats:
    variables['batch_stats'] = stats['encoder']
  image_px = config.augment.global_px
  _check_fits(encoder, variables, image_px, str(path.parent))
  return SavedNetwork(
    encoder,
    variables,
    make_mil_attention(config, encoder),
    params.get('mil', {}),
    choice,
    params.get('classifier'),
  )
