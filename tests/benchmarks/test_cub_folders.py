"""The folders of photographs made of CUB-200-2011."""

import csv

import numpy as np
import pytest
from PIL import Image

from benchmarks import cub_folders
from benchmarks.cub_folders import Folder
from cmd_jax.errors import UserError
from tests.tfds_builders import layouts
from tfds_builders.cub_200_2011.annotations import Annotation


def _annotation(box):
  return Annotation(0, True, box, np.zeros((15, 2)), np.ones(15, bool))


def _rows(path):
  with path.open(newline='') as file:
    return list(csv.DictReader(file))


def test_a_crop_shows_the_box_and_moves_the_parts():
  pixels = np.zeros((60, 80, 3), np.uint8)
  pixels[10:40, 20:60] = 200
  image = Image.fromarray(pixels)
  parts = np.array([[20.0, 10.0], [60.0, 40.0], [40.0, 25.0]])
  square, moved = cub_folders.crop(
    image, _annotation((19.6, 10.4, 40, 30)), parts
  )
  assert square.size == (227, 227)
  assert np.asarray(square).min() == 200
  np.testing.assert_allclose(moved, [[0, 0], [227, 227], [113.5, 113.5]])
  # What a box has beyond the image is not there.
  square, moved = cub_folders.crop(
    image, _annotation((20, 10, 900, 900)), parts
  )
  np.testing.assert_allclose(moved[2], [20 * 227 / 60, 15 * 227 / 50])


def test_a_photograph_is_shrunk_but_never_enlarged():
  parts = np.array([[100.0, 60.0]])
  smaller, moved = cub_folders.shrink(
    Image.new('RGB', (1000, 512)), None, parts
  )
  assert smaller.size == (500, 256)
  np.testing.assert_allclose(moved, [[50, 30]])
  same, moved = cub_folders.shrink(Image.new('RGB', (200, 100)), None, parts)
  assert same.size == (200, 100)
  np.testing.assert_allclose(moved, parts)


def test_a_folder_is_made_whole_or_not_at_all(tmp_path, capsys):
  cub = layouts.make_cub(tmp_path, masks=False)
  folder = Folder('birds', (1, 4), cub_folders.shrink)
  # The fixture has the official numbers 1 and 4 as its classes 1 and 2.
  with pytest.raises(UserError, match='lacks classes of birds'):
    cub_folders.make(folder, cub, tmp_path / 'out')
  folder = folder._replace(classes=(1, 2))
  name, _, _ = layouts.cub_names()[-1]
  photo = cub / 'images' / name
  data = photo.read_bytes()
  photo.write_bytes(data[:100])
  with pytest.raises(UserError, match='damaged'):
    cub_folders.make(folder, cub, tmp_path / 'out')
  assert not (tmp_path / 'out' / 'birds').exists()
  photo.write_bytes(data)
  cub_folders.make(folder, cub, tmp_path / 'out')
  labels = _rows(tmp_path / 'out' / 'birds' / 'labels.csv')
  assert [
    (x['file'], int(x['label']), x['split'] == 'train') for x in labels
  ] == [(name, c - 1, train) for name, c, train in layouts.cub_names()]
  # Part 1 of image 1 cannot be seen.
  parts = _rows(tmp_path / 'out' / 'birds' / 'parts.csv')
  first = [x for x in parts if x['file'] == labels[0]['file']]
  assert [int(x['part_id']) for x in first] == list(range(2, 16))
  assert (first[0]['x'], first[0]['y']) == ('3.0', '1.0')
  capsys.readouterr()
  cub_folders.make(folder, cub, tmp_path / 'out')
  assert 'left as it is' in capsys.readouterr().out


def test_the_classes_are_as_many_as_the_names_say():
  for folder, count in zip(cub_folders.FOLDERS, (100, 20), strict=True):
    assert len(set(folder.classes)) == count
    assert list(folder.classes) == sorted(folder.classes)
    assert 1 <= min(folder.classes) and max(folder.classes) <= 200
