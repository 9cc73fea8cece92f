"""A small run as scoring and reports see it: images, encoder, checkpoints."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.data.canvas import Canvases
from cmd_jax.data.channels import IMAGENET
from cmd_jax.devices import sharding
from cmd_jax.evaluators import Splits, make_evaluators
from cmd_jax.models import make_encoder
from cmd_jax.rundir.checkpoint import Checkpoints
from cmd_jax.rundir.workdir import Workdir
from cmd_jax.training.experiment import Evaluation
from cmd_jax.training.state import TrainState
from tests import saved_runs, tiny

PX = tiny.CANVAS_PX
CONFIG = saved_runs.make_config('dino')
DATA_SHA256 = '0' * 64


def make_canvases(split, count, seed, labelled=True):
  """Noise in three classes."""
  rng = np.random.default_rng(seed)
  labels = np.arange(count) % 3 if labelled else -np.ones(count)
  return Canvases(
    name=f'birds/{split}',
    images=rng.integers(0, 256, (count, PX, PX, 3), np.uint8),
    sizes=np.full((count, 2), PX, np.int32),
    labels=labels.astype(np.int32),
    file_names=tuple(f'{split}/{i}.png' for i in range(count)),
    class_names=('robin', 'tit', 'wren') if labelled else (),
    part_ids=None,
    boxes=None,
    skipped=(),
  )


def make_encoder_module():
  """The encoder of the run's config."""
  return make_encoder(**CONFIG['model'])


def make_params(seed):
  """Parameters of a network that is its encoder alone."""
  image = jax.ShapeDtypeStruct((1, PX, PX, 3), jnp.float32)
  shapes = jax.eval_shape(make_encoder_module().init, jax.random.key(0), image)[
    'params'
  ]
  return {'encoder': tiny.draw_like(shapes, seed=seed)}


def make_state(seed, step=0):
  """A state whose teacher is another network than its student."""
  return TrainState(
    step=jnp.int32(step),
    params=make_params(2 * seed),
    teacher_params=make_params(2 * seed + 1),
    opt_state=(),
    method_state={},
  )


def make_experiment(
  *, labelled=True, test=True, network='teacher', protocols=('knn/20',)
):
  """What scoring and reports need of an `Experiment`."""
  train = make_canvases('train', 31, 0, labelled)
  splits = Splits(
    train, make_canvases('test', 13, 1, labelled) if test else None
  )
  settings = CONFIG['eval'] | {'protocols': list(protocols), 'batch_size': 8}
  return types.SimpleNamespace(
    method_name='dino',
    mesh=sharding.make_mesh(8),
    encoder=make_encoder_module(),
    imported=None,
    start_is_lost=False,
    data=types.SimpleNamespace(
      statistics=IMAGENET,
      name='birds/train',
      sha256=DATA_SHA256,
      pretrain=splits.train,
      test=splits.test,
    ),
    splits=splits,
    method=types.SimpleNamespace(
      encoder_variables=lambda params, stats: {'params': params['encoder']}
    ),
    parts=None,
    steps=types.SimpleNamespace(total=20, term_warmup=4),
    num_prototypes=12,
    evaluation=Evaluation(
      make_evaluators(protocols, settings),
      network,
      None,
      json.loads(json.dumps(settings)),
    ),
    init_state=lambda: make_state(0),
  )


def make_workdir(path, *states, **results):
  """A work directory with checkpoints of the states."""
  workdir = Workdir(str(path))
  workdir.open(CONFIG)
  checkpoints = Checkpoints(workdir.checkpoints, keep=2)
  for state in states:
    checkpoints.save(state, {})
  checkpoints.close()
  workdir.update_results(data_sha256=DATA_SHA256, **results)
  return workdir
