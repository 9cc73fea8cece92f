"""The encoder's passes alone, compiled for TPUs without having one.

  pip install 'cmd_jax[tpu]'
  python -m benchmarks.compile_encoder [--topology=v5e:1x1] [--variant=S]
    [--depth=4] [--images=32] [--dtype=bfloat16] [--operations=12]

The student's forward and backward pass over 2 x 224 and 8 x 96 views of each
image and the teacher's forward pass over the former, ViT of 16-pixel patches,
on one chip. The milliseconds are the compiler's own estimate, see
`benchmarks.compile_loss`, by what the program calls the operation: nothing is
measured. With `--depth` fewer blocks are compiled, and a block's share is told
by the difference of two depths.
"""

from __future__ import annotations

import argparse
import collections
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import record
from cmd_jax.compile_ahead import hlo, targets
from cmd_jax.devices import sharding
from cmd_jax.errors import UserError
from cmd_jax.models import make_encoder
from cmd_jax.models.vit import VisionTransformer

# (views, side) of each size.
SIZES = ((2, 224), (8, 96))
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')


def make_gradient(encoder: VisionTransformer) -> Callable:
  """(parameters, teacher's, images of each size) -> gradient of a loss."""

  def encode(params, images, train, uniforms=None):
    return encoder.apply({'params': params}, images, uniforms, train)

  def step(params, teacher, views, uniforms):
    first = encode(teacher, views[0], False)

    def loss(params):
      total = 0.0
      for images, draws in zip(views, uniforms, strict=True):
        # All that the heads look at has a gradient; attention has none.
        output = encode(params, images, True, draws)
        total += jnp.mean(output.tokens**2) + jnp.mean(output.image**2)
      return total * (first.image.mean() + first.tokens.mean())

    return jax.grad(loss)(params)

  return step


def lower_gradient(
  options: argparse.Namespace, target: targets.Target
) -> jax.stages.Lowered:
  """The passes, for the first device of a target."""
  mesh = sharding.make_mesh(1, target.devices)
  whole = sharding.replicated(mesh)
  encoder = make_encoder(
    name='vit',
    device=target.devices[0],
    variant=options.variant,
    depth=options.depth,
    dtype=options.dtype,
  )

  def like(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=whole)

  views = [like(v * options.images, px, px, 3) for v, px in SIZES]
  uniforms = [like(v * options.images, options.depth, 2) for v, _ in SIZES]
  params = jax.eval_shape(
    encoder.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3))
  )['params']
  params = jax.tree.map(lambda x: like(*x.shape), params)
  step = make_gradient(encoder)
  return jax.jit(step).lower(params, params, views, uniforms)


def cycles_by_operation(program: hlo.Program) -> dict[str, float]:
  """Estimated cycles by the last words of the operations' names."""
  total: dict[str, float] = collections.Counter()
  for name, times in hlo.executions(program).items():
    for instruction in program.computations[name].values():
      found = _CYCLES.search(instruction.attributes)
      if found:
        named = _OP_NAME.search(instruction.attributes)
        words = named.group(1).split('/') if named else ['', 'without a name']
        is_back = any(word.startswith('transpose(') for word in words)
        what = '/'.join(words[-2:]) + (', backward' if is_back else '')
        if instruction.opcode.startswith('copy'):
          what = f'copy: {what}'
        total[what] += times * int(found.group(1))
  return dict(total)


def main() -> None:
  """Compiles, prints and writes."""
  parser = record.make_parser(__doc__)
  parser.add_argument('--topology', default='v5e:1x1')
  parser.add_argument('--variant', default='S')
  parser.add_argument('--depth', type=int, default=4)
  parser.add_argument('--images', type=int, default=32)
  parser.add_argument('--dtype', default='bfloat16')
  parser.add_argument('--operations', type=int, default=12)
  run = record.begin('compile_encoder', parser)
  options = run.options
  targets.parse_name(options.topology)
  targets.prepare_process()
  target = targets.find_target(options.topology)
  if not target.chip.clock:
    raise UserError(
      f'--topology={options.topology}: its compiler estimates no times: choose '
      f'one of {", ".join(targets.TPUS)}, as in v5e:1x1'
    )
  start = time.perf_counter()
  compiled = lower_gradient(options, target).compile()
  seconds = time.perf_counter() - start
  by_name = cycles_by_operation(hlo.read_program(compiled.as_text()))
  whole = sum(by_name.values())
  temporaries = compiled.memory_analysis().temp_size_in_bytes

  def row(what: str, cycles: float) -> dict[str, Any]:
    return {
      'operation': what,
      'ms, estimated': 1e3 * cycles / target.chip.clock,
      'share': cycles / whole,
    }

  rows = [row('all', whole)] + [
    row(what, cycles)
    for what, cycles in sorted(by_name.items(), key=lambda x: -x[1])[
      : options.operations
    ]
  ]
  record.finish(
    run,
    rows,
    compile_s=round(seconds),
    temporaries_mib=round(temporaries / 2**20),
  )


if __name__ == '__main__':
  record.run_main(main)
