"""Scaling on paper: collectives of the compiled step, published networks.

  python -m benchmarks.scaling [--variants=S,L] [--num_prototypes=65536]

Compiles the data-parallel step for eight devices of this CPU, which need not be
able to run it, and reads from the optimised program what every device sends
(cmd_jax/compile_ahead/collectives.py). Predicts the step at 8 to 1,024 chips
from that, the FLOPs counted by hand and published figures
(benchmarks/interconnects.py):

  compute  = FLOPs / (peak x utilisation), the utilisation assumed
  sums     = all-reduce of the gradients; overlapped, only what the backward
             pass does not hide is waited for, and the last block's
  exchange = what else the program sends, which grows with the batch and which
             the next layer waits for
  efficiency = compute / (compute + waiting), with the batch of a chip fixed

Nothing of it is measured. benchmarks.pods has the same tables from programs of
a TPU's own compiler (docs/scaling_on_paper.md); this one needs no compiler.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from benchmarks import record
from benchmarks.interconnects import (
  CHIPS,
  SIZES,
  Chip,
  all_reduce_seconds,
  exchange_seconds,
  levels,
)
from benchmarks.step import make_config, make_step
from cmd_jax.compile_ahead import hlo
from cmd_jax.compile_ahead.collectives import Collective, read_collectives
from cmd_jax.compile_ahead.flops import count_flops
from cmd_jax.devices import sharding
from cmd_jax.models import make_encoder

NUM_DEVICES = 8
BATCHES = (32, 64)
UTILISATION = 0.4
UTILISATIONS = (0.2, 0.4, 0.6)
# Columns and prototypes scaled in turn, of two heads: three sums each.
SINKHORN_SUMS = 6


class Traffic(NamedTuple):
  """What a device sends in a step.

  Attributes:
    sum_bytes: of the all-reduces: gradients, centres, metrics.
    promoted_bytes: of them float32 on CPU alone, bfloat16 elsewhere.
    num_sums: all-reduces.
    exchange_bytes: of everything else, for one image a device.
    num_exchanges: other collectives.
    gradient_bytes: of the parameters' gradients in float32, from their shapes.
    encoder_bytes: those of the encoder alone.
    block_bytes: those of one of its blocks.
  """

  sum_bytes: float
  promoted_bytes: float
  num_sums: int
  exchange_bytes: float
  num_exchanges: int
  gradient_bytes: float
  encoder_bytes: float
  block_bytes: float


class Prediction(NamedTuple):
  """A step on so many chips, in seconds.

  Attributes:
    compute: if nothing were sent.
    sums: of the all-reduces, if waited for.
    exchange: of everything else.
    exposed: waited for where sums overlap with the backward pass.
  """

  compute: float
  sums: float
  exchange: float
  exposed: float

  def efficiency(self, overlapped: bool) -> float:
    """Share of the time in which chips compute."""
    waiting = self.exposed if overlapped else self.sums + self.exchange
    return self.compute / (self.compute + waiting)


def _float32_bytes(tree: Any) -> int:
  return 4 * sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def read_traffic(
  found: Iterable[Collective], params: Any, per_device: int
) -> Traffic:
  """Sums up the collectives of a program.

  Args:
    found: from `collectives.read_collectives`.
    params: the student's parameters or their shapes.
    per_device: images of a device for which it was compiled.
  """
  found = list(found)
  sums = [x for x in found if x.kind == 'all-reduce']
  others = [x for x in found if x.kind != 'all-reduce']
  encoder = params['encoder']
  blocks = [x for name, x in encoder.items() if name.startswith('block')]
  return Traffic(
    sum_bytes=sum(x.times * x.num_bytes for x in sums),
    promoted_bytes=sum(x.times * x.num_bytes for x in sums if x.is_promoted),
    num_sums=round(sum(x.times for x in sums)),
    exchange_bytes=sum(x.times * x.num_bytes for x in others) / per_device,
    num_exchanges=round(sum(x.times for x in others)),
    gradient_bytes=_float32_bytes(params),
    encoder_bytes=_float32_bytes(encoder),
    block_bytes=_float32_bytes(blocks) / max(len(blocks), 1),
  )


def compile_traffic(
  config: ConfigDict, mode: str
) -> tuple[Traffic, dict[str, Any]]:
  """Compiles a step and reads its traffic; also what to record of it."""
  start = time.perf_counter()
  mesh = sharding.make_mesh(NUM_DEVICES)
  step = make_step(config, mesh, mode=mode)
  compiled = step.lower().compile()
  program = hlo.read_program(compiled.as_text())
  found = read_collectives(program)
  traffic = read_traffic(
    found, step.state_like.params, config.batch_size // NUM_DEVICES
  )
  by_kind: dict[str, float] = {}
  for one in found:
    by_kind[one.kind] = by_kind.get(one.kind, 0) + one.times * one.num_bytes
  work = hlo.work(program)
  return traffic, {
    'bytes_by_kind': by_kind,
    'gflops_of_program': work.dot_flops * NUM_DEVICES / 1e9,
    'seconds': time.perf_counter() - start,
  }


def backward_flops(config: ConfigDict) -> float:
  """FLOPs of an image during which gradients can be on their way.

  Two thirds of the student's share; that of the prototypes comes first and is
  left out, as theirs are the first gradients there are.
  """
  flops = count_flops(config)
  views = config.augment
  teacher = 2 * (views.global_px // config.model.patch_px) ** 2
  student = teacher + (
    views.num_local * (views.local_px // config.model.patch_px) ** 2
  )
  of_student = 3 * student / (teacher + 3 * student)
  return 2 / 3 * of_student * (flops['encoder'] + flops['heads'])


def predict(
  traffic: Traffic,
  config: ConfigDict,
  chip: Chip,
  num_chips: int,
  *,
  per_chip: int,
  utilisation: float = UTILISATION,
) -> Prediction:
  """A step on so many chips.

  Args:
    traffic: of the compiled step.
    config: of the step.
    chip: kind of the chips.
    num_chips: one of `SIZES`.
    per_chip: images of a chip.
    utilisation: share of the peak that a chip reaches on its own; assumed.
  """
  rate = chip.peak_flops * utilisation
  networks = levels(chip, num_chips)
  compute = per_chip * sum(count_flops(config).values()) / rate
  sums = all_reduce_seconds(traffic.sum_bytes, networks, traffic.num_sums)
  exchange = exchange_seconds(per_chip * traffic.exchange_bytes, networks)
  hidden = per_chip * backward_flops(config) / rate
  last = all_reduce_seconds(traffic.block_bytes, networks)
  return Prediction(
    compute, sums, exchange, exchange + max(sums - hidden, min(last, sums))
  )


def traffic_rows(found: dict[str, Traffic]) -> list[dict[str, Any]]:
  """What a device sends, a row for each encoder."""
  return [
    {
      'encoder': name,
      'all-reduces': x.num_sums,
      'MB summed': x.sum_bytes / 1e6,
      'of them promoted': x.promoted_bytes / 1e6,
      'MB of gradients': x.gradient_bytes / 1e6,
      'of them encoder': x.encoder_bytes / 1e6,
      'other': x.num_exchanges,
      'MB an image': x.exchange_bytes / 1e6,
    }
    for name, x in found.items()
  ]


def efficiency_rows(
  traffic: Traffic, config: ConfigDict, per_chip: int
) -> list[dict[str, Any]]:
  """Efficiency in per cent, waiting and overlapped, a row for each chip."""
  rows = []
  for chip in CHIPS:
    found = {
      n: predict(traffic, config, chip, n, per_chip=per_chip) for n in SIZES
    }
    first = found[SIZES[0]]
    rows.append(
      {
        'chip': chip.name,
        'step, ms': 1e3 * first.compute,
        **{
          f'{n} chips': ' / '.join(
            f'{100 * x.efficiency(overlapped):.0f}'
            for overlapped in (False, True)
          )
          for n, x in found.items()
        },
      }
    )
  return rows


def utilisation_rows(
  traffic: Traffic, config: ConfigDict, num_chips: int, per_chip: int
) -> list[dict[str, Any]]:
  """Efficiency by the utilisation that is assumed."""
  rows = []
  for chip in CHIPS:
    cells = {}
    for utilisation in UTILISATIONS:
      found = predict(
        traffic,
        config,
        chip,
        num_chips,
        per_chip=per_chip,
        utilisation=utilisation,
      )
      cells[f'at {utilisation:.0%} of peak'] = ' / '.join(
        f'{100 * found.efficiency(overlapped):.0f}'
        for overlapped in (False, True)
      )
    rows.append({'chip': chip.name, **cells})
  return rows


def limit_rows(
  traffic: Traffic, config: ConfigDict, num_chips: int, per_chip: int
) -> list[dict[str, Any]]:
  """Milliseconds of each kind of communication on so many chips."""
  of_prototypes = 4 * config.head.num_prototypes
  rows = []
  for chip in CHIPS:
    networks = levels(chip, num_chips)
    found = predict(traffic, config, chip, num_chips, per_chip=per_chip)

    def sums(num_bytes, count, networks=networks):
      return 1e3 * all_reduce_seconds(num_bytes, networks, count)

    rows.append(
      {
        'chip': chip.name,
        'compute': 1e3 * found.compute,
        'all sums': 1e3 * found.sums,
        "of them prototypes' gradients": sums(
          2 * of_prototypes * config.head.bottleneck_dim, 1
        ),
        'two centres [K]': sums(2 * of_prototypes, 1),
        'Sinkhorn instead': sums(SINKHORN_SUMS * of_prototypes, SINKHORN_SUMS),
        'exchange': 1e3 * found.exchange,
      }
    )
  return rows


def print_tables(
  found: dict[str, Traffic], configs: dict[str, ConfigDict], mode: str
) -> list[dict[str, Any]]:
  """Prints the tables; returns the rows of efficiency for the record."""
  print(f'What a device sends in a step compiled by {mode}\n')
  print(record.table(traffic_rows(found)))
  rows = []
  for name, traffic in found.items():
    for per_chip in BATCHES:
      some = efficiency_rows(traffic, configs[name], per_chip)
      rows += [{'encoder': name, 'per_chip': per_chip, **x} for x in some]
      print(
        f'\nViT-{name}/16, {per_chip} images a chip\n\n{record.table(some)}'
      )
  name, traffic = next(iter(found.items()))
  for title, function in (
    ('efficiency by what is assumed', utilisation_rows),
    ('milliseconds', limit_rows),
  ):
    some = function(traffic, configs[name], 256, BATCHES[-1])
    print(f'\nViT-{name}/16 on 256 chips, {BATCHES[-1]} images each: {title}\n')
    print(record.table(some))
  return rows


def main() -> None:
  """Compiles, predicts, prints and writes."""
  parser = record.make_parser(__doc__)
  parser.add_argument('--variants', default='S,L')
  parser.add_argument('--dtype', default='bfloat16')
  parser.add_argument('--num_prototypes', type=int, default=65536)
  parser.add_argument('--per_device', type=int, default=2)
  parser.add_argument('--mode', default='jit', choices=sharding.MODES)
  run = record.begin('scaling', parser)
  options = run.options
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', NUM_DEVICES)
  found, configs, details = {}, {}, {}
  for name in tqdm(options.variants.split(','), desc='compile', unit='step'):
    configs[name] = make_config(
      method='cmd',
      batch_size=options.per_device * NUM_DEVICES,
      num_prototypes=options.num_prototypes,
      overrides=[f'model.variant={name}', f'model.dtype={options.dtype}'],
    )
    found[name], details[name] = compile_traffic(configs[name], options.mode)
  record.finish(
    run,
    print_tables(found, configs, options.mode),
    show=False,
    traffic={name: x._asdict() for name, x in found.items()},
    programs=details,
    depths={k: make_encoder(**x.model).depth for k, x in configs.items()},
    utilisation=UTILISATION,
  )


if __name__ == '__main__':
  record.run_main(main)
