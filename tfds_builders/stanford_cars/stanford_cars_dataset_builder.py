"""Stanford Cars as a TFDS builder that needs no TensorFlow."""

from __future__ import annotations

import io
import pathlib
import posixpath
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from cmd_jax.errors import UserError
from tfds_builders import manual, photos, repacked
from tfds_builders.stanford_cars import annotations as annotations_lib
from tfds_builders.stanford_cars.annotations import Annotation

_DESCRIPTION = """
Photographs of 196 models of cars, most told apart by make, model and year, with
a box around the car. Boxes are None in re-packed layouts without a table of
them.
"""
_CITATION = """
@inproceedings{krause20133d,
  title = {3D Object Representations for Fine-Grained Categorization},
  author = {Krause, Jonathan and Stark, Michael and Deng, Jia and Fei-Fei, Li},
  booktitle = {4th International IEEE Workshop on 3D Representation and
    Recognition (3dRR-13)},
  year = {2013}
}
"""
# The authors' pages are gone since 2023.
_MIRRORS = 'web.archive.org and Kaggle (docs/datasets.md)'
IMAGES = {
  'train': manual.Original(
    'cars_train.tgz',
    979_269_282,
    '512b227b30e2f0a8aab9e09485786ab4479582073a144998da74d64b801fd288',
    _MIRRORS,
  ),
  'test': manual.Original(
    'cars_test.tgz',
    977_350_468,
    'bffea656d6f425cba3c91c6d83336e4c5f86c6cffd8975b0f375d3a10da8e243',
    _MIRRORS,
  ),
}
DEVKIT = manual.Original(
  'car_devkit.tgz',
  330_960,
  'b97deb463af7d58b6bfaa18b2a4de9829f0f79e8ce663dfa9261bf7810e9accd',
  _MIRRORS,
)
TEST_LABELS = manual.Original(
  'cars_test_annos_withlabels.mat',
  185_758,
  '790f75be8ea34eeded134cc559332baf23e30e91367e9ddca97d26ed9b895f05',
  _MIRRORS,
)
NUMBERS = {
  'images in train': 8_144,
  'images in test': 8_041,
  'classes': 196,
}
_TRAIN_LABELS = 'cars_train_annos.mat'
_META = 'cars_meta.mat'
_BOTH_LABELS = 'cars_annos.mat'
_FOLDERS = {
  split: (*names, f'cars_{split}')
  for split, names in repacked.TRAIN_TEST.items()
}
CLASS_NAMES = repacked.read_list(pathlib.Path(__file__).parent / 'classes.txt')


class _Split(NamedTuple):
  """Annotations by the names under which `files` has the images."""

  files: manual.Files
  annotations: Mapping[str, Annotation]


class Builder(tfds.core.GeneratorBasedBuilder):
  """Builder of Stanford Cars.

  Images are stored as the bytes they come as, but without EXIF data that would
  turn them. Boxes are clipped to the image.
  """

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First release.'}
  BUILDER_CONFIGS = [manual.WHOLE, manual.QUICKTEST]
  MANUAL_DOWNLOAD_INSTRUCTIONS = manual.list_originals(
    (*IMAGES.values(), DEVKIT, TEST_LABELS)
  )

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=_DESCRIPTION,
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(encoding_format='jpeg'),
          'label': tfds.features.ClassLabel(),
          'bbox': tfds.features.Tensor(
            shape=(4,), dtype=np.float32, optional=True
          ),
          'file_name': tfds.features.Text(),
        }
      ),
      supervised_keys=('image', 'label'),
      homepage='https://ai.stanford.edu/~jkrause/cars/car_dataset.html',
      citation=_CITATION,
      license='For non-commercial research only.',
    )

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Iterator[tuple[str, dict[str, Any]]]]:
    folder = manual.manual_folder(dl_manager)
    is_whole = self.builder_config.is_whole
    found = (
      _find_originals(folder, is_whole)
      or _find_joint(folder)
      or _find_repacked(folder, is_whole)
    )
    if not found:
      raise manual.missing(folder.path, *IMAGES.values(), DEVKIT, TEST_LABELS)
    names, splits = found
    if is_whole:
      counts = manual.count_images(
        {name: split.annotations for name, split in splits.items()}
      )
      counts['classes'] = len(names)
      manual.check_counts('Stanford Cars', counts, NUMBERS)
    self.info.features['label'].names = names
    return {
      name: self._generate_examples(name, split)
      for name, split in splits.items()
    }

  def _generate_examples(
    self, name: str, split: _Split
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    where = f'{self.name} {name}'
    for photo in photos.read_photos(split.files, split.annotations, where):
      label, box = split.annotations[photo.name]
      yield (
        photo.name,
        {
          'image': io.BytesIO(photo.data),
          'label': label,
          'bbox': photo.relative_box(*box) if box else None,
          'file_name': photo.name,
        },
      )


_Found = tuple[tuple[str, ...], dict[str, _Split]]


def _check_labels(
  names: tuple[str, ...], splits: Mapping[str, _Split], where: str
) -> None:
  for split in splits.values():
    for file_name, (label, _) in split.annotations.items():
      if not 0 <= label < len(names):
        raise UserError(
          f'{where}: {file_name} is of class {label + 1}, but there are '
          f'{len(names)}; fetch the lists again'
        )


def _images(
  folder: manual.ManualFolder, split: str, is_whole: bool
) -> manual.Files | None:
  original = IMAGES[split]
  if archive := folder.file(original.name, f'cars_{split}.tar.gz'):
    if is_whole:
      manual.verify(archive, original)
    return manual.Archive(archive)
  unpacked = folder.image_folder(f'cars_{split}')
  return manual.Folder(unpacked.parent) if unpacked else None


def _read_devkit(
  folder: manual.ManualFolder, is_whole: bool
) -> dict[str, bytes]:
  """Reads the lists of the training images and of the classes, where found."""
  if archive := folder.file(DEVKIT.name, 'car_devkit.tar.gz'):
    if is_whole:
      manual.verify(archive, DEVKIT)
    return dict(manual.Archive(archive, 'devkit').read((_TRAIN_LABELS, _META)))
  paths = {name: folder.file(name) for name in (_TRAIN_LABELS, _META)}
  return {name: path.read_bytes() for name, path in paths.items() if path}


def _find_originals(
  folder: manual.ManualFolder, is_whole: bool
) -> _Found | None:
  """The files as published, in archives or unpacked.

  Raises:
    UserError: some of them are there but not all.
  """
  files = {split: _images(folder, split, is_whole) for split in IMAGES}
  if not any(files.values()):
    return None
  devkit = _read_devkit(folder, is_whole)
  # Browsers put a number behind the name of a file fetched twice.
  test_labels = folder.file(TEST_LABELS.name, 'cars_test_annos_withlabels*.mat')
  lacking = [IMAGES[split] for split in IMAGES if files[split] is None]
  lacking += [DEVKIT] * (len(devkit) < 2)
  lacking += [TEST_LABELS] * (test_labels is None)
  if lacking:
    raise manual.missing(folder.path, *lacking)
  if is_whole and test_labels.name == TEST_LABELS.name:
    manual.verify(test_labels, TEST_LABELS)
  names = annotations_lib.read_class_names(devkit[_META], _META)
  lists = {
    'train': (devkit[_TRAIN_LABELS], _TRAIN_LABELS),
    'test': (test_labels.read_bytes(), str(test_labels)),
  }
  splits = {
    split: _Split(
      files[split],
      {
        f'cars_{split}/{name}': annotation
        for name, annotation in annotations_lib.read_split(*content).items()
      },
    )
    for split, content in lists.items()
  }
  _check_labels(names, splits, str(folder.path))
  return names, splits


def _find_joint(folder: manual.ManualFolder) -> _Found | None:
  """The other published form: all images in car_ims, listed in one file."""
  path = folder.file(_BOTH_LABELS)
  archive = folder.file('car_ims.tgz', 'car_ims.tar.gz')
  unpacked = folder.image_folder('car_ims')
  if not path or not (archive or unpacked):
    return None
  if archive:
    files = manual.Archive(archive)
  else:
    files = manual.Folder(unpacked.parent)
  data = path.read_bytes()
  names = annotations_lib.read_class_names(data, str(path))
  splits = {
    split: _Split(files, annotations)
    for split, annotations in annotations_lib.read_both_splits(
      data, str(path)
    ).items()
  }
  _check_labels(names, splits, str(path))
  return names, splits


def _find_repacked(
  folder: manual.ManualFolder, is_whole: bool
) -> _Found | None:
  """Class folders or Parquet files, with boxes if there are tables of them."""
  listing = repacked.find(
    folder, CLASS_NAMES, splits=_FOLDERS, is_whole=is_whole
  )
  if not listing:
    return None
  splits = {}
  for split, labels in listing.labels.items():
    table = folder.file(f'anno_{split}.csv')
    boxes = annotations_lib.read_csv_boxes(table) if table else {}
    annotations = {
      name: Annotation(label, boxes.get(posixpath.basename(name)))
      for name, label in labels.items()
    }
    without = [name for name, a in annotations.items() if a.box is None]
    if table and without:
      raise UserError(
        f'{table} lacks {len(without)} of {len(labels)} images, the first is '
        f'{without[0]}; fetch it again or take it away'
      )
    splits[split] = _Split(listing.files, annotations)
  return CLASS_NAMES, splits
