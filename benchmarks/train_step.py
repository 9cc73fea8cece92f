"""The whole train step: images/s, share of the matmul ceiling, peak memory.

  python -m benchmarks.train_step [--num_prototypes=4096] [--batch_size=4]

CMD with all four terms, a ViT-Ti/16, 2 x 224 and 8 x 96 views, canvases of 256
pixels made up of noise. The ceiling is the fastest of three matrix products of
the step's own shapes, measured between the steps, so that a busy machine slows
both. FLOPs are counted by hand from the shapes: 2 a multiplication of the
encoder, the heads and the prototypes, once for the teacher, three times for the
student. Peak memory is that of the process; run each size in its own. Prints
JSON and adds it to benchmarks/results/train_step.json.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax import parallel
from cmd_jax.data import augment
from cmd_jax.methods import make_method
from cmd_jax.models import make_encoder
from cmd_jax.recipe import make_optimizer, make_schedules
from cmd_jax.train_state import init_train_state
from cmd_jax.train_step import Batch, make_train_step
from configs import common

RESULT = pathlib.Path(__file__).parent / 'results' / 'train_step.json'
HIDDEN, BOTTLENECK = 2048, 256


def make_config(arguments: argparse.Namespace):
  """The published config with what the arguments change."""
  config = common.published(common.parse_argument(f'method={arguments.method}'))
  config.batch_size = arguments.batch_size
  config.model.update(variant=arguments.variant, dtype=arguments.dtype)
  config.head.num_prototypes = arguments.num_prototypes
  return config


def build(config):
  """The jitted step, its first state and a batch."""
  encoder = make_encoder(**config.model)
  named = make_schedules(config, steps_per_epoch=100, total_steps=1000)
  optimizer = make_optimizer(config.optim, named, 100, lambda path: False)
  method = make_method(
    encoder=encoder,
    image_px=config.augment.global_px,
    head=config.head.to_dict(),
    student_temperature=config.student_temperature,
    teacher_temperature=named['teacher_temperature'],
    centre_momentum=config.teacher.centre_momentum,
    teacher_normalisation=config.teacher.normalisation,
    axis_name=None,
    lora=config.lora.to_dict(),
    is_frozen=lambda path: False,
    **config.method.to_dict(),
  )
  step = make_train_step(
    method=method,
    augment=augment.make_augment(**config.augment),
    optimizer=optimizer,
    teacher_momentum=named['teacher_momentum'],
    schedules=named,
  )
  state = jax.jit(lambda key: init_train_state(method, optimizer, key, None))(
    jax.random.key(0)
  )
  size, canvas_px = config.batch_size, config.canvas_px
  rng = np.random.default_rng(0)
  batch = Batch(
    images=jnp.array(
      rng.integers(0, 256, (size, canvas_px, canvas_px, 3), np.uint8)
    ),
    sizes=jnp.full((size, 2), canvas_px, jnp.int32),
    index=jnp.arange(size, dtype=jnp.int32),
  )
  return jax.jit(step, donate_argnums=0), state, batch


def count_flops(config) -> dict[str, float]:
  """Floating-point operations of an image by part of the step."""
  model = make_encoder(**config.model)
  views = config.augment
  width, depth = model.width, model.depth

  def encoder(view_px):
    tokens = (view_px // model.patch_px) ** 2
    patches = tokens * width * 3 * model.patch_px**2
    tokens += 1
    linear = (4 + 2 * config.model.mlp_ratio) * tokens * width**2
    attention = 2 * tokens**2 * width
    return 2 * (patches + depth * (linear + attention))

  def rows(view_px):
    return (view_px // model.patch_px) ** 2 + 1

  one_row = 2 * (width * HIDDEN + HIDDEN**2 + HIDDEN * BOTTLENECK)
  one_logit = 2 * BOTTLENECK * config.head.num_prototypes
  teacher_rows = 2 * rows(views.global_px)
  student_rows = teacher_rows + views.num_local * rows(views.local_px)
  teacher = 2 * encoder(views.global_px)
  student = teacher + views.num_local * encoder(views.local_px)
  counted = teacher_rows + 3 * student_rows
  return {
    'encoder': teacher + 3 * student,
    'heads': one_row * counted,
    'prototypes': one_logit * counted,
  }


def make_ceiling(config):
  """() -> FLOP/s of the fastest of three products of the step's shapes."""
  rows = config.batch_size * 400
  shapes = [(1024, 1024, 1024), (rows, 192, 768), (rows, BOTTLENECK, 4096)]
  dtype = jnp.dtype(config.model.dtype)
  product = jax.jit(jnp.dot)
  operands = [
    (jnp.ones((m, k), dtype), jnp.ones((k, n), dtype)) for m, k, n in shapes
  ]
  for a, b in operands:
    product(a, b).block_until_ready()

  def measure():
    best = 0.0
    for (a, b), (m, k, n) in zip(operands, shapes):
      start = time.perf_counter()
      for _ in range(3):
        product(a, b).block_until_ready()
      best = max(best, 3 * 2 * m * k * n / (time.perf_counter() - start))
    return best

  return measure


def main() -> None:
  """Measures, prints and writes."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--method', default='cmd')
  parser.add_argument('--variant', default='Ti')
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--num_prototypes', type=int, default=4096)
  parser.add_argument('--batch_size', type=int, default=4)
  parser.add_argument('--steps', type=int, default=5)
  arguments = parser.parse_args()
  config = make_config(arguments)
  mesh = parallel.make_mesh(1)
  step, state, batch = build(config)
  start = time.perf_counter()
  compiled = step.lower(state, batch, jax.random.key(1)).compile()
  compile_seconds = time.perf_counter() - start
  ceiling = make_ceiling(config)
  seconds, ceilings = [], []
  for number in range(arguments.steps + 1):
    start = time.perf_counter()
    state, metrics = compiled(state, batch, jax.random.key(1))
    loss = float(metrics['loss'])
    if number:
      seconds.append(time.perf_counter() - start)
      ceilings.append(ceiling())
  flops = count_flops(config)
  rate = config.batch_size / min(seconds)
  state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
  memory = compiled.memory_analysis()
  result = {
    **vars(arguments),
    'images_per_second': round(rate, 3),
    'seconds_of_steps': [round(x, 3) for x in seconds],
    'compile_seconds': round(compile_seconds, 1),
    'gflops_an_image': {k: round(v / 1e9, 2) for k, v in flops.items()},
    'matmul_ceiling_gflops': round(max(ceilings) / 1e9, 1),
    'share_of_ceiling': round(rate * sum(flops.values()) / max(ceilings), 3),
    'peak_mb': round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    'state_mb': round(state_bytes / 2**20),
    'temporary_mb': round(memory.temp_size_in_bytes / 2**20),
    'loss': loss,
    'device': mesh.devices.ravel()[0].device_kind,
    'cores': len(os.sched_getaffinity(0)),
    'load_average': round(os.getloadavg()[0], 1),
    'jax': jax.__version__,
  }
  rows = json.loads(RESULT.read_text()) if RESULT.exists() else []
  RESULT.write_text(json.dumps([*rows, result], indent=2) + '\n')
  print(json.dumps(result, indent=2))


if __name__ == '__main__':
  main()
