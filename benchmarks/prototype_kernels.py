"""The attention over prototypes by kernels and by XLA's tiles, side by side.

  python -m benchmarks.prototype_kernels [--images=32] [--num_prototypes=65536]
    [--dtype=bfloat16] [--repeats=10]
  python -m benchmarks.prototype_kernels --interpret=gpu --images=2
    --num_prototypes=256 --dtype=float32 --repeats=1

Value and gradients by prototypes, bottlenecks and attention, of random rows
(2 views of 196 and 8 of 36 tokens an image, 256 numbers each) with the bags of
CMD. Says how long each takes, in turns, and how far they are apart as a share
of each array's largest number. With --interpret the kernels of a platform are
run step by step on any device, which says nothing of their time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from tqdm import tqdm

from benchmarks import record
from benchmarks.compile_loss import DIM, SIZES
from cmd_jax.errors import UserError
from cmd_jax.losses import blockwise, cmd, prototype_attention
from cmd_jax.losses.prototype_platforms import PLATFORMS
from cmd_jax.losses.prototype_tiles import Bag, Levels, Settings, Teacher

_STUDENT_TEMPERATURE = 0.1
_TEACHER_TEMPERATURE = 0.04


class _Prototypes(NamedTuple):
  columns: jax.Array

  def kernel(self) -> jax.Array:
    return self.columns


def make_inputs(options: argparse.Namespace) -> tuple:
  """Random arguments of `prototype_attention.attend`, after the settings."""
  keys = iter(jax.random.split(jax.random.key(0), 100))
  dtype, count = jnp.dtype(options.dtype), options.num_prototypes

  def unit(*shape, axis=-1):
    x = jax.random.normal(next(keys), shape)
    return x / jnp.linalg.norm(x, axis=axis, keepdims=True)

  def rows(sizes):
    views = [(views * options.images, tokens) for views, tokens in sizes]
    return (
      Levels(
        (unit(sum(g for g, _ in views), DIM).astype(dtype),),
        tuple(unit(n, g, DIM).astype(dtype) for g, n in views),
      ),
      tuple(
        jax.nn.softmax(jax.random.normal(next(keys), (n, g)), axis=0)
        for g, n in views
      ),
    )

  def levels(make):
    return Levels(make(), make())

  def prototypes():
    return levels(lambda: _Prototypes(unit(DIM, count, axis=0)))

  teacher, teacher_weights = rows(SIZES[:1])
  return (
    prototypes(),
    *rows(SIZES),
    Teacher(
      teacher,
      prototypes(),
      levels(lambda: 0.1 * unit(count)),
      jnp.float32(_TEACHER_TEMPERATURE),
    ),
    teacher_weights,
  )


def make_gradient(settings: Settings, inputs: tuple) -> Callable:
  """() -> what is attended, and its gradients by a random sum of it."""

  def loss(prototypes, student, weights, teacher, teacher_weights):
    attended = prototype_attention.attend(
      settings, prototypes, student, weights, teacher, teacher_weights
    )
    leaves = jax.tree.leaves(attended._replace(entropy=None))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    total = sum(
      (x * jax.random.uniform(key, x.shape)).mean()
      for x, key in zip(leaves, keys, strict=True)
    )
    return total, attended

  gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
  return lambda: jax.block_until_ready(gradient(*inputs))


def _distance(one: Any, other: Any) -> float:
  """The largest difference as a share of an array's largest number."""

  def of_array(x, y):
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return float(jnp.abs(x - y).max() / jnp.abs(y).max())

  return max(jax.tree.leaves(jax.tree.map(of_array, one, other)))


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
  """A row for each of the two.

  Raises:
    UserError: there are no kernels for the devices.
  """
  kernels = options.interpret or jax.devices()[0].platform
  if kernels not in PLATFORMS:
    raise UserError(
      f'there are no kernels for a {kernels}: give --interpret=, one of '
      f'{", ".join(PLATFORMS)}'
    )
  direction = 'image_to_bag'
  bag = Bag(lambda *x: (cmd.cross_level_kl(*x, direction=direction),))
  inputs = make_inputs(options)
  rows = options.images * sum(v * (n + 1) for v, n in (*SIZES, SIZES[0]))
  plan = blockwise.make_plan(
    blockwise.budget_for('gpu'),
    batch_size=1,
    num_rows=rows,
    num_prototypes=options.num_prototypes,
  )
  paths = {
    name: make_gradient(
      Settings(
        _STUDENT_TEMPERATURE,
        bag,
        bag,
        plan.prototypes,
        kernels=kernels if name == 'kernels' else '',
        interpret=bool(options.interpret),
      ),
      inputs,
    )
    for name in ('tiles', 'kernels')
  }
  found = {name: path() for name, path in paths.items()}
  seconds = {name: [] for name in paths}
  for _ in tqdm(range(options.repeats), desc='in turns'):
    for name, path in paths.items():
      start = time.perf_counter()
      path()
      seconds[name].append(time.perf_counter() - start)
  apart = [_distance(x, y) for x, y in zip(found['kernels'], found['tiles'])]
  return [
    {
      'path': name,
      'ms, best': 1e3 * min(seconds[name]),
      'gradients apart': apart[0] if name == 'kernels' else 0.0,
      'values apart': apart[1] if name == 'kernels' else 0.0,
    }
    for name in paths
  ]


def main() -> None:
  """Measures, prints and writes."""
  parser = record.make_parser(__doc__)
  parser.add_argument('--images', type=int, default=32)
  parser.add_argument('--num_prototypes', type=int, default=65536)
  parser.add_argument('--dtype', default='bfloat16')
  parser.add_argument('--repeats', type=int, default=10)
  parser.add_argument('--interpret', default='', choices=('', *PLATFORMS))
  run = record.begin('prototype_kernels', parser)
  record.finish(run, compare(run.options))


if __name__ == '__main__':
  record.run_main(main)
