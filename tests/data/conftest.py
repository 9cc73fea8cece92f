import os
import pathlib

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

_REPO = pathlib.Path(__file__).resolve().parents[2]
_SIZES = ((256, 341), (341, 256), (256, 256), (256, 384))


def _synthetic_photo(height, width, seed):
  """Smooth coloured noise, a few sharp edges and some grain."""
  rng = np.random.default_rng(seed)
  noise = rng.normal(size=(height, width, 3))
  photo = ndimage.gaussian_filter(noise, (12, 12, 0)) * 1200 + 120
  rows, columns = np.mgrid[:height, :width]
  for _ in range(4):
    centre = rng.uniform(0.2, 0.8, 2) * (height, width)
    radius = rng.uniform(15, 60)
    disc = np.hypot(rows - centre[0], columns - centre[1]) < radius
    photo[disc] += rng.uniform(-90, 90, 3)
  photo += rng.normal(size=photo.shape) * 4
  return np.clip(photo, 0, 255).astype(np.uint8)


@pytest.fixture(scope='session')
def photos():
  """Four colour photographs, [H, W, 3] uint8 of various shapes."""
  root = os.environ.get('CMD_JAX_PHOTOS_DIR', _REPO.parent / 'shared' / 'data')
  files = sorted(pathlib.Path(root, 'cub20').glob('*/*.jpg'))
  if not files:
    return [_synthetic_photo(*size, i) for i, size in enumerate(_SIZES)]
  chosen = [files[len(files) * i // 4] for i in range(4)]
  return [np.asarray(Image.open(file).convert('RGB')) for file in chosen]


@pytest.fixture(scope='session')
def canvases(photos):
  """The same squashed to 96 pixels, [4, 96, 96, 3] uint8."""
  resized = [Image.fromarray(photo).resize((96, 96)) for photo in photos]
  return np.stack([np.asarray(canvas) for canvas in resized])
