"""How much of what was done to photographs `cmd-jax curate` finds again.

  python -m benchmarks.curation --photographs=FOLDER --scratch=FOLDER

Of the photographs of a folder of class folders a share is drawn; copies of
some, smaller, mirrored, cropped, are put beside them, and others are moved to
a wrong class. The table says how many of each were found, and how many pairs
and labels were found that nobody had put there, which may be right.
"""

from __future__ import annotations

import pathlib
import random
import shutil
import time

import numpy as np
from PIL import Image, ImageOps

import cmd_jax
from benchmarks import record
from cmd_jax.curation.duplicates import KINDS
from cmd_jax.curation.findings import Findings, examine
from cmd_jax.curation.photographs import read_photographs
from cmd_jax.data.image_files import open_rgb
from cmd_jax.errors import UserError


def crop(image: Image.Image, share: float, rng: random.Random) -> Image.Image:
  """A share of both sides, at a random place."""
  width, height = (round(share * side) for side in image.size)
  left = rng.randint(0, image.width - width)
  top = rng.randint(0, image.height - height)
  return image.crop((left, top, left + width, top + height))


def narrow(image: Image.Image, rng: random.Random) -> Image.Image:
  """85 % of one side, 68 % of the other."""
  sides = [0.85, 0.68]
  rng.shuffle(sides)
  width, height = (round(x * side) for x, side in zip(sides, image.size))
  left = rng.randint(0, image.width - width)
  top = rng.randint(0, image.height - height)
  return image.crop((left, top, left + width, top + height))


CHANGES = {
  'half the size, JPEG 60': lambda image, rng: image.resize(
    (image.width // 2, image.height // 2)
  ),
  'mirrored': lambda image, rng: ImageOps.mirror(image),
  'crop of 55 to 90 % of the sides': lambda image, rng: crop(
    image, rng.uniform(0.55, 0.9), rng
  ),
  'the same, mirrored': lambda image, rng: ImageOps.mirror(
    crop(image, rng.uniform(0.55, 0.9), rng)
  ),
  'crop of 85 x 68 %': narrow,
}


def plant(
  files: list[pathlib.Path],
  folder: pathlib.Path,
  rng: random.Random,
  num_changed: int,
  num_wrong: int,
) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
  """Copies photographs into a folder and changes some.

  Returns:
    By the name of a changed copy its original and the change; and the right
    class by the name of a photograph in a wrong one.
  """
  classes = sorted({file.parent.name for file in files})
  order = rng.sample(files, len(files))
  wrong: dict[str, str] = {}
  for number, file in enumerate(order):
    name = file.parent.name
    if number < num_wrong:
      name = rng.choice([x for x in classes if x != name])
      wrong[f'{name}/{file.name}'] = file.parent.name
    (folder / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(file, folder / name / file.name)
  changed = {}
  for number, file in enumerate(order[num_wrong:][:num_changed]):
    change = list(CHANGES)[number % len(CHANGES)]
    name = f'{file.parent.name}/{file.stem}_changed.jpg'
    quality = 60 if 'JPEG 60' in change else 85
    CHANGES[change](open_rgb(file), rng).save(folder / name, quality=quality)
    changed[name] = f'{file.parent.name}/{file.name}', change
  return changed, wrong


def count_pairs(
  findings: Findings, changed: dict[str, tuple[str, str]]
) -> list[dict]:
  """A row for each change, and one for each kind of other pairs."""
  names, duplicates = findings.photographs.names, findings.duplicates
  kind_of = {
    frozenset((names[i], names[j])): KINDS[kind]
    for (i, j), kind in zip(duplicates.pairs, duplicates.kinds)
  }
  rows = []
  for change in CHANGES:
    own = [
      frozenset((name, original))
      for name, (original, said) in changed.items()
      if said == change
    ]
    kinds = [kind_of[pair] for pair in own if pair in kind_of]
    rows.append(
      {
        'what': change,
        'planted': len(own),
        'found': len(kinds),
        'by_pixels': sum(kind != 'alike' for kind in kinds),
      }
    )
  planted = {frozenset((name, x)) for name, (x, _) in changed.items()}
  others = [kind for pair, kind in kind_of.items() if pair not in planted]
  for kind in KINDS:
    if kind in others:
      rows.append({'what': f'others: {kind}', 'found': others.count(kind)})
  return rows


def count_labels(findings: Findings, wrong: dict[str, str]) -> list[dict]:
  """Rows for wrong labels: all that were suspected, and the surest ones."""
  names, around = findings.photographs.names, findings.around
  order = np.argsort(-around.margins, kind='stable')
  order = [row for row in order if around.suspected[row] >= 0]
  rows = []
  for what, some in (
    ('labels suspected', order),
    ('the surest, as many as planted', order[: len(wrong)]),
  ):
    hits = [row for row in some if names[row] in wrong]
    right = [
      row
      for row in hits
      if findings.name_of(around.suspected[row]) == wrong[names[row]]
    ]
    rows.append(
      {
        'what': what,
        'planted': len(wrong),
        'found': len(hits),
        'suspected': len(some),
        'suggested_right': len(right),
      }
    )
  return rows


def count_classes(findings: Findings) -> dict:
  """Classes among the images to label first, and among as many by chance."""
  labels, rows = findings.photographs.given.labels, findings.selection.rows
  rng = np.random.default_rng(0)
  by_chance = [
    len({*labels[rng.choice(len(labels), len(rows), replace=False)]})
    for _ in range(100)
  ]
  return {
    'what': f'classes among {len(rows)} to label first',
    'planted': len({*labels}),
    'found': len({*labels[rows]}),
    'by_chance': float(np.mean(by_chance)),
  }


def main() -> None:
  """Measures, prints and writes."""
  parser = record.make_parser(__doc__)
  parser.add_argument('--photographs', type=pathlib.Path, required=True)
  parser.add_argument('--scratch', type=pathlib.Path, required=True)
  parser.add_argument('--weights', default='efficientnet_lite0')
  parser.add_argument('--num_images', type=int, default=1500)
  parser.add_argument('--num_changed', type=int, default=200)
  parser.add_argument('--num_wrong', type=int, default=75)
  parser.add_argument('--seed', type=int, default=0)
  run = record.begin('curation', parser)
  options = run.options
  files = sorted(options.photographs.rglob('*.jpg'))
  rng = random.Random(options.seed)
  files = rng.sample(files, min(options.num_images, len(files)))
  folder = options.scratch / 'curation'
  if folder.exists():
    raise UserError(f'{folder} is there already: choose another --scratch')
  try:
    changed, wrong = plant(
      files, folder, rng, options.num_changed, options.num_wrong
    )
    start = time.perf_counter()
    photographs = read_photographs(cmd_jax.load(options.weights), folder)
    read_s = time.perf_counter() - start
  finally:
    shutil.rmtree(folder, ignore_errors=True)
  start = time.perf_counter()
  findings = examine(photographs, num_selected=100, alike_from=0.95)
  record.finish(
    run,
    [
      *count_pairs(findings, changed),
      *count_labels(findings, wrong),
      count_classes(findings),
    ],
    images=len(photographs.names),
    read_s=read_s,
    examine_s=time.perf_counter() - start,
  )


if __name__ == '__main__':
  record.run_main(main)
