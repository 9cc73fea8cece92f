"""How fast images come in: decoding, augmentation, and waiting for them.

  taskset -c 0 python benchmarks/input.py --photographs=FOLDER

Rates are per second of CPU time, so that what else the machine does matters
less; both sides of a comparison take turns in one run and the best round
counts.

decode: JPEGs of 500 x 375 pixels (photographs resized, quality 90) to canvases
of 256; the decoder's own ceiling is Pillow's load of the same bytes.
augment: 2 views of 224 and 8 of 96 pixels of each canvas, ours (compiled) and
the same recipe in Pillow, image by image.
wait: the share of the training loop spent waiting for the next batch, by both
routes, in the quick test of configs/folder.py on the photographs.

Prints JSON and writes it to benchmarks/results/input.json.
"""

import argparse
import collections
import io
import json
import os
import pathlib
import time
from collections.abc import Callable

import jax
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from cmd_jax import experiment
from cmd_jax.data.augment import make_augment
from cmd_jax.data.canvas import make_canvas, open_rgb
from configs import common, folder

RESULT = pathlib.Path(__file__).parent / 'results' / 'input.json'
CANVAS_PX, PHOTO_SIZE, QUALITY = 256, (500, 375), 90
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
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


def rates(
  contenders: dict[str, Callable[[], None]], count: int, rounds: int
) -> dict[str, float]:
  """Images per second of CPU time of each, in turns, the best of the rounds."""
  best = dict.fromkeys(contenders, float('inf'))
  for _ in range(rounds):
    for name, run in contenders.items():
      start = time.process_time()
      run()
      best[name] = min(best[name], time.process_time() - start)
  return {name: count / seconds for name, seconds in best.items()}


def measure_decoding(encoded: list[bytes], rounds: int) -> dict:
  """Decoding, resizing, both, and the fraction of the decoder's ceiling."""
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
  result['canvas_over_load'] = result['canvas'] / result['load']
  result['canvas_decode_px_180_over_load_at_half_size'] = (
    result['canvas_decode_px_180'] / result['load_at_half_size']
  )
  result['levels_lost_at_decode_px_180'] = float(
    np.mean([np.abs(canvas(x) - np.float32(canvas(x, 180))) for x in encoded])
  )
  return result


def _draw_crop(rng, width, height, scale):
  for _ in range(10):
    area = width * height * rng.uniform(*scale)
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
    if w <= width and h <= height:
      left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
      return left, top, left + w, top + h
  return 0, 0, width, height


def _turn_hue(image, shift):
  hue, saturation, value = image.convert('HSV').split()
  table = [(level + round(shift * 255)) % 256 for level in range(256)]
  return Image.merge('HSV', (hue.point(table), saturation, value)).convert(
    'RGB'
  )


def _jitter(rng, image, fields):
  steps = [
    (ImageEnhance.Brightness, fields['brightness']),
    (ImageEnhance.Contrast, fields['contrast']),
    (ImageEnhance.Color, fields['saturation']),
    (None, fields['hue']),
  ]
  for number in rng.permutation(4):
    enhancer, strength = steps[number]
    if enhancer is None:
      image = _turn_hue(image, rng.uniform(-strength, strength))
    else:
      factor = rng.uniform(1 - strength, 1 + strength)
      image = enhancer(image).enhance(factor)
  return image


def pillow_view(
  rng: np.random.Generator,
  image: Image.Image,
  px: int,
  scale: tuple[float, float],
  blur_prob: float,
  solarize_prob: float,
  fields: dict,
) -> np.ndarray:
  """[px, px, 3] float32: one view by the recipe of config.augment."""
  box = _draw_crop(rng, *image.size, scale)
  view = image.resize((px, px), BICUBIC, box=box)
  if rng.random() < fields['flip_prob']:
    view = ImageOps.mirror(view)
  if rng.random() < fields['jitter_prob']:
    view = _jitter(rng, view, fields)
  if rng.random() < fields['gray_prob']:
    view = view.convert('L').convert('RGB')
  if rng.random() < blur_prob:
    radius = rng.uniform(*fields['blur_sigma'])
    view = view.filter(ImageFilter.GaussianBlur(radius))
  if rng.random() < solarize_prob:
    view = ImageOps.solarize(view)
  pixels = np.asarray(view, np.float32) / 255
  return (pixels - np.float32(MEAN)) / np.float32(STD)


def measure_augmentation(canvases: np.ndarray, rounds: int) -> dict:
  """Ours and Pillow's, each on all canvases."""
  fields = common.published(common.USUAL).augment.to_dict()
  augment = jax.jit(make_augment(**fields))
  count = len(canvases)
  sizes = np.tile(np.int32(PHOTO_SIZE[::-1]), (count, 1))
  keys = jax.random.split(jax.random.key(0), count)
  step_key = jax.random.key(1)
  images = [Image.fromarray(canvas) for canvas in canvases]
  rng = np.random.default_rng(0)
  first, second, local = fields['blur_probs']

  def ours():
    jax.block_until_ready(augment(canvases, sizes, keys, step_key))

  def theirs():
    for image in images:
      for blur, solarize in ((first, 0.0), (second, fields['solarize_prob'])):
        pillow_view(
          rng,
          image,
          fields['global_px'],
          fields['global_scale'],
          blur,
          solarize,
          fields,
        )
      for _ in range(fields['num_local']):
        pillow_view(
          rng,
          image,
          fields['local_px'],
          fields['local_scale'],
          local,
          0.0,
          fields,
        )

  # Compiles.
  ours()
  result = rates({'ours': ours, 'pillow': theirs}, count, rounds)
  result['ours_over_pillow'] = result['ours'] / result['pillow']
  return result


def measure_waiting(path: str, placement: str, num_steps: int) -> dict:
  """The share of the loop in which it waits for a batch."""
  config = folder.get_config('method=dino,quicktest').unlock()
  config.dataset.path = path
  config.placement = placement
  built = experiment.build(config)
  step, state = built.compile_step(), built.init_state()
  pending = collections.deque()
  with built.make_batches(None) as batches:
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
  parser = argparse.ArgumentParser()
  parser.add_argument('--photographs', required=True)
  parser.add_argument('--images', type=int, default=64)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--steps', type=int, default=100)
  arguments = parser.parse_args()
  encoded = encode_photographs(arguments.photographs, arguments.images)
  canvases = np.stack(
    [make_canvas(open_rgb(io.BytesIO(x)), CANVAS_PX) for x in encoded]
  )
  result = {
    'images': len(encoded),
    'kilobytes_of_a_jpeg': float(np.mean([len(x) for x in encoded]) / 1e3),
    'decode_per_cpu_second': measure_decoding(encoded, arguments.rounds),
    'augment_per_cpu_second': measure_augmentation(canvases, arguments.rounds),
    'wait': {
      placement: measure_waiting(
        arguments.photographs, placement, arguments.steps
      )
      for placement in ('device', 'stream')
    },
    'cores': len(os.sched_getaffinity(0)),
    'load_average': round(os.getloadavg()[0], 1),
  }
  RESULT.parent.mkdir(exist_ok=True)
  RESULT.write_text(json.dumps(result, indent=2) + '\n')
  print(json.dumps(result, indent=2))


if __name__ == '__main__':
  main()
