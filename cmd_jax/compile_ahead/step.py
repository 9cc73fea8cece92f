"""The train step of a run, from its config alone."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cmd_jax.config import vocabulary
from cmd_jax.config.check import check_config
from cmd_jax.data.canvas import Canvases
from cmd_jax.data.pipeline.resident import batch_like
from cmd_jax.devices import sharding
from cmd_jax.errors import UserError
from cmd_jax.models import make_encoder, partial
from cmd_jax.training.experiment import make_plan_of
from cmd_jax.training.functions import make_functions
from cmd_jax.training.recipe import check_parallel
from cmd_jax.training.timetable import make_steps

# Of a method that learns labels; how many hardly changes its step.
ASSUMED_CLASSES = 200
# Epochs of so many steps where the number of images is not known: schedules
# are numbers of the program and change nothing that is asked of it.
_ASSUMED_STEPS = 100


def _no_images(config: ConfigDict) -> Canvases:
  """A set of the right size of canvases, without images."""
  side = config.canvas_px
  return Canvases(
    name='the set',
    images=np.empty((0, side, side, 3), np.uint8),
    sizes=np.empty((0, 2), np.int32),
    labels=np.empty(0, np.int32),
    file_names=(),
    class_names=(),
    part_ids=None,
    boxes=None,
    skipped=(),
  )


def learns_labels(config: ConfigDict) -> bool:
  """Whether the step of a config depends on how many classes there are."""
  return config.method.name in vocabulary.METHODS_OF_LABELS


def lower_step(
  config: ConfigDict, mesh: Mesh, num_images: int | None = None
) -> jax.stages.Lowered:
  """The step that a run of this config would take, not yet compiled.

  Args:
    config: as cmd_jax/config/published.py makes it.
    mesh: the devices, which need not be here.
    num_images: training images; None if it is not known.

  Raises:
    UserError: anything in the config that cannot be.
  """
  check_config(config)
  if config.parallel.mode != 'jit':
    raise UserError(
      f'config.parallel.mode is {config.parallel.mode!r}, whose step is '
      'compiled when it is first taken: set config.parallel.mode=jit'
    )
  sharding.check_batch_size(config.batch_size, mesh)
  check_parallel(config, mesh.size, sharding.platform_of(mesh))
  encoder = make_encoder(**config.model)
  plan = make_plan_of(config, _no_images(config))
  is_frozen = partial.make_is_frozen(
    encoder,
    train_last_blocks=config.optim.train_last_blocks,
    lora_rank=config.lora.rank,
  )
  num_images = num_images or _ASSUMED_STEPS * config.batch_size
  with_labels = learns_labels(config)
  functions = make_functions(
    config,
    mesh,
    encoder,
    plan,
    is_frozen,
    make_steps(config, num_images, plan),
    None,
    (1,) * ASSUMED_CLASSES if with_labels else None,
  )
  whole = sharding.replicated(mesh)
  rng = jax.eval_shape(lambda: jax.random.key(config.seed))
  constants = functions.method.constants
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
    (rng, *([constants] if constants else [])),
  )
  batch = batch_like(
    config.canvas_px,
    channels=config.model.get('channels', 3),
    batch_size=config.batch_size,
    mesh=mesh,
    with_parts=plan is not None,
    with_labels=with_labels,
    with_partners=config.num_neighbours > 0,
    steps_per_dispatch=config.parallel.steps_per_dispatch,
  )
  return functions.step.lower(functions.state_like, batch, *shapes)
