"""How well near duplicates are told from different photographs.

  python -m benchmarks.duplicates --photographs=FOLDER [--photographs=FOLDER]

Every photograph is changed in several ways; the table says how many of the
changed ones are found again by the hash alone and by hash and thumbnail, as the
data report has it. Among the photographs themselves every pair found is listed,
to be looked at: those that do not show the same are mistakes. The record has no
names.
"""

from __future__ import annotations

import io
import pathlib
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance

from benchmarks import record
from cmd_jax.data.canvas import make_canvas
from cmd_jax.data.image_files import open_rgb
from cmd_jax.data.inspect import near_duplicates

CANVAS_PX = 96
DISTANCES = (6, 8, near_duplicates.MAX_DISTANCE, 12)


def reencode(image: Image.Image, quality: int) -> Image.Image:
  """JPEG of the given quality and back."""
  file = io.BytesIO()
  image.save(file, 'JPEG', quality=quality)
  return open_rgb(file)


def crop(image: Image.Image, share: float, seed: int) -> Image.Image:
  """Loses a share of both sides, at a random place."""
  width, height = image.size
  left, top = np.random.default_rng(seed).uniform(0, share, 2)
  return image.crop(
    (
      int(left * width),
      int(top * height),
      int((left + 1 - share) * width),
      int((top + 1 - share) * height),
    )
  )


def brighten(image: Image.Image, factor: float) -> Image.Image:
  """Multiplies all pixels."""
  return ImageEnhance.Brightness(image).enhance(factor)


def third(image: Image.Image) -> Image.Image:
  """Resizes to a third of the sides."""
  return image.resize((image.width // 3, image.height // 3))


CHANGES = {
  'JPEG, quality 20': lambda image, seed: reencode(image, 20),
  'a third of the size, JPEG 75': lambda image, seed: reencode(
    third(image), 75
  ),
  '20 % brighter': lambda image, seed: brighten(image, 1.2),
  '20 % darker': lambda image, seed: brighten(image, 0.8),
  'grayscale': lambda image, seed: image.convert('L').convert('RGB'),
  'sides cropped by 2 %': lambda image, seed: crop(image, 0.02, seed),
  'by 3 %, JPEG 60, 10 % brighter': lambda image, seed: brighten(
    reencode(crop(image, 0.03, seed), 60), 1.1
  ),
  'by 5 %': lambda image, seed: crop(image, 0.05, seed),
  'by 10 %': lambda image, seed: crop(image, 0.1, seed),
}


def prints_of(
  files: list[pathlib.Path],
  change: Callable[[Image.Image, int], Image.Image] | None = None,
) -> near_duplicates.Prints:
  """Fingerprints of photographs, changed or not."""
  canvases = []
  for seed, file in enumerate(files):
    image = open_rgb(file)
    changed = change(image, seed) if change else image
    canvases.append(make_canvas(changed, CANVAS_PX))
  return near_duplicates.make_prints(np.stack(canvases))


def count_near_hashes(hashes: np.ndarray) -> dict[int, int]:
  """Pairs of different images by the most bits that may differ."""
  counts = dict.fromkeys(DISTANCES, 0)
  for row, value in enumerate(hashes):
    distance = np.bitwise_count(hashes[row + 1 :] ^ value)
    for limit in DISTANCES:
      counts[limit] += int((distance <= limit).sum())
  return counts


def main() -> None:
  """Measures, prints and writes."""
  parser = record.make_parser(__doc__)
  parser.add_argument('--photographs', action='append', required=True)
  parser.add_argument('--num_changed', type=int, default=1000)
  run = record.begin('duplicates', parser)
  arguments = run.options
  files = [
    file
    for folder in arguments.photographs
    for file in sorted(pathlib.Path(folder).rglob('*.jpg'))
  ]
  prints = prints_of(files)
  chosen = np.linspace(0, len(files) - 1, arguments.num_changed).astype(int)
  before = near_duplicates.Prints(*(field[chosen] for field in prints))
  rows = []
  for name, change in CHANGES.items():
    after = prints_of([files[row] for row in chosen], change)
    distance = np.bitwise_count(before.hashes ^ after.hashes)
    both = near_duplicates.join_prints([before, after])
    first = np.arange(len(chosen))
    alike = near_duplicates.correlation(both.thumbs, first, first + len(first))
    near = distance <= near_duplicates.MAX_DISTANCE
    is_found = near & (alike > near_duplicates.MIN_CORRELATION)
    rows.append(
      {
        'change': name,
        'found': float(is_found.mean()),
        **{f'hash {x}': float((distance <= x).mean()) for x in DISTANCES},
      }
    )
  pairs = sorted(
    {
      (int(i), int(j))
      for block in near_duplicates.near_pairs(prints)
      for i, j in zip(*block)
    }
  )
  for i, j in pairs:
    print(files[i], files[j])
  record.finish(
    run,
    rows,
    photographs=len(files),
    pairs=len(files) * (len(files) - 1) // 2,
    changed=len(chosen),
    pairs_near_by_hash=count_near_hashes(prints.hashes),
    pairs_found=len(pairs),
  )


if __name__ == '__main__':
  record.run_main(main)
