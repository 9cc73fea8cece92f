"""What toybirds gives away without learning: nearest neighbours of pixels.

  python -m benchmarks.toybirds_baselines

The top-1 accuracy in per cent of one nearest neighbour (test against train,
64 px) on raw pixels and on colour histograms.
"""

from __future__ import annotations

import numpy as np

from benchmarks import record
from cmd_jax.data.canvas import make_canvases
from cmd_jax.data.sources.tfds_source import tfds_source


def histogram(images: np.ndarray, bins: int) -> np.ndarray:
  """Square roots of joint RGB histograms, [N, bins ** 3]."""
  index = images.astype(np.int64) * bins // 256
  index = (index[..., 0] * bins + index[..., 1]) * bins + index[..., 2]
  counts = [np.bincount(i.ravel(), minlength=bins**3) for i in index]
  return np.sqrt(np.array(counts, np.float32))


def accuracy(
  train: np.ndarray,
  test: np.ndarray,
  train_labels: np.ndarray,
  test_labels: np.ndarray,
) -> dict[str, float]:
  """Per cent of test rows whose nearest train row has their label."""

  def rows(x):
    return x.reshape(len(x), -1).astype(np.float32)

  train, test = rows(train), rows(test)
  dots = test @ train.T
  squared = np.sum(train**2, axis=1)
  result = {}
  for name, score in (
    ('euclidean', 2 * dots - squared),
    ('cosine', dots / np.sqrt(squared)),
  ):
    right = train_labels[score.argmax(1)] == test_labels
    result[name] = round(100 * float(right.mean()), 1)
  return result


def main() -> None:
  """Measures, prints and writes."""
  run = record.begin('toybirds_baselines', record.make_parser(__doc__))
  train, test = (
    make_canvases(tfds_source('toybirds', split), canvas_px=64)
    for split in ('train', 'test')
  )
  transforms = {
    'RGB pixels': lambda x: x,
    'grey pixels': lambda x: x.mean(-1),
    'RGB histogram, 4 bins a channel': lambda x: histogram(x, 4),
  }
  rows = [
    {
      'features': name,
      **accuracy(f(train.images), f(test.images), train.labels, test.labels),
    }
    for name, f in transforms.items()
  ]
  record.finish(run, rows, chance=100 / len(train.class_names))


if __name__ == '__main__':
  record.run_main(main)
