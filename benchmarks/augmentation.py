"""Augmentation: ours, compiled, and the same recipe in Pillow.

  taskset -c 0 python -m benchmarks.augmentation [--photographs=FOLDER]

2 views of 224 and 8 of 96 pixels of each canvas of 256, ours for a batch and
Pillow's image by image, in turns; the best round counts. Canvases are noise or
photographs. On CPU a rate is per second of CPU time, so that what else the
machine does matters less; on other devices it is per second.
"""

from __future__ import annotations

import time

import jax
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from benchmarks import record
from benchmarks.input import (
  BICUBIC,
  CANVAS_PX,
  PHOTO_SIZE,
  encode_photographs,
  rates,
  to_canvases,
)
from cmd_jax.config import published, vocabulary
from cmd_jax.data.augment.multi_crop import make_augment

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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


def pillow_views(
  rng: np.random.Generator, image: Image.Image, fields: dict
) -> list[np.ndarray]:
  """The ten views of an image by the recipe of config.augment."""
  first, second, local = fields['blur_probs']
  settings = [
    ('global', first, 0.0),
    ('global', second, fields['solarize_prob']),
    *[('local', local, 0.0)] * fields['num_local'],
  ]
  return [
    pillow_view(
      rng,
      image,
      fields[f'{kind}_px'],
      fields[f'{kind}_scale'],
      blur,
      solarize,
      fields,
    )
    for kind, blur, solarize in settings
  ]


def main() -> None:
  """Measures, prints and writes."""
  parser = record.make_parser(__doc__)
  parser.add_argument('--photographs')
  parser.add_argument('--images', type=int, default=64)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--no-pillow', action='store_true')
  run = record.begin('augmentation', parser)
  options = run.options
  if options.photographs:
    encoded = encode_photographs(options.photographs, options.images)
    canvases = to_canvases(encoded)
  else:
    shape = (options.images, CANVAS_PX, CANVAS_PX, 3)
    canvases = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  fields = published.published(vocabulary.USUAL).augment.to_dict()
  augment = jax.jit(make_augment(**fields))
  batch = jax.device_put(
    (canvases, np.tile(np.int32(PHOTO_SIZE[::-1]), (len(canvases), 1)))
  )
  keys = jax.random.split(jax.random.key(0), len(canvases))
  images = [Image.fromarray(canvas) for canvas in canvases]
  rng = np.random.default_rng(0)

  def ours():
    jax.block_until_ready(augment(*batch, keys, jax.random.key(1)))

  def theirs():
    for image in images:
      pillow_views(rng, image, fields)

  # Compiles.
  ours()
  contenders = {'ours': ours}
  if not options.no_pillow:
    contenders['Pillow'] = theirs
  is_cpu = jax.default_backend() == 'cpu'
  clock = time.process_time if is_cpu else time.perf_counter
  found = rates(contenders, len(canvases), options.rounds, clock)
  rows = [
    {'augmentation': name, 'images_per_second': rate}
    for name, rate in found.items()
  ]
  if 'Pillow' in found:
    for row in rows:
      row['ratio'] = row['images_per_second'] / found['Pillow']
  record.finish(
    run,
    rows,
    images=len(canvases),
    source='photographs' if options.photographs else 'noise',
    seconds_of='CPU time' if is_cpu else 'wall time',
  )


if __name__ == '__main__':
  record.run_main(main)
