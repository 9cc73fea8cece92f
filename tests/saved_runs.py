"""Work directories of runs that were never trained: shared by the tests.

`python -m tests.saved_runs PATH` makes one.
"""

import sys

import jax
import numpy as np
from PIL import Image

from cmd_jax.rundir.checkpoint import Checkpoints
from cmd_jax.rundir.workdir import Workdir
from cmd_jax.training.state import TrainState
from configs import folder
from tests import tiny

LORA = dict(rank=2, alpha=3.0)
STEP = 3


def make_config(method='cmd', encoder='vit', lora=tiny.NO_LORA):
  """The config of such a run, as a dict, with the encoder of `tiny`."""
  config = folder.get_config(f'method={method},encoder={encoder},quicktest')
  fields = config.to_dict()
  if encoder == 'vit':
    fields['model'].update(
      width=16, depth=2, num_heads=2, image_px=16, patch_px=4, pool='cls'
    )
  else:
    fields['model']['width_ratio'] = 0.25
  fields['canvas_px'] = tiny.CANVAS_PX
  fields['augment']['global_px'] = 16
  fields['eval'].update(view_px=16, crop_fraction=0.0)
  fields['lora'] = dict(lora)
  if method == 'cmd':
    fields['method']['mil'] = dict(hidden_dim=8)
  return fields


def make_run(path, method='cmd', encoder='vit', lora=tiny.NO_LORA):
  """A run with one checkpoint.

  Returns:
    The method, and the parameters and statistics of the teacher.
  """
  workdir = Workdir(str(path))
  workdir.open(make_config(method, encoder, lora))
  made = tiny.make_tiny_method(method, encoder=encoder, lora=lora)
  params, method_state = tiny.draw_like(
    jax.eval_shape(made.init, jax.random.key(0))
  )
  teacher = tiny.draw_like(params, seed=1)
  stats = tiny.draw_like(method_state.get('teacher_stats', {}), seed=1)
  if stats:
    method_state = {**method_state, 'teacher_stats': stats}
  state = TrainState(np.int32(STEP), params, teacher, (), method_state)
  checkpoints = Checkpoints(workdir.checkpoints, keep=1)
  checkpoints.save(state, {})
  checkpoints.close()
  return made, teacher, stats


def write_images(folder, names, seed=0, px=(20, 16)):
  """Coarse random photographs; returns their pixels [N, height, width, 3]."""
  rng = np.random.default_rng(seed)
  images = []
  for name in names:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 4, 3), np.uint8))
    image = coarse.resize(px[::-1])
    image.save(path)
    images.append(np.asarray(image))
  return np.stack(images)


if __name__ == '__main__':
  make_run(sys.argv[1])
