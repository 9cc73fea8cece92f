"""Gradient of a transformer's MLP on the CPU: forms of GELU, merged axes.

  python -m benchmarks.mlp_gradient

The median milliseconds of each combination, all in one run.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmarks import record
from cmd_jax.models import layers

BATCH, TOKENS, WIDTH, HIDDEN, REPEATS = 128, 37, 96, 384, 20

ACTIVATIONS = {
  'erfc (flax)': lambda x: nn.gelu(x, approximate=False),
  'erf (ours)': layers.gelu,
  'relu (not the same function)': nn.relu,
}


def median_ms(function: Callable, *arguments: jax.Array) -> float:
  """Median wall time of a compiled function."""
  jax.block_until_ready(function(*arguments))
  times = []
  for _ in range(REPEATS):
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    times.append(time.perf_counter() - start)
  return round(1e3 * float(np.median(times)), 1)


def main() -> None:
  """Measures, prints and writes."""
  run = record.begin('mlp_gradient', record.make_parser(__doc__))
  keys = jax.random.split(jax.random.key(0), 3)
  tokens = jax.random.normal(keys[0], (BATCH, TOKENS, WIDTH))
  up = 0.1 * jax.random.normal(keys[1], (WIDTH, HIDDEN))
  down = 0.1 * jax.random.normal(keys[2], (HIDDEN, WIDTH))
  rows = []
  for name, activation in ACTIVATIONS.items():
    rows.append({'activation': name})

    def loss(tokens, up, down, activation=activation):
      return jnp.sum((activation(tokens @ up) @ down) ** 2)

    def merged(tokens, up, down, loss=loss):
      return loss(tokens.reshape(-1, WIDTH), up, down)

    for axes, function in (('[B, N, D]', loss), ('[B N, D]', merged)):
      gradient = jax.jit(jax.grad(function, argnums=(0, 1, 2)))
      rows[-1][f'ms, {axes}'] = median_ms(gradient, tokens, up, down)
  record.finish(run, rows)


if __name__ == '__main__':
  record.run_main(main)
