"""FGVC-Aircraft as a TFDS builder that needs no TensorFlow."""

from __future__ import annotations

import dataclasses
import io
import logging
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from cmd_jax.errors import UserError
from tfds_builders import manual, photos, repacked
from tfds_builders.fgvc_aircraft.banner import BANNER_PX, cut_banner

_DESCRIPTION = """
Photographs of 100 variants of aircraft, of 70 families and 30 manufacturers;
`label` is the variant. The banner of 20 pixels with the photographer's name is
cut off, without encoding the photographs anew.
"""
_CITATION = """
@techreport{maji13fine-grained,
  title = {Fine-Grained Visual Classification of Aircraft},
  author = {Maji, S. and Kannala, J. and Rahtu, E. and Blaschko, M. and
    Vedaldi, A.},
  year = {2013},
  archivePrefix = {arXiv},
  eprint = {1306.5151}
}
"""
_HOME = 'https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft'
# No checksum of it is published where it can be relied on; the lists within
# and their counts are checked instead, and gzip's own checksum.
ARCHIVE = manual.Original(
  'fgvc-aircraft-2013b.tar.gz',
  0,
  '',
  f'{_HOME} (2.75 GB)',
  f'{_HOME}/archives/fgvc-aircraft-2013b.tar.gz',
)
SPLITS = ('train', 'val', 'trainval', 'test')
NUMBERS = {
  'images in train': 3_334,
  'images in val': 3_333,
  'images in trainval': 6_667,
  'images in test': 3_333,
  'variants': 100,
  'families': 70,
  'manufacturers': 30,
}
LEVELS = {
  'variant': 'variants.txt',
  'family': 'families.txt',
  'manufacturer': 'manufacturers.txt',
}
_ROOT = 'fgvc-aircraft-2013b/data'
_BOXES = 'images_box.txt'

# Variant, family and manufacturer, in the order of the variants' labels.
TAXONOMY = tuple(
  tuple(line.split('\t'))
  for line in repacked.read_list(pathlib.Path(__file__).parent / 'variants.txt')
)

_logger = logging.getLogger(__name__)


@dataclasses.dataclass
class AircraftConfig(manual.ManualConfig):
  """What is expected of the files.

  Attributes:
    banner_px: rows to cut off the bottom.
  """

  banner_px: int = BANNER_PX


class _Names(NamedTuple):
  """Names of the classes of every level, in the order of their labels."""

  variant: tuple[str, ...]
  family: tuple[str, ...]
  manufacturer: tuple[str, ...]


class _Labels(NamedTuple):
  """Labels of an image, and its box (left, top, right, bottom) in pixels."""

  variant: int
  family: int
  manufacturer: int
  box: tuple[float, float, float, float] | None


class Builder(tfds.core.GeneratorBasedBuilder):
  """Builder of FGVC-Aircraft.

  The banner is cut off by `banner.cut_banner`, which keeps JPEG data as they
  are. In re-packed layouts the banner is taken to be there still; the config
  `no_banner` is for those where it is not.
  """

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First release.'}
  BUILDER_CONFIGS = [
    AircraftConfig(**dataclasses.asdict(manual.WHOLE)),
    AircraftConfig(
      name='no_banner',
      description='The published set, from files without their banners.',
      banner_px=0,
    ),
    AircraftConfig(**dataclasses.asdict(manual.QUICKTEST)),
  ]
  MANUAL_DOWNLOAD_INSTRUCTIONS = manual.list_originals((ARCHIVE,))
  ORIGINALS = (ARCHIVE,)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=_DESCRIPTION,
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(encoding_format='jpeg'),
          'label': tfds.features.ClassLabel(),
          'family': tfds.features.ClassLabel(),
          'manufacturer': tfds.features.ClassLabel(),
          'bbox': tfds.features.Tensor(
            shape=(4,), dtype=np.float32, optional=True
          ),
          'file_name': tfds.features.Text(),
        }
      ),
      supervised_keys=('image', 'label'),
      homepage=f'{_HOME}/',
      citation=_CITATION,
      license='For non-commercial research only.',
    )

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
    folder = manual.manual_folder(dl_manager)
    is_whole = self.builder_config.is_whole
    archive = folder.file(ARCHIVE.name, 'fgvc-aircraft-2013b.tgz')
    unpacked = folder.folder_with('images', LEVELS['variant'])
    if archive or unpacked:
      if archive:
        files = manual.Archive(archive, _ROOT)
      else:
        files = manual.Folder(unpacked)
      prefix = 'images/'
      names, splits = _read_lists(files)
    else:
      found = repacked.find(
        folder,
        [variant for variant, _, _ in TAXONOMY],
        splits=repacked.TRAIN_VAL_TEST,
        is_whole=is_whole,
      )
      if not found:
        raise manual.missing(folder.path, ARCHIVE)
      files, prefix = found.files, ''
      names, splits = _label_repacked(found.labels)
    if is_whole:
      _check_counts(names, splits)
    features = self.info.features
    features['label'].names = names.variant
    features['family'].names = names.family
    features['manufacturer'].names = names.manufacturer
    return {
      split: self._generate_examples(files, prefix, split, labels)
      for split, labels in splits.items()
    }

  def _generate_examples(
    self,
    files: manual.Files,
    prefix: str,
    split: str,
    labels: Mapping[str, _Labels],
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    px = self.builder_config.banner_px
    for photo in photos.read_photos(
      files,
      [f'{prefix}{name}' for name in labels],
      f'{self.name} {split}',
      change=(lambda data: cut_banner(data, px)) if px else None,
    ):
      name = photo.name.removeprefix(prefix)
      known = labels[name]
      yield (
        name,
        {
          'image': io.BytesIO(photo.data),
          'label': known.variant,
          'family': known.family,
          'manufacturer': known.manufacturer,
          'bbox': photo.relative_box(*known.box) if known.box else None,
          'file_name': name,
        },
      )


def _check_counts(
  names: _Names, splits: Mapping[str, Mapping[str, _Labels]]
) -> None:
  counts = manual.count_images(splits)
  counts['variants'] = len(names.variant)
  counts['families'] = len(names.family)
  counts['manufacturers'] = len(names.manufacturer)
  expected = dict(NUMBERS)
  if 'train' not in splits:
    # Mirrors without a folder for validation have only trainval and test.
    del expected['images in train'], expected['images in val']
  manual.check_counts('FGVC-Aircraft', counts, expected)


def _read_lists(
  files: manual.Files,
) -> tuple[_Names, dict[str, dict[str, _Labels]]]:
  """Reads the lists of the archive, that of the boxes if it is there.

  Raises:
    UserError: a list is missing, damaged, or does not fit another.
  """
  by_split = {
    (level, split): f'images_{level}_{split}.txt'
    for level in LEVELS
    for split in SPLITS
  }
  texts = manual.read_texts(files, [*LEVELS.values(), *by_split.values()])
  names = _Names(
    *(
      tuple(line.strip() for line in texts[file].splitlines() if line.strip())
      for file in LEVELS.values()
    )
  )
  splits = {}
  file = _BOXES
  try:
    boxes = _read_boxes(files)
    for split in SPLITS:
      levels = []
      for level, class_names in zip(LEVELS, names):
        file = by_split[level, split]
        rows = manual.table(texts[file], 2, f'{files}: {file}')
        levels.append({i: class_names.index(name) for i, name in rows})
      splits[split] = {
        f'{i}.jpg': _Labels(*(of[i] for of in levels), boxes.get(i))
        for i in levels[0]
      }
  except (KeyError, ValueError) as e:
    raise UserError(
      f'{files}: {file} does not fit the other lists ({manual.one_line(e)}); '
      'unpack the archive again'
    ) from e
  without = {
    name
    for images in splits.values()
    for name, labels in images.items()
    if labels.box is None
  }
  if boxes and without:
    # Readers want a box with every image or with none.
    _logger.warning(
      '%s: %s lacks %d images, the first is %s; boxes are left out',
      files,
      _BOXES,
      len(without),
      min(without),
    )
    splits = {
      split: {name: labels._replace(box=None) for name, labels in of.items()}
      for split, of in splits.items()
    }
  return names, splits


def _read_boxes(
  files: manual.Files,
) -> dict[str, tuple[float, float, float, float]]:
  content = dict(files.read([_BOXES])).get(_BOXES, b'')
  boxes = {}
  for i, *edges in manual.table(content.decode(), 5, f'{files}: {_BOXES}'):
    left, top, right, bottom = map(float, edges)
    if not np.isfinite([left, top, right, bottom]).all():
      raise ValueError(f'the box of {i} is not finite')
    # The first pixel is (1, 1), and the last belongs to the box.
    boxes[i] = left - 1, top - 1, right, bottom
  return boxes


def _label_repacked(
  labels: Mapping[str, Mapping[str, int]],
) -> tuple[_Names, dict[str, dict[str, _Labels]]]:
  """Adds families and manufacturers, and `trainval` where it is not given.

  A mirror without `val` calls `train` what is `trainval`.
  """
  names = _Names(
    tuple(variant for variant, _, _ in TAXONOMY),
    *(tuple(sorted({row[level] for row in TAXONOMY})) for level in (1, 2)),
  )

  def complete(variant: int) -> _Labels:
    _, family, manufacturer = TAXONOMY[variant]
    return _Labels(
      variant,
      names.family.index(family),
      names.manufacturer.index(manufacturer),
      None,
    )

  splits = {
    split: {name: complete(variant) for name, variant in images.items()}
    for split, images in labels.items()
  }
  if 'trainval' not in splits:
    train = splits['train'] if 'val' in splits else splits.pop('train')
    splits['trainval'] = train | splits.get('val', {})
  return names, splits
