"""An encoder that compiles nothing: embeddings are colours of a few places."""

import pathlib

import numpy as np
from PIL import Image

from cmd_jax.data import canvas, image_files

CANVAS_PX = 64


class StubEncoder:
  """Has of `cmd_jax.api.Encoder` what folders of images need."""

  source = 'a stub'

  def __init__(self, sha256='a' * 64, view_px=56):
    self.hash = sha256
    self.preprocessing = {'canvas_px': CANVAS_PX, 'view_px': view_px}
    self.encoded = 0

  def make_canvas(self, image):
    if isinstance(image, str | pathlib.Path):
      image = image_files.open_rgb(image)
    elif isinstance(image, np.ndarray):
      image = Image.fromarray(image)
    return canvas.make_canvas(image, CANVAS_PX), canvas.true_size(image)

  def embed_canvases(self, canvases, sizes):
    assert len(canvases) == len(sizes)
    self.encoded += len(canvases)
    # A mirrored image is encoded as the image itself.
    both = canvases.astype(np.float32) + canvases[:, :, ::-1]
    places = both.reshape(len(both), 4, 16, 4, 16, 3).mean((2, 4))
    return places[:, :, :2].reshape(len(both), -1) / 100

  def embed(self, image):
    canvases, size = self.make_canvas(image)
    return self.embed_canvases(canvases[None], np.int32([size]))


def draw_photograph(seed, side=96, colour=None):
  """Soft shapes with an edge or two; of a colour, if one is given."""
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 256, (6, 6, 3)).astype(np.uint8)
  image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
  pixels = np.array(image, np.float32)
  for _ in range(8):
    top, left = rng.integers(0, side - 12, 2)
    height, width = rng.integers(6, 24, 2)
    pixels[top : top + height, left : left + width] = rng.integers(0, 256, 3)
  if colour is not None:
    pixels = 0.3 * pixels + 0.7 * np.float32(colour)
  return Image.fromarray(pixels.astype(np.uint8))
