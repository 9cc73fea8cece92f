"""The whole train step: images/s, share of the ceilings, peak memory.

  python -m benchmarks.train_step [--num_prototypes=4096] [--batch_size=4]
    [--parts] [--dtype=float32,bfloat16] [--num_devices=8] [--profile=FOLDER]

The published recipe (2 x 224 and 8 x 96 views, canvases of 256 pixels made up
of noise); steps of several dtypes are taken in turns. The matmul ceiling is the
fastest of a few products of the step's own shapes, the bandwidth ceiling x + 1
of 256 MiB, both measured between the steps on one device (times their number,
but on CPU, where devices share the cores). FLOPs are counted by hand from the
shapes and, to check, from the products of the compiled program, as are its
bytes; its loops count as often as they run (cmd_jax/compile_ahead). Bytes are
those that instructions read and write, so that what a cache holds counts as
memory and the share of the attainable may exceed 1. Peak memory is the
process's after the first step.

--parts times the augmentation and the encoder alone, compiled apart.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from benchmarks import ceilings, record
from benchmarks.step import METHODS, Step, make_config, make_step
from cmd_jax.compile_ahead import hlo
from cmd_jax.compile_ahead.flops import count_flops
from cmd_jax.devices import host_memory, sharding
from cmd_jax.models import make_encoder

# Measured elsewhere, on another machine of two cores, float32, ViT-Ti/16, CMD:
# (program, K, B, images/s, peak memory in GB where it was taken).
REFERENCE = (
  ('PyTorch, elsewhere', 4096, 4, 2.3, 2.1),
  ('PyTorch, elsewhere', 65536, 2, 0.5, 5.0),
  ('plain JAX, elsewhere', 4096, 4, 2.1, None),
  ('plain JAX, elsewhere', 65536, 2, 0.12, None),
)


class Variant(NamedTuple):
  """A compiled step and how it did.

  Attributes:
    step: what was compiled.
    compiled: the program.
    compile_seconds: how long that took.
    peak_mib: largest resident set of the process after the first step.
    seconds: of each step, the host waiting for every one.
    losses: of each step.
  """

  step: Step
  compiled: Any
  compile_seconds: float
  peak_mib: int
  seconds: list[float]
  losses: list[float]


class Ceilings(NamedTuple):
  """What was measured between the steps, FLOP/s and bytes/s."""

  matmul: list[float]
  bandwidth: list[float]


def compile_variant(step: Step) -> Variant:
  """Compiles a step and takes the first, which is not counted."""
  start = time.perf_counter()
  compiled = step.lower().compile()
  seconds = time.perf_counter() - start
  host_memory.give_back_freed()
  jax.block_until_ready(compiled(step.init(), step.noise(), jax.random.key(1)))
  return Variant(step, compiled, seconds, record.peak_memory_mib(), [], [])


def matmul_shapes(config: ConfigDict) -> list[tuple[int, int, int]]:
  """Products of the step, and one that is large where that costs nothing."""
  rows = config.batch_size * 400
  large = 1024 if jax.default_backend() == 'cpu' else 8192
  width = make_encoder(**config.model).width
  return [
    (large, large, large),
    (rows, width, 4 * width),
    (rows, config.head.bottleneck_dim, 4096),
  ]


def take_turns(
  variants: list[Variant], config: ConfigDict, num_steps: int
) -> Ceilings:
  """Steps of all variants in turns, the ceilings between them."""
  matmul = ceilings.make_matmul_ceiling(
    matmul_shapes(config), config.model.dtype
  )
  bandwidth = ceilings.make_bandwidth_ceiling()
  found = Ceilings([], [])
  for _ in range(num_steps):
    for variant in variants:
      # Anew each time: two states at once may not fit.
      state, batch = variant.step.init(), variant.step.noise()
      jax.block_until_ready((state, batch))
      key = jax.random.key(1)
      start = time.perf_counter()
      state, metrics = variant.compiled(state, batch, key)
      jax.block_until_ready(state)
      variant.seconds.append(time.perf_counter() - start)
      variant.losses.append(float(metrics['loss']))
      del state
    found.matmul.append(matmul())
    found.bandwidth.append(bandwidth())
  return found


def measure_host(
  variant: Variant, num_steps: int, profile: str | None
) -> dict[str, float]:
  """What the host costs: steps it waits for one by one, and steps in a row.

  Both in turns, twice; the faster counts.

  Args:
    variant: what is run.
    num_steps: of a turn.
    profile: folder for a trace of the last steps in a row, if any.
  """
  batch, key = variant.step.noise(), jax.random.key(1)
  state, calls = variant.step.init(), []

  def steps(wait):
    nonlocal state
    jax.block_until_ready(state)
    start = time.perf_counter()
    for _ in range(num_steps):
      called = time.perf_counter()
      state, _ = variant.compiled(state, batch, key)
      calls.append(time.perf_counter() - called)
      if wait:
        jax.block_until_ready(state)
    jax.block_until_ready(state)
    return (time.perf_counter() - start) / num_steps

  waiting, in_a_row = [], []
  for turn in range(2):
    waiting.append(steps(True))
    traced = profile if turn else None
    with jax.profiler.trace(traced) if traced else contextlib.nullcontext():
      in_a_row.append(steps(False))
  return {
    'seconds_in_a_row': min(in_a_row),
    'seconds_of_a_call': min(calls),
    'share_waiting_for_host': 1 - min(in_a_row) / min(waiting),
  }


def best_seconds(function: Callable[[], Any], repeats: int) -> float:
  """Seconds of the fastest call; the first, which compiles, is not counted."""
  jax.block_until_ready(function())
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(function())
    times.append(time.perf_counter() - start)
  return min(times)


def measure_parts(
  step: Step, config: ConfigDict, repeats: int
) -> dict[str, float]:
  """Seconds of the augmentation and of both encoders, each compiled apart."""
  batch = step.noise()
  views = step.augment(batch)[:2]
  encoder = make_encoder(**config.model)

  def encode(params, images):
    output = encoder.apply(
      {'params': params}, images.reshape(-1, *images.shape[2:])
    )
    return jnp.mean(output.image**2) + jnp.mean(output.tokens**2)

  @jax.jit
  def both(params, teacher, views):
    student = jax.value_and_grad(
      lambda params: sum(encode(params, x) for x in views)
    )
    return student(params), encode(teacher, views[0])

  state = step.init()
  students, teachers = (
    x['encoder'] for x in (state.params, state.teacher_params)
  )
  del state
  return {
    'seconds_augmentation': best_seconds(lambda: step.augment(batch), repeats),
    'seconds_encoder': best_seconds(
      lambda: both(students, teachers, views), repeats
    ),
  }


def device_memory() -> dict[str, float]:
  """Peak and limit in MiB where the devices count, else nothing."""
  stats = jax.devices()[0].memory_stats() or {}
  names = {'peak_bytes_in_use': 'peak', 'bytes_limit': 'limit'}
  return {
    f'device_{name}_mib': round(stats[key] / 2**20)
    for key, name in names.items()
    if key in stats
  }


def make_row(
  variant: Variant, config: ConfigDict, found: Ceilings
) -> dict[str, Any]:
  """Speed, shares and memory of a variant."""
  mesh, seconds = variant.step.mesh, min(variant.seconds)
  flops = sum(count_flops(config).values()) * config.batch_size
  several = mesh.size if mesh.devices.flat[0].platform != 'cpu' else 1
  matmul = max(found.matmul) * several
  program = hlo.read_program(variant.compiled.as_text())
  once, work = hlo.work(program, with_trips=False), hlo.work(program)
  costs = variant.compiled.cost_analysis()
  # The compiler's own count, with its loops as often as they run.
  num_bytes = costs['bytes accessed'] * work.num_bytes / once.num_bytes
  memory = variant.compiled.memory_analysis()
  return {
    'dtype': config.model.dtype,
    'K': config.head.num_prototypes,
    'B': config.batch_size,
    'images_per_second': config.batch_size / seconds,
    'share_of_matmul_ceiling': flops / seconds / matmul,
    **ceilings.roofline(
      flops=flops,
      num_bytes=num_bytes * mesh.size,
      seconds=seconds,
      matmul_ceiling=matmul,
      bandwidth_ceiling=max(found.bandwidth) * several,
    ),
    'gflops_of_program': work.dot_flops * mesh.size / 1e9,
    'seconds_blocked': seconds,
    'compile_seconds': variant.compile_seconds,
    'temporary_mib': round(memory.temp_size_in_bytes / 2**20),
    'peak_mib': variant.peak_mib,
    'loss': variant.losses[-1],
    'cost_analysis': {k: costs[k] for k in ('flops', 'bytes accessed')},
    'seconds_of_steps': variant.seconds,
  }


def print_reference(config: ConfigDict, row: dict[str, Any]) -> None:
  """Prints the figures taken elsewhere for this K and B, if there are any."""
  size = (config.head.num_prototypes, config.batch_size)
  rows = [
    {'program': x[0], 'images_per_second': x[3], 'peak_gb': x[4]}
    for x in REFERENCE
    if x[1:3] == size
  ]
  if rows and (config.method.name, config.model.variant) == ('cmd', 'Ti'):
    here = {
      'program': 'this run',
      'images_per_second': row['images_per_second'],
      'peak_gb': row['peak_mib'] * 2**20 / 1e9,
    }
    print(record.table([here, *rows]), end='\n\n')


def parse(arguments: list[str] | None = None) -> record.Run:
  """Reads the command line."""
  parser = record.make_parser(__doc__)
  parser.add_argument('--method', default='cmd', choices=METHODS)
  parser.add_argument('--variant', default='Ti')
  parser.add_argument(
    '--dtype',
    default='float32',
    help='of the model, or several with commas between; ceilings are of the '
    'first',
  )
  parser.add_argument('--num_prototypes', type=int, default=4096)
  parser.add_argument('--batch_size', type=int, default=4)
  parser.add_argument('--num_devices', type=int, default=1)
  parser.add_argument('--mode', default='jit', choices=sharding.MODES)
  parser.add_argument('--steps', type=int, default=5)
  parser.add_argument('--parts', action='store_true')
  parser.add_argument('--profile', help='folder for a trace of a few steps')
  parser.add_argument(
    '--set',
    action='append',
    default=[],
    metavar='FIELD=VALUE',
    help='another field of the config, e.g. --set=model.patch_px=8',
  )
  return record.begin('train_step', parser, arguments)


def config_of(options: argparse.Namespace, dtype: str) -> ConfigDict:
  """The config that the options ask for, with one of their dtypes."""
  return make_config(
    method=options.method,
    batch_size=options.batch_size,
    num_prototypes=options.num_prototypes,
    overrides=[
      f'model.variant={options.variant}',
      f'model.dtype={dtype}',
      *options.set,
    ],
  )


def main() -> None:
  """Measures, prints and writes."""
  run = parse()
  options = run.options
  configs = [config_of(options, x) for x in options.dtype.split(',')]
  config = configs[0]
  mesh = sharding.make_mesh(options.num_devices)
  sharding.check_batch_size(config.batch_size, mesh)
  variants = [
    compile_variant(make_step(x, mesh, mode=options.mode)) for x in configs
  ]
  found = take_turns(variants, config, options.steps)
  rows = [
    make_row(variant, x, found)
    for variant, x in zip(variants, configs, strict=True)
  ]
  for row in rows:
    rate = row['images_per_second']
    print(f'{row["dtype"]}: {rate:.3g} images/s', file=sys.stderr)
  usual, first = variants[0], rows[0]
  first |= measure_host(usual, max(2, options.steps // 2), options.profile)
  if options.parts:
    parts = measure_parts(usual.step, config, options.steps)
    seconds = parts['seconds_encoder']
    flops = count_flops(config)['encoder'] * config.batch_size
    first |= parts
    first |= {
      'share_augmentation': parts['seconds_augmentation']
      / first['seconds_blocked'],
      'share_of_matmul_ceiling_encoder': flops
      / seconds
      / (1e9 * first['matmul_ceiling_gflops']),
    }
  first |= device_memory()
  print_reference(config, first)
  counted = {k: v / 1e9 for k, v in count_flops(config).items()}
  record.finish(
    run,
    rows,
    gflops_an_image=counted,
    ceilings={k: [x / 1e9 for x in v] for k, v in found._asdict().items()},
    state_mib=sum(
      x.size * x.dtype.itemsize for x in jax.tree.leaves(usual.step.state_like)
    )
    / 2**20,
  )


if __name__ == '__main__':
  record.run_main(main)
