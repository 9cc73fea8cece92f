"""What toybirds gives away without learning: nearest neighbours of pixels.

  python benchmarks/toybirds_baselines.py

Prints the top-1 accuracy in per cent of one nearest neighbour (test against
train, 64 px) on raw pixels and on colour histograms, as JSON.
"""

import json

import numpy as np

from cmd_jax.data.canvas import make_canvases
from cmd_jax.data.tfds_source import tfds_source


def histogram(images: np.ndarray, bins: int) -> np.ndarray:
  """Square roots of joint RGB histograms, [N, bins ** 3]."""
  index = images.astype(np.int64) * bins // 256
  index = (index[..., 0] * bins + index[..., 1]) * bins + index[..., 2]
  counts = [np.bincount(i.ravel(), minlength=bins**3) for i in index]
  return np.sqrt(np.array(counts, np.float32))


def accuracy(train, test, train_labels, test_labels) -> dict[str, float]:
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
  """Measures and prints."""
  train, test = (
    make_canvases(tfds_source('toybirds', split), canvas_px=64)
    for split in ('train', 'test')
  )
  transforms = {
    'RGB pixels': lambda x: x,
    'grey pixels': lambda x: x.mean(-1),
    'RGB histogram, 4 bins a channel': lambda x: histogram(x, 4),
  }
  result = {
    name: accuracy(f(train.images), f(test.images), train.labels, test.labels)
    for name, f in transforms.items()
  }
  result['chance'] = round(100 / len(train.class_names), 1)
  print(json.dumps(result, indent=2))


if __name__ == '__main__':
  main()
