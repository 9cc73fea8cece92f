"""CUB-200-2011 as a TFDS builder that needs no TensorFlow."""

from __future__ import annotations

import functools
import io
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from cmd_jax.errors import UserError
from tfds_builders import manual, photos, repacked
from tfds_builders.cub_200_2011 import annotations as annotations_lib
from tfds_builders.cub_200_2011.annotations import PART_NAMES, Annotation

_DESCRIPTION = """
Photographs of 200 species of birds, with a box around the bird and the places
of 15 parts. `parts` are (y, x) as fractions of the height and width, in the
order back, beak, belly, breast, crown, forehead, left eye, left leg, left wing,
nape, right eye, right leg, right wing, tail, throat; `parts_visible` tells
which can be seen, and places of the others mean nothing. `segmentation_mask` is
a PNG image of one channel, brighter where more annotators saw the bird. What
the prepared files lack is None: masks without segmentations.tgz, and all but
image and label in re-packed layouts.
"""
_CITATION = """
@techreport{WahCUB_200_2011,
  title = {The {Caltech-UCSD Birds-200-2011} Dataset},
  author = {Wah, C. and Branson, S. and Welinder, P. and Perona, P. and
    Belongie, S.},
  year = {2011},
  institution = {California Institute of Technology},
  number = {CNS-TR-2011-001}
}
"""
_RECORD = 'https://data.caltech.edu/records'
IMAGES = manual.Original(
  'CUB_200_2011.tgz',
  1_150_585_339,
  '0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081',
  f'{_RECORD}/65de6-vp158',
  f'{_RECORD}/65de6-vp158/files/CUB_200_2011.tgz?download=1',
)
MASKS = manual.Original(
  'segmentations.tgz',
  39_272_883,
  'dc77f6cffea0cbe2e41d4201115c8f29a6320ecb04fffd2444f51b8066e4b84f',
  f'{_RECORD}/w9d68-gec53',
  f'{_RECORD}/w9d68-gec53/files/segmentations.tgz?download=1',
)
NUMBERS = {
  'images in train': 5_994,
  'images in test': 5_794,
  'classes': 200,
}
_ROOT = 'CUB_200_2011'
CLASS_NAMES = repacked.read_list(pathlib.Path(__file__).parent / 'classes.txt')

# Gives the encoded mask of an image of this name without its ending, if any.
_Masks = Callable[[str], bytes | None]

_logger = logging.getLogger(__name__)


class Builder(tfds.core.GeneratorBasedBuilder):
  """Builder of CUB-200-2011.

  Images are stored as the bytes they come as, but without EXIF data that would
  turn them. Boxes are clipped to the image.
  """

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First release.'}
  BUILDER_CONFIGS = [manual.WHOLE, manual.QUICKTEST]
  MANUAL_DOWNLOAD_INSTRUCTIONS = manual.list_originals((IMAGES, MASKS))
  ORIGINALS = (IMAGES, MASKS)

  def _info(self) -> tfds.core.DatasetInfo:
    n = len(PART_NAMES)
    tensor = functools.partial(tfds.features.Tensor, optional=True)
    return tfds.core.DatasetInfo(
      builder=self,
      description=_DESCRIPTION,
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(encoding_format='jpeg'),
          'label': tfds.features.ClassLabel(),
          'bbox': tensor(shape=(4,), dtype=np.float32),
          'parts': tensor(shape=(n, 2), dtype=np.float32),
          'parts_visible': tensor(shape=(n,), dtype=np.bool_),
          # Not an Image, because only tensors and scalars may be None.
          'segmentation_mask': tfds.features.Scalar(np.object_, optional=True),
          'file_name': tfds.features.Text(),
        }
      ),
      supervised_keys=('image', 'label'),
      homepage='https://www.vision.caltech.edu/datasets/cub_200_2011/',
      citation=_CITATION,
      license='For non-commercial research and education only.',
    )

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
    folder = manual.manual_folder(dl_manager)
    is_whole = self.builder_config.is_whole
    archive = folder.file('CUB_200_2011.tgz', 'CUB_200_2011.tar.gz')
    unpacked = folder.folder_with('images', 'images.txt')
    mask_archive = folder.file('segmentations.tgz', 'segmentations.tar.gz')
    if not (archive or unpacked):
      found = repacked.find(folder, CLASS_NAMES, is_whole=is_whole)
      if found:
        return self._repacked(found)
      raise manual.missing(folder.path, IMAGES)
    if is_whole and archive:
      manual.verify(archive, IMAGES)
    if is_whole and mask_archive:
      manual.verify(mask_archive, MASKS)
    # An archive comes first, because it can be verified.
    if archive:
      files = manual.Archive(archive, _ROOT)
    else:
      files = manual.Folder(unpacked)
    return self._originals(files, _masks(mask_archive, folder))

  def _originals(
    self, files: manual.Files, masks: _Masks | None
  ) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
    names, annotations = annotations_lib.read_annotations(files)
    by_split = {
      split: {
        name: annotation
        for name, annotation in annotations.items()
        if annotation.is_train == (split == 'train')
      }
      for split in ('train', 'test')
    }
    if self.builder_config.is_whole:
      counts = manual.count_images(by_split) | {'classes': len(names)}
      manual.check_counts('CUB-200-2011', counts, NUMBERS)
    self.info.features['label'].names = names
    return {
      split: self._generate_examples(files, split, images, masks)
      for split, images in by_split.items()
    }

  def _repacked(
    self, found: repacked.Listing
  ) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
    if self.builder_config.is_whole:
      counts = manual.count_images(found.labels)
      counts['classes'] = len(CLASS_NAMES)
      manual.check_counts('CUB-200-2011', counts, NUMBERS)
    self.info.features['label'].names = CLASS_NAMES
    return {
      split: _unannotated_examples(found.files, labels, f'{self.name} {split}')
      for split, labels in found.labels.items()
    }

  def _generate_examples(
    self,
    files: manual.Files,
    split: str,
    annotations: Mapping[str, Annotation],
    masks: _Masks | None,
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    names = [f'images/{name}' for name in annotations]
    lacking = []
    for photo in photos.read_photos(files, names, f'{self.name} {split}'):
      name = photo.name.removeprefix('images/')
      mask = None
      if masks:
        mask = _fitting_mask(masks(name.removesuffix('.jpg')), photo)
        lacking += [name] * (mask is None)
      yield name, _example(photo, name, annotations[name], mask)
    if lacking:
      _logger.warning(
        '%s %s: %d images have no mask of their size, the first is %s',
        self.name,
        split,
        len(lacking),
        lacking[0],
      )


def _example(
  photo: photos.Photo, name: str, annotation: Annotation, mask: bytes | None
) -> dict[str, Any]:
  left, top, width, height = annotation.box
  size = photo.height, photo.width
  return {
    'image': io.BytesIO(photo.data),
    'label': annotation.label,
    'bbox': photo.relative_box(left, top, left + width, top + height),
    'parts': np.clip(annotation.parts / size, 0, 1).astype(np.float32),
    'parts_visible': annotation.is_visible,
    'segmentation_mask': mask,
    'file_name': name,
  }


def _unannotated_examples(
  files: manual.Files, labels: Mapping[str, int], where: str
) -> Iterator[tuple[str, dict[str, Any]]]:
  for photo in photos.read_photos(files, labels, where):
    yield (
      photo.name,
      {
        'image': io.BytesIO(photo.data),
        'label': labels[photo.name],
        'bbox': None,
        'parts': None,
        'parts_visible': None,
        'segmentation_mask': None,
        'file_name': photo.name,
      },
    )


def _masks(
  archive: pathlib.Path | None, folder: manual.ManualFolder
) -> _Masks | None:
  if archive:
    masks = {
      name.removeprefix('segmentations/').removesuffix('.png'): data
      for name, data in manual.Archive(archive).read_below(
        'segmentations', '.png'
      )
    }
    return masks.get
  for path in folder.entries:
    if path.name == 'segmentations':
      files = manual.Folder(path)
      return lambda stem: dict(files.read([f'{stem}.png'])).get(f'{stem}.png')
  return None


def _fitting_mask(data: bytes | None, photo: photos.Photo) -> bytes | None:
  """The mask as a PNG image of one channel; None if it has another size.

  Raises:
    UserError: it is damaged.
  """
  if data is None:
    return None
  try:
    mask = Image.open(io.BytesIO(data), formats=photos.FORMATS)
    mask.load()
  except (OSError, SyntaxError, ValueError) as e:
    raise UserError(
      f'the mask of {photo.name} is damaged ({manual.one_line(e)}); fetch '
      f'{MASKS.name} again'
    ) from e
  if (mask.height, mask.width) != (photo.height, photo.width):
    return None
  if mask.mode == 'L' and mask.format == 'PNG':
    return data
  file = io.BytesIO()
  mask.convert('L').save(file, 'PNG')
  return file.getvalue()
