"""Depthwise convolutions on this machine: EfficientNet-Lite0 by each of two.

  python -m benchmarks.depthwise

Images per second of the embedding and of a gradient in training, 16 images of
160 pixels, float32, drawn weights. The two take turns, and the median of the
rounds counts, so that what else the machine does meets both.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from cmd_jax.models import depthwise, efficientnet

BATCH, IMAGE_PX, ROUNDS = 16, 160, 5

CONVOLUTIONS = {
  'grouped convolution': depthwise.grouped_convolution,
  'shifted sums': depthwise.shifted_products,
}


def make_functions(
  convolve: Callable, images: jax.Array
) -> tuple[Callable[[], jax.Array], Callable[[], jax.Array]]:
  """Compiled: the embedding of the images, and the gradient of a loss."""
  encoder = efficientnet.make_efficientnet(drop_path_rate=0.0)
  variables = jax.jit(encoder.init)(jax.random.key(0), images[:1])

  def embed(variables, images):
    return encoder.apply(variables, images).image

  def loss(params, stats, images):
    output, _ = encoder.apply(
      {'params': params, 'batch_stats': stats},
      images,
      train=True,
      mutable=['batch_stats'],
    )
    return jnp.square(output.image).mean() + jnp.square(output.tokens).mean()

  # Everything is an argument: what is constant XLA computes when it compiles.
  of_embed = variables, images
  of_loss = variables['params'], variables['batch_stats'], images
  with mock.patch.object(efficientnet, 'depthwise', convolve):
    embedding = jax.jit(embed).lower(*of_embed).compile()
    gradient = jax.jit(jax.grad(loss)).lower(*of_loss).compile()
  return lambda: embedding(*of_embed), lambda: gradient(*of_loss)


def main() -> None:
  """Measures, prints and writes."""
  run = record.begin('depthwise', record.make_parser(__doc__))
  images = jax.random.normal(jax.random.key(1), (BATCH, IMAGE_PX, IMAGE_PX, 3))
  functions = {
    name: make_functions(convolve, images)
    for name, convolve in CONVOLUTIONS.items()
  }
  seconds = {name: ([], []) for name in functions}
  for _ in range(ROUNDS):
    for name, pair in functions.items():
      for function, times in zip(pair, seconds[name], strict=True):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
  rows = []
  for name, pair in seconds.items():
    forward, gradient = (BATCH / float(np.median(times)) for times in pair)
    rows.append(
      {
        'convolution': name,
        'forward, images/s': round(forward, 1),
        'gradient, images/s': round(gradient, 1),
      }
    )
  record.finish(run, rows)


if __name__ == '__main__':
  record.run_main(main)
