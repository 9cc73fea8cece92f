"""The step that is measured: the published recipe on canvases of noise."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from cmd_jax.config import published, vocabulary
from cmd_jax.data.augment import multi_crop
from cmd_jax.data.batch import Batch
from cmd_jax.devices import sharding
from cmd_jax.errors import UserError
from cmd_jax.models import make_encoder
from cmd_jax.training.recipe import (
  has_bfloat16_products,
  make_method_maker,
  make_optimizer,
  make_schedules,
)
from cmd_jax.training.state import TrainState, init_train_state
from cmd_jax.training.step import make_train_step

METHODS = ('cmd', 'cmd_released', 'esvit', 'dino')
STEPS_PER_EPOCH, TOTAL_STEPS = 100, 1000


class Step(NamedTuple):
  """A step and what it is called with.

  Attributes:
    function: jitted (state, batch, rng) -> (state, metrics); donates the state.
    state_like: shapes and shardings of the state.
    batch_like: shapes and shardings of a batch.
    init: () -> the first state.
    augment: jitted batch -> views, alone.
    mesh: the devices.
  """

  function: Callable
  state_like: TrainState
  batch_like: Batch
  init: Callable[[], TrainState]
  augment: Callable[[Batch], multi_crop.Views]
  mesh: Mesh

  def lower(self) -> jax.stages.Lowered:
    """The step for these shapes, not yet compiled."""
    return self.function.lower(
      self.state_like, self.batch_like, jax.random.key(1)
    )

  def noise(self) -> Batch:
    """A batch of uniform noise, on the devices."""
    rng = np.random.default_rng(0)
    images, sizes, index = self.batch_like[:3]
    batch = Batch(
      rng.integers(0, 256, images.shape, np.uint8),
      np.full(sizes.shape, images.shape[1], np.int32),
      np.arange(index.shape[0], dtype=np.int32),
    )
    return jax.device_put(batch, sharding.sharded(self.mesh))


def _override(config: ConfigDict, override: str) -> None:
  path, _, value = override.partition('=')
  *nodes, name = path.split('.')
  node = config
  for part in nodes:
    node = node.get(part, ConfigDict())
  if name not in node:
    raise UserError(f'--set={override}: the config has no field {path!r}')
  old = node[name]
  # As configs are written, so that 2, 2.0, True and (1, 2) are what they seem.
  try:
    node[name] = value if isinstance(old, str) else ast.literal_eval(value)
  except (SyntaxError, TypeError, ValueError) as error:
    raise UserError(
      f'--set={override}: {path} is {old!r}, give a value of that kind'
    ) from error


def make_config(
  *,
  method: str,
  batch_size: int,
  num_prototypes: int,
  overrides: Sequence[str] = (),
) -> ConfigDict:
  """The published config with a few fields changed.

  Args:
    method: one of `METHODS`.
    batch_size: B of all devices together.
    num_prototypes: K.
    overrides: `field.field=value` of other fields.

  Raises:
    UserError: an override of a field that is not there or of another kind.
  """
  config = published.published(vocabulary.parse_argument(f'method={method}'))
  config.batch_size = batch_size
  config.head.num_prototypes = num_prototypes
  for override in overrides:
    _override(config, override)
  return config


def _compile_step(make: Callable, mode: str, mesh: Mesh) -> Callable:
  if mode == 'jit':
    return sharding.compile_step(make, mode=mode, mesh=mesh)
  step = jax.shard_map(
    make(axis_name=sharding.DATA_AXIS, mesh=None),
    mesh=mesh,
    in_specs=(P(), P(sharding.DATA_AXIS), P()),
    out_specs=(P(), P()),
    check_vma=False,
  )
  return jax.jit(step, donate_argnums=0)


def _batch_like(config: ConfigDict, mesh: Mesh) -> Batch:
  size, px = config.batch_size, config.canvas_px

  def like(shape, dtype):
    split = sharding.sharded(mesh)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=split)

  return Batch(
    images=like((size, px, px, 3), jnp.uint8),
    sizes=like((size, 2), jnp.int32),
    index=like((size,), jnp.int32),
  )


def make_step(
  config: ConfigDict,
  mesh: Mesh,
  *,
  mode: str = 'jit',
) -> Step:
  """Builds the step as the program does.

  Args:
    config: from `make_config`.
    mesh: the devices.
    mode: one of `parallel.MODES`. For 'pmap' the same program is made by
      shard_map, which can be compiled without being called.
  """
  named = make_schedules(config, STEPS_PER_EPOCH, TOTAL_STEPS)

  def is_frozen(path):
    return False

  optimizer = make_optimizer(
    config.optim,
    named,
    STEPS_PER_EPOCH,
    is_frozen,
    make_encoder(**config.model),
    encoder_scale=config.optim.encoder_scale,
  )
  platform = mesh.devices.flat[0].platform
  method_for = make_method_maker(config, named, is_frozen, platform=platform)

  def make(axis_name, mesh):
    return make_train_step(
      method=method_for(axis_name, mesh),
      augment=multi_crop.make_augment(mesh=mesh, **config.augment),
      optimizer=optimizer,
      teacher_momentum=named['teacher_momentum'],
      schedules=named,
      axis_name=axis_name,
      mesh=mesh,
      bfloat16_products=has_bfloat16_products(config, platform),
    )

  views = multi_crop.make_augment(mesh=mesh, **config.augment)
  whole, key = sharding.replicated(mesh), jax.random.key(0)
  init = jax.jit(
    lambda key: init_train_state(method_for(None, None), optimizer, key),
    out_shardings=whole,
  )

  def make_views(batch):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch.index)
    return views(batch.images, batch.sizes, keys, key)

  return Step(
    function=_compile_step(make, mode, mesh),
    state_like=jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
      jax.eval_shape(init, key),
    ),
    batch_like=_batch_like(config, mesh),
    init=lambda: init(key),
    augment=jax.jit(make_views),
    mesh=mesh,
  )
