"""How fast images come in: decoding, and waiting for a batch.

  taskset -c 0 python -m benchmarks.input --photographs=FOLDER

Rates are per second of CPU time, so that what else the machine does matters
less; both sides of a comparison take turns in one run and the best round
counts.

decode: JPEGs of 500 x 375 pixels (photographs resized, quality 90) to canvases
of 256; the decoder's own ceiling is Pillow's load of the same bytes.
wait: the share of the training loop spent waiting for the next batch, by both
routes, in the quick test of configs/folder.py on the photographs.
"""

from __future__ import annotations

import collections
import io
import pathlib
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

from benchmarks import record
from cmd_jax.data.canvas import make_canvas
from cmd_jax.data.image_files import open_rgb
from cmd_jax.training import experiment
from configs import folder

CANVAS_PX, PHOTO_SIZE, QUALITY = 256, (500, 375), 90
BICUBIC = Image.Resampling.BICUBIC


def encode_photographs(path: str, count: int) -> list[bytes]:
  """JPEGs of one size, spread over a folder's photographs."""
  files = sorted(pathlib.Path(path).rglob('*.jpg'))
  encoded = []
  for file in files[:: max(1, len(files) // count)][:count]:
    buffer = io.BytesIO()
    image = Image.open(file).convert('RGB')
    image = image.resize(PHOTO_SIZE, Image.Resampling.LANCZOS)
    image.save(buffer, 'JPEG', quality=QUALITY)
    encoded.append(buffer.getvalue())
  return encoded


def to_canvases(encoded: list[bytes]) -> np.ndarray:
  """[N, 256, 256, 3] uint8 of JPEGs."""
  return np.stack(
    [make_canvas(open_rgb(io.BytesIO(x)), CANVAS_PX) for x in encoded]
  )


def rates(
  contenders: dict[str, Callable[[], None]],
  count: int,
  rounds: int,
  clock: Callable[[], float] = time.process_time,
) -> dict[str, float]:
  """Images per second of each, in turns, the best of the rounds."""
  best = dict.fromkeys(contenders, float('inf'))
  for _ in range(rounds):
    for name, run in contenders.items():
      start = clock()
      run()
      best[name] = min(best[name], clock() - start)
  return {name: count / seconds for name, seconds in best.items()}


class Decoding(NamedTuple):
  """How fast JPEGs become canvases.

  Attributes:
    rates: images per second of CPU time of each way.
    levels_lost: mean difference, of 256, of decoding at half the size.
  """

  rates: dict[str, float]
  levels_lost: float


def measure_decoding(encoded: list[bytes], rounds: int) -> Decoding:
  """Decoding, resizing, and both."""
  decoded = [open_rgb(io.BytesIO(x)) for x in encoded]

  def halved(content):
    image = Image.open(io.BytesIO(content))
    image.draft(None, (image.width // 2, image.height // 2))
    image.load()

  def canvas(content, decode_px=CANVAS_PX):
    image = open_rgb(io.BytesIO(content), min_px=decode_px)
    return make_canvas(image, CANVAS_PX)

  def resize(filter_):
    return lambda: [
      image.resize((CANVAS_PX, CANVAS_PX), filter_) for image in decoded
    ]

  result = rates(
    {
      'canvas': lambda: [canvas(x) for x in encoded],
      # config.decode_px: scaled decoding sets in, half of 375 rows remain.
      'canvas_decode_px_180': lambda: [canvas(x, 180) for x in encoded],
      'load': lambda: [Image.open(io.BytesIO(x)).load() for x in encoded],
      'load_at_half_size': lambda: [halved(x) for x in encoded],
      'resize_bicubic': resize(BICUBIC),
      'resize_hamming': resize(Image.Resampling.HAMMING),
      'resize_box': resize(Image.Resampling.BOX),
    },
    len(encoded),
    rounds,
  )
  lost = [np.abs(canvas(x) - np.float32(canvas(x, 180))) for x in encoded]
  return Decoding(result, float(np.mean(lost)))


def measure_waiting(path: str, placement: str, num_steps: int) -> dict:
  """The share of the loop in which it waits for a batch."""
  config = folder.get_config('method=dino,quicktest').unlock()
  config.dataset.path = path
  config.placement = placement
  built = experiment.build(config)
  step, state = built.compile_step(), built.init_state()
  pending = collections.deque()
  with built.data.make_batches(None) as batches:
    state, metrics = step(state, batches(0), built.rng)
    jax.block_until_ready(metrics)
    waited, start = 0.0, time.perf_counter()
    for number in range(1, num_steps + 1):
      before = time.perf_counter()
      batch = batches(number)
      waited += time.perf_counter() - before
      state, metrics = step(state, batch, built.rng)
      pending.append(metrics)
      # As the training loop: the host is two steps ahead at most.
      if len(pending) > 2:
        jax.block_until_ready(pending.popleft())
    jax.block_until_ready(state)
  seconds = time.perf_counter() - start
  return {
    'share_waiting': waited / seconds,
    'images_per_second': num_steps * config.batch_size / seconds,
  }


def main() -> None:
  """Measures, prints and writes."""
  parser = record.make_parser(__doc__)
  parser.add_argument('--photographs', required=True)
  parser.add_argument('--images', type=int, default=64)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--steps', type=int, default=100)
  run = record.begin('input', parser)
  options = run.options
  encoded = encode_photographs(options.photographs, options.images)
  decoding = measure_decoding(encoded, options.rounds)
  waits = {
    placement: measure_waiting(options.photographs, placement, options.steps)
    for placement in ('device', 'stream')
  }
  rows = [
    {'what': name, 'images_per_second': rate}
    for name, rate in decoding.rates.items()
  ] + [{'what': f'loop, {name}', **found} for name, found in waits.items()]
  record.finish(
    run,
    rows,
    images=len(encoded),
    kilobytes_of_a_jpeg=float(np.mean([len(x) for x in encoded]) / 1e3),
    canvas_over_load=decoding.rates['canvas'] / decoding.rates['load'],
    levels_lost_at_decode_px_180=decoding.levels_lost,
  )


if __name__ == '__main__':
  record.run_main(main)
