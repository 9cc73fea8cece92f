"""The smallest run of the whole loop, on drawn photographs."""

import functools
import json

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from cmd_jax.training import experiment, loop
from configs import folder
from tests import saved_runs

# Two steps of 8 images an epoch; none has a label, so nothing is scored.
NUM_IMAGES = 20
STEPS_PER_EPOCH = 2


def write_photos(path):
  saved_runs.write_images(path, [f'{i:02d}.png' for i in range(NUM_IMAGES)])


def make_config(photos, **changes):
  """The config; `optim__name='sgd'` sets config.optim.name."""
  config = folder.get_config('method=dino,quicktest').unlock()
  fields = dict(
    dataset__path=str(photos),
    model__width=16,
    model__depth=2,
    model__num_heads=2,
    model__image_px=16,
    model__patch_px=4,
    canvas_px=16,
    augment__global_px=16,
    augment__num_local=0,
    head__num_prototypes=12,
    head__hidden_dim=16,
    head__bottleneck_dim=8,
    eval__view_px=16,
    eval__crop_fraction=0.0,
    eval__protocols=('knn/20',),
    batch_size=8,
    total_epochs=3,
    log__every_steps=1,
    checkpoint__every_steps=2,
    parallel__num_devices=1,
  )
  for path, value in (fields | changes).items():
    *parents, last = path.split('__')
    node = config
    for parent in parents:
      node = node[parent]
    node[last] = value
  return config.lock()


@functools.cache
def _build(fields):
  built = experiment.build(ConfigDict(json.loads(fields)))
  return built._replace(compile_step=functools.cache(built.compile_step))


def build(config):
  """The experiment of a config, which compiles once in all tests."""
  return _build(config.to_json(sort_keys=True))


def leave_out_scores(monkeypatch):
  """What comes before and after the steps compiles for long."""
  monkeypatch.setattr(loop, 'network_of', lambda *args: None)
  monkeypatch.setattr(loop, 'score', lambda *args: {})
  monkeypatch.setattr(loop, 'draw_neighbours', lambda *args: None)


def read_metrics(workdir):
  """The lines of metrics.jsonl without what was measured in time."""
  lines = workdir.metrics_file.read_text().splitlines()
  records = [json.loads(line) for line in lines]
  return [
    {k: v for k, v in record.items() if k != 'images_per_second'}
    for record in records
  ]


def read_state(workdir, step):
  """The arrays of a checkpoint, in their order, read without cmd_jax."""
  path = workdir.checkpoints.absolute() / str(step) / 'state'
  handler = ocp.PyTreeCheckpointHandler()
  like = jax.tree.map(lambda x: x.shape, handler.metadata(path).tree)
  options = jax.tree.map(
    lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
    like,
    is_leaf=lambda x: isinstance(x, tuple),
  )
  tree = handler.restore(
    path, args=ocp.args.PyTreeRestore(restore_args=options)
  )
  return [np.asarray(x) for x in jax.tree.leaves(tree)]
