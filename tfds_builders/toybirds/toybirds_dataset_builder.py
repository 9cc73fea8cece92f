"""Toybirds as a TFDS builder; draws its images, needs no network."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from tfds_builders.toybirds import render
from tfds_builders.toybirds.species import SPECIES

_DESCRIPTION = """
Drawn birds of 24 species that differ only in small parts: the colour of the
crown, the shape and colour of the beak, the wing bars, the band across the tail
and the spots of the breast. The species nearest to any species differ from it
in one or two of these. Pose, scale, position, plumage, light, background and
twigs in front of the bird vary freely and say nothing of the species. Every
image comes with its bird's box and with the part that every pixel shows.
"""

TRAIN_EXAMPLES = 2400
VALIDATION_EXAMPLES = 480
TEST_EXAMPLES = 960
_SEED = 2401_08860
_SPLITS = ('train', 'validation', 'test')


def draw_example(split: str, index: int, px: int) -> tuple[render.Drawing, int]:
  """Draws one example of the set without drawing any other.

  Args:
    split: 'train', 'validation' or 'test'.
    index: number of the example within the split.
    px: side of the image, pixels.

  Returns:
    The drawing and its label, an index into `species.SPECIES`.
  """
  rng = np.random.default_rng([_SEED, _SPLITS.index(split), index])
  label = index % len(SPECIES)
  return render.draw_bird(label, rng, px), label


@dataclasses.dataclass
class ToybirdsConfig(tfds.core.BuilderConfig):
  """One size of the set.

  Attributes:
    px: side of the images, pixels.
    train_examples: number of training examples.
    validation_examples: number of examples to choose settings by.
    test_examples: number of test examples.
  """

  px: int = 64
  train_examples: int = TRAIN_EXAMPLES
  validation_examples: int = VALIDATION_EXAMPLES
  test_examples: int = TEST_EXAMPLES


class Builder(tfds.core.GeneratorBasedBuilder):
  """Builder of Toybirds."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First release.'}
  DEFAULT_BUILDER_CONFIG_NAME = '64px'
  BUILDER_CONFIGS = [
    *(
      ToybirdsConfig(
        name=f'{px}px', description=f'Images of {px} x {px} pixels.', px=px
      )
      for px in (32, 48, 64, 96, 128, 224)
    ),
    ToybirdsConfig(
      name='quicktest',
      description='A few images of 32 x 32 pixels, to try a program with.',
      px=32,
      train_examples=96,
      validation_examples=24,
      test_examples=48,
    ),
  ]

  def _info(self) -> tfds.core.DatasetInfo:
    px = self.builder_config.px
    return tfds.core.DatasetInfo(
      builder=self,
      description=_DESCRIPTION,
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(
            shape=(px, px, 3), encoding_format='png'
          ),
          'label': tfds.features.ClassLabel(names=[s.name for s in SPECIES]),
          'part_ids': tfds.features.Image(
            shape=(px, px, 1), encoding_format='png'
          ),
          'bbox': tfds.features.BBoxFeature(),
          'file_name': tfds.features.Text(),
        }
      ),
      supervised_keys=('image', 'label'),
      license='Apache-2.0',
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    config = self.builder_config
    return {
      split: self._generate_examples(
        split, getattr(config, f'{split}_examples')
      )
      for split in _SPLITS
    }

  def _generate_examples(
    self, split: str, n: int
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    for index in range(n):
      drawing, label = draw_example(split, index, self.builder_config.px)
      name = f'{split}_{index:05d}.png'
      # TFDS writes the examples in the order of a hash of this key.
      yield (
        name,
        {
          'image': _png(drawing.image),
          'label': label,
          'part_ids': _png(drawing.part_ids),
          'bbox': tfds.features.BBox(*drawing.box.tolist()),
          'file_name': name,
        },
      )


def _png(pixels: np.ndarray) -> io.BytesIO:
  """Encodes here, because TFDS would need TensorFlow to encode an array."""
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, 'PNG', compress_level=1)
  file.seek(0)
  return file
