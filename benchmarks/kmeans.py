"""k-means of hypercolumns against scikit-learn's, image by image.

  taskset -c 0 python -m benchmarks.kmeans [--photographs=FOLDER]

The points are a ResNet-50's four stages at 64 x 64 (4,096 points of 3,840
features, untrained weights) of 1/f noise or of photographs. Both run until
scikit-learn's criterion holds (tol 1e-4, at most 300 steps), in float32, on the
same cores, in turns; a time is the best of the rounds, compilation left out.
Inertia is that of all points with all features, computed anew from the labels
in float64.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable

import jax
import numpy as np
from PIL import Image
from sklearn.cluster import KMeans

from benchmarks import record
from cmd_jax.models.resnet import make_resnet
from cmd_jax.parts.features import hypercolumn, hypercolumn_maps
from cmd_jax.parts.kmeans import kmeans, kmeans_of_maps

IMAGE_PX, GRID, NUM_CLUSTERS = 224, (64, 64), 15
THEIRS = 'scikit-learn'
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_images(folder: str | None, count: int) -> np.ndarray:
  """[count, 224, 224, 3] normalised images, spread over a folder's."""
  if folder:
    files = sorted(pathlib.Path(folder).rglob('*.jpg'))
    images = [
      Image.open(file).convert('RGB').resize((IMAGE_PX, IMAGE_PX))
      for file in files[:: max(1, len(files) // count)][:count]
    ]
    pixels = np.stack([np.asarray(image) for image in images]) / 255
  else:
    rng = np.random.default_rng(0)
    frequency = np.fft.fftfreq(IMAGE_PX)
    radius = np.hypot(frequency[:, None], frequency)[..., None]
    noise = rng.normal(size=(count, IMAGE_PX, IMAGE_PX, 3))
    spectrum = np.fft.fft2(noise, axes=(1, 2)) / np.maximum(radius, 1e-3)
    fields = np.fft.ifft2(spectrum, axes=(1, 2)).real
    pixels = 0.5 + 0.2 * fields / fields.std((1, 2, 3), keepdims=True)
  return ((pixels - MEAN) / STD).astype(np.float32)


def inertia_of(points: np.ndarray, labels: np.ndarray) -> float:
  """Squared distances to the means of the clusters, in float64."""
  total = 0.0
  for label in np.unique(labels):
    own = points[labels == label].astype(np.float64)
    total += np.square(own - own.mean(0)).sum()
  return total


def make_contenders(
  images: np.ndarray,
) -> tuple[np.ndarray, dict[str, Callable]]:
  """Points [N, P, D], and () -> (labels, steps) of each image by contender."""
  encoder = make_resnet(variant='50')
  variables = jax.jit(encoder.init)(jax.random.key(0), images[:1])
  maps = jax.jit(lambda v, x: hypercolumn_maps(encoder, v, x))(
    variables, images
  )
  points = np.asarray(jax.jit(lambda x: hypercolumn(x, GRID))(maps))
  points = points.reshape(len(images), -1, points.shape[-1])
  keys = jax.random.split(jax.random.key(0), len(images))

  def theirs():
    fits = [
      KMeans(NUM_CLUSTERS, n_init=1, random_state=seed).fit(x)
      for seed, x in enumerate(points)
    ]
    return [fit.labels_ for fit in fits], [fit.n_iter_ for fit in fits]

  def ours(function, x, **options):
    def fit():
      result = function(x, keys, num_clusters=NUM_CLUSTERS, **options)
      return np.asarray(result.labels), np.asarray(result.num_steps)

    return fit

  return points, {
    THEIRS: theirs,
    'ours, from the maps': ours(kmeans_of_maps, maps, grid=GRID),
    'ours, from the points': ours(kmeans, points),
    'ours, k-means++ on the maps': ours(
      kmeans_of_maps, maps, grid=GRID, warm_start=False
    ),
  }


def measure(
  points: np.ndarray, contenders: dict[str, Callable], rounds: int
) -> list[dict]:
  """A row for each contender; all take turns."""
  seconds = {name: [] for name in contenders}
  found = {}
  for number in range(rounds + 1):
    for name, fit in contenders.items():
      if number == 0 and name == THEIRS:
        continue
      start = time.perf_counter()
      found[name] = fit()
      # The first round compiles.
      if number:
        seconds[name].append(time.perf_counter() - start)
  rows = {}
  for name in contenders:
    labels, steps = found[name]
    inertia = [inertia_of(x, own) for x, own in zip(points, labels)]
    rows[name] = {
      'k-means': name,
      'images_per_second': len(points) / min(seconds[name]),
      'inertia': float(np.mean(inertia)),
      'steps': [int(step) for step in steps],
      'seconds_of_rounds': seconds[name],
    }
  base = rows[THEIRS]
  for row in rows.values():
    row['speed_ratio'] = row['images_per_second'] / base['images_per_second']
    row['inertia_ratio'] = row['inertia'] / base['inertia']
  return list(rows.values())


def main() -> None:
  """Measures, prints and writes."""
  parser = record.make_parser(__doc__)
  parser.add_argument('--photographs')
  parser.add_argument('--images', type=int, default=6)
  parser.add_argument('--rounds', type=int, default=3)
  run = record.begin('kmeans', parser)
  images = make_images(run.options.photographs, run.options.images)
  points, contenders = make_contenders(images)
  record.finish(
    run,
    measure(points, contenders, run.options.rounds),
    points=list(points.shape[1:]),
    clusters=NUM_CLUSTERS,
    images=len(images),
    source='photographs' if run.options.photographs else '1/f noise',
  )


if __name__ == '__main__':
  record.run_main(main)
