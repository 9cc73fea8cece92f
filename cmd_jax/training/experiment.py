"""Builds everything that a run needs out of its config."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cmd_jax.config import vocabulary
from cmd_jax.config.check import check_config
from cmd_jax.convert.load import Report
from cmd_jax.data.augment import multi_crop
from cmd_jax.data.canvas import Canvases
from cmd_jax.data.pipeline.load import Data, load_data
from cmd_jax.data.pipeline.resident import batch_like
from cmd_jax.devices import processes, sharding
from cmd_jax.errors import UserError
from cmd_jax.evaluators import (
  Evaluator,
  Splits,
  make_evaluators,
)
from cmd_jax.methods.base import Method
from cmd_jax.models import make_encoder, partial
from cmd_jax.parts.plan import Plan, make_plan
from cmd_jax.rundir.checkpoint import Checkpoints
from cmd_jax.rundir.saved_run import make_mil_attention, method_name
from cmd_jax.rundir.workdir import Workdir
from cmd_jax.training.functions import (
  STEPS_SALT,
  compile_functions,
  make_functions,
)
from cmd_jax.training.initial_weights import import_encoder
from cmd_jax.training.labels import count_classes, score_to_keep_by
from cmd_jax.training.recipe import check_parallel, warnings_about
from cmd_jax.training.state import TrainState
from cmd_jax.training.timetable import Steps, make_steps


class Evaluation(NamedTuple):
  """How an encoder is scored.

  Attributes:
    evaluators: by what.
    network: 'teacher' or 'student'.
    mil: the multi-instance attention of the method; None without.
    settings: config.eval but for when, as JSON gives it back.
  """

  evaluators: tuple[Evaluator, ...]
  network: str
  mil: nn.Module | None
  settings: dict

  @property
  def protocols(self) -> tuple[str, ...]:
    """Names of the evaluators."""
    return tuple(evaluator.name for evaluator in self.evaluators)


class Experiment(NamedTuple):
  """A config made real.

  Attributes:
    method_name: name of the method.
    num_prototypes: K.
    mesh: the devices.
    encoder: the encoder.
    imported: where its initial weights come from; None if they are drawn.
    data: the images.
    method: the objective for global batches, as evaluation needs it.
    parts: how the parts of the images are found; None for a method without.
    num_neighbours: of every image, of which one gives half of the views.
    init_state: () -> `TrainState` on the mesh, a function of the seed; not
      the one that the run began with if `start_is_lost`.
    state_like: shapes and shardings of that state.
    compile_step: () -> the compiled train step.
    rng: root key of the steps.
    steps: when what happens.
    warnings: what of the config can hardly be meant, a sentence each.
    evaluation: how the encoder is scored.
  """

  method_name: str
  num_prototypes: int
  mesh: Mesh
  encoder: nn.Module
  imported: Report | None
  data: Data
  method: Method
  parts: Plan | None
  num_neighbours: int
  init_state: Callable[[], TrainState]
  state_like: TrainState
  compile_step: Callable[[], Callable]
  rng: jax.Array
  steps: Steps
  warnings: tuple[str, ...]
  evaluation: Evaluation

  @property
  def splits(self) -> Splits:
    """The images that the encoder is scored on."""
    return Splits(self.data.pretrain, self.data.test)

  @property
  def start_is_lost(self) -> bool:
    """Whether the initial weights can't be had any more."""
    return self.imported is not None and self.imported.is_lost

  def open_checkpoints(self, workdir: Workdir) -> Checkpoints:
    """The checkpoints of a work directory."""
    return Checkpoints(workdir.checkpoints, keep=self.steps.checkpoints_kept)

  def on_this_process(self, state: TrainState) -> tuple[Experiment, TrainState]:
    """The experiment and a state on the devices of this process alone.

    All processes must call it. What only training needs is left out of the
    state where there are several.
    """
    if processes.process_count() == 1:
      return self, state
    gather = jax.jit(lambda x: x, out_shardings=sharding.replicated(self.mesh))
    whole = gather(state._replace(opt_state=()))
    here = jax.tree.map(lambda x: x.addressable_data(0), whole)
    mesh = sharding.make_mesh(devices=jax.local_devices())
    return self._replace(mesh=mesh), sharding.gather(here, mesh)


def make_plan_of(config: ConfigDict, canvases: Canvases) -> Plan | None:
  """How the parts of images are found; None for a method without parts.

  Raises:
    UserError: see `make_plan`, or an encoder that the source cannot use.
  """
  if 'parts' not in config:
    return None
  fields = config.parts.to_dict()
  needed = {
    'hypercolumn': ('resnet', 'efficientnet'),
    'cosegmentation': ('vit',),
  }
  encoders = needed.get(fields['source'], (config.model.name,))
  if config.model.name not in encoders:
    raise UserError(
      f'config.parts.source is {fields["source"]!r}, which needs '
      f'--config=FILE:encoder={" or ".join(encoders)}: use that or another '
      'source'
    )
  view = multi_crop.make_eval_view(
    view_px=fields['view_px'], crop_fraction=None
  )
  return make_plan(canvases, view=view, seed=config.seed, **fields)


def _make_evaluation(
  config: ConfigDict, encoder: nn.Module, splits: Splits
) -> Evaluation:
  fields = config.eval.to_dict()
  # When is not how: scores before and after stay comparable.
  fields.pop('every_epochs')
  # What cannot be is refused now, not after the training.
  multi_crop.make_eval_view(
    view_px=fields['view_px'], crop_fraction=fields['crop_fraction'] or None
  )
  evaluators = make_evaluators(fields['protocols'], fields)
  for evaluator in evaluators:
    evaluator.check(encoder, splits)
  return Evaluation(
    evaluators=evaluators,
    network=fields['network'],
    mil=make_mil_attention(config, encoder),
    settings=json.loads(json.dumps(fields)),
  )


def build(
  config: ConfigDict,
  *,
  lost_start: Mapping[str, Any] | None = None,
  route_before: str | None = None,
) -> Experiment:
  """Builds an experiment.

  Args:
    config: as cmd_jax/config/published.py makes it.
    lost_start: of a run with a checkpoint whose file of initial weights is
      gone, what results.json says of it; None reads the file.
    route_before: where the images of a run that goes on were kept, 'device' or
      'stream'; None for a new one.

  Raises:
    UserError: anything in the config that cannot be.
  """
  check_config(config)
  mesh = sharding.make_mesh(
    config.parallel.num_devices, num_slices=config.parallel.num_slices
  )
  processes.check_parallel(config.parallel.mode, mesh.size)
  sharding.check_batch_size(config.batch_size, mesh)
  check_parallel(config, mesh.size, sharding.platform_of(mesh))
  encoder = make_encoder(**config.model)
  is_frozen = partial.make_is_frozen(
    encoder,
    train_last_blocks=config.optim.train_last_blocks,
    lora_rank=config.lora.rank,
  )
  imported = import_encoder(config, encoder, lost_start)
  variables = imported and imported.variables
  with_labels = config.method.name in vocabulary.METHODS_OF_LABELS
  data = load_data(
    config, mesh, route_before=route_before, with_labels=with_labels
  )
  plan = make_plan_of(config, data.pretrain)
  steps = make_steps(config, len(data.pretrain.images), plan)
  steps = steps._replace(
    keep_best=score_to_keep_by(config.checkpoint.keep_best, data, with_labels)
  )
  functions = make_functions(
    config,
    mesh,
    encoder,
    plan,
    is_frozen,
    steps,
    variables,
    count_classes(data.pretrain) if with_labels else None,
    data.statistics,
  )
  # Put there once, or every step would send it to the other devices.
  steps_rng = jax.jit(
    lambda: jax.random.fold_in(jax.random.key(config.seed), STEPS_SALT),
    out_shardings=sharding.replicated(mesh),
  )()
  return Experiment(
    method_name=method_name(config.method),
    num_prototypes=config.head.num_prototypes,
    mesh=mesh,
    encoder=encoder,
    imported=imported and imported.report,
    data=data,
    method=functions.method,
    parts=plan,
    num_neighbours=config.num_neighbours,
    init_state=functions.init,
    state_like=functions.state_like,
    compile_step=lambda: compile_functions(
      functions,
      mesh,
      batch_like(
        data.pretrain.images.shape[1],
        channels=data.pretrain.images.shape[-1],
        batch_size=config.batch_size,
        mesh=mesh,
        with_parts=plan is not None,
        with_labels=with_labels,
        with_partners=config.num_neighbours > 0,
        steps_per_dispatch=config.parallel.steps_per_dispatch,
      ),
      steps_rng,
    ),
    rng=steps_rng,
    steps=steps,
    warnings=warnings_about(
      config, encoder, is_frozen, steps.per_epoch, steps.total
    ),
    evaluation=_make_evaluation(
      config, encoder, Splits(data.pretrain, data.test)
    ),
  )
