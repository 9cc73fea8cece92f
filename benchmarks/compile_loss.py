"""The loss over prototypes alone, compiled for TPUs without having one.

  pip install libtpu
  JAX_PLATFORMS=cpu TPU_ACCELERATOR_TYPE=v5litepod-8
    TPU_LIBRARY_PATH=FOLDER/libtpu/libtpu.so
    python -m benchmarks.compile_loss [--topology=v5e:2x4] [--method=cmd]
    [--num_prototypes=4096,65536] [--images=32] [--tile_mib=256]
    [--no-kernels]

Value and gradient by prototypes, bottlenecks and attention, for the published
recipe (2 x 224 and 8 x 96 views, ViT of 16 x 16 patches, bottlenecks of 256
numbers in bfloat16). The milliseconds are the compiler's own estimate: the
cycles that it writes beside every operation, as often as its loop runs, at the
chip's clock. They tell shares and ratios; nothing is measured. Memory is what
each chip needs besides arguments and results.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from tqdm import tqdm

from benchmarks import record
from benchmarks.step import make_config
from cmd_jax.compile_ahead import estimate, hlo, targets
from cmd_jax.devices import chips, sharding
from cmd_jax.errors import UserError
from cmd_jax.losses import blockwise
from cmd_jax.methods import features, networks
from cmd_jax.methods.distillation import Distillation, ForwardOutput
from cmd_jax.models.heads import PrototypeWeights
from cmd_jax.training.recipe import make_method_maker, make_schedules

METHODS = ('cmd', 'esvit', 'dino')
# (views, tokens) of each size.
SIZES = ((2, 196), (8, 36))
DIM = 256


def make_mesh(topology: str) -> Mesh:
  """The devices of a topology, of which none is here.

  Raises:
    UserError: the compiler is missing, or does not know the topology.
  """
  # Without it the compiler asks the network which machine this is.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  try:
    described = topologies.get_topology_desc(
      platform='tpu', topology_name=topology
    )
  except Exception as error:
    raise UserError(
      f'--topology={topology} has no compiler here ({error}): pip install '
      "'cmd_jax[tpu]', or libtpu with TPU_LIBRARY_PATH, and name a topology "
      'such as v5e:2x4'
    ) from error
  return Mesh(np.array(described.devices), (sharding.DATA_AXIS,))


def make_distillation(
  method: str, num_prototypes: int, mesh: Mesh
) -> Distillation:
  """The method of the published recipe."""
  config = make_config(
    method=method, batch_size=mesh.size, num_prototypes=num_prototypes
  )
  make = make_method_maker(
    config,
    make_schedules(config, 100, 1000),
    lambda path: False,
    platform=mesh.devices.flat[0].platform,
  )
  return make(None, mesh).loss.__self__


def output_like(
  num_prototypes: int, batch_size: int, mesh: Mesh, *, regions: bool, mil: bool
) -> ForwardOutput:
  """Shapes and shardings of what both networks say."""

  def whole(*shape):
    return jax.ShapeDtypeStruct(
      shape, jnp.float32, sharding=sharding.replicated(mesh)
    )

  def spread(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(
      (batch_size, *shape), dtype, sharding=sharding.sharded(mesh)
    )

  def prototypes():
    weights = PrototypeWeights(whole(DIM, num_prototypes), None)
    return networks.Prototypes(weights, weights if regions else None)

  (views, tokens), sizes = SIZES[0], SIZES if regions else ()
  bags = sizes if mil else ()
  names = ('image', 'region') if regions else ('image',)
  return ForwardOutput(
    features.StudentFeatures(
      tuple(spread(v, DIM) for v, _ in SIZES),
      tuple(spread(v, n, DIM) for v, n in sizes),
      tuple(spread(v, n, dtype=jnp.float32) for v, n in bags),
      spread(views, tokens, dtype=jnp.float32) if mil else None,
    ),
    features.TeacherFeatures(
      spread(views, 384, dtype=jnp.float32),
      spread(views, DIM),
      spread(views, tokens, DIM) if regions else None,
      tuple(spread(views, v, n, dtype=jnp.int32) for v, n in sizes),
    ),
    prototypes(),
    features.TeacherContext(
      prototypes(), {name: whole(num_prototypes) for name in names}, whole()
    ),
    {},
  )


def make_gradient(
  distillation: Distillation, budget: blockwise.Budget
) -> Callable:
  """(prototypes, student, output) -> the loss and its gradients."""

  def loss(prototypes, student, output):
    output = output._replace(prototypes=prototypes, student=student)
    return distillation.mean_loss(output, 0, budget)

  return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


def compile_row(
  options: argparse.Namespace, num_prototypes: int, mesh: Mesh
) -> dict[str, Any]:
  """What the compiler says of one number of prototypes."""
  output = output_like(
    num_prototypes,
    options.images * mesh.size,
    mesh,
    regions=options.method != 'dino',
    mil=options.method == 'cmd',
  )
  gradient = make_gradient(
    make_distillation(options.method, num_prototypes, mesh),
    blockwise.Budget(
      options.tile_mib * 2**20, 0, 'tpu' if options.kernels else ''
    ),
  )
  start = time.perf_counter()
  compiled = (
    jax.jit(gradient).lower(output.prototypes, output.student, output).compile()
  )
  seconds = time.perf_counter() - start
  program = hlo.read_program(compiled.as_text())
  cycles = sum(estimate.cycles_by_part(program).values())
  chip = chips.CHIPS[mesh.devices.flat[0].device_kind]
  of_xla, kernels = cycles / chip.clock, estimate.kernels(program, chip)
  memory = compiled.memory_analysis()
  return {
    'K': num_prototypes,
    'images a chip': options.images,
    'ms, estimated': 1e3 * (of_xla + kernels.seconds),
    'of it kernels at their roofline': 1e3 * kernels.seconds,
    'temporaries, MiB': round(memory.temp_size_in_bytes / 2**20),
    'arguments, MiB': round(memory.argument_size_in_bytes / 2**20),
    'compile, s': seconds,
  }


def main() -> None:
  """Compiles, prints and writes."""
  parser = record.make_parser(__doc__)
  parser.add_argument('--topology', default='v5e:2x4')
  parser.add_argument('--method', default='cmd', choices=METHODS)
  parser.add_argument('--num_prototypes', default='4096,65536')
  parser.add_argument('--images', type=int, default=32)
  parser.add_argument('--tile_mib', type=int, default=256)
  parser.add_argument(
    '--kernels', action=argparse.BooleanOptionalAction, default=True
  )
  run = record.begin('compile_loss', parser)
  options = run.options
  kind, _ = targets.parse_name(options.topology)
  if kind not in targets.TPUS:
    raise UserError(
      f'--topology={options.topology} is of no chip whose compiler estimates '
      f'times: choose one of {", ".join(targets.TPUS)}, as in v5e:2x4'
    )
  mesh = make_mesh(options.topology)
  numbers = [int(x) for x in options.num_prototypes.split(',')]
  rows = [
    compile_row(options, number, mesh)
    for number in tqdm(numbers, desc='compiling')
  ]
  record.finish(run, rows)


if __name__ == '__main__':
  record.run_main(main)
