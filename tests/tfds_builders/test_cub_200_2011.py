import io
import logging

import numpy as np
import pytest
from PIL import Image

from tests.tfds_builders import layouts
from tests.tfds_builders.preparing import examples, prepare, refusal
from tfds_builders.cub_200_2011 import cub_200_2011_dataset_builder as cub

PREFIX = 'CUB_200_2011/images/'


@pytest.fixture(scope='module')
def unpacked(tmp_path_factory):
  folder = tmp_path_factory.mktemp('cub')
  layouts.make_cub(folder)
  return folder


def _pack(unpacked, folder):
  folder.mkdir()
  for name, source in (
    ('CUB_200_2011.tgz', 'CUB_200_2011'),
    ('segmentations.tgz', 'segmentations'),
  ):
    layouts.tgz(folder / name, unpacked / source)


@pytest.mark.parametrize('layout', ['folder', 'archive', 'the folder itself'])
def test_lists_and_images_arrive_unchanged(unpacked, tmp_path, layout):
  manual_dir = unpacked
  if layout == 'archive':
    manual_dir = tmp_path / 'manual'
    _pack(unpacked, manual_dir)
  elif layout == 'the folder itself':
    manual_dir = unpacked / 'CUB_200_2011'
  builder = prepare(cub.Builder, manual_dir, tmp_path / 'data')
  assert tuple(builder.info.features['label'].names) == layouts.CUB_CLASSES
  both = {split: examples(builder, split) for split in ('train', 'test')}
  ids = {}
  for i, (name, class_id, is_train) in enumerate(layouts.cub_names(), 1):
    record = both['train' if is_train else 'test'].pop(name)
    ids[name] = i
    path = unpacked / PREFIX / name
    assert record['image'] == path.read_bytes()
    assert record['label'] == class_id - 1
    # The images have 40 x 60 pixels, and the boxes reach beyond them.
    np.testing.assert_allclose(
      record['bbox'], [(2 * i + 0.5) / 40, i / 60, 1, (i + 30) / 60], rtol=1e-6
    )
    for part in range(1, 16):
      assert record['parts_visible'][part - 1] == (part != i)
      expected = (i / 40, (i + part) / 60) if part != i else (0, 0)
      np.testing.assert_allclose(record['parts'][part - 1], expected, rtol=1e-6)
    mask = record['segmentation_mask']
    if layout == 'the folder itself':
      assert mask is None
      continue
    mask = Image.open(io.BytesIO(mask))
    assert mask.mode == 'L' and mask.size == (60, 40)
    assert np.asarray(mask)[29, 29] == 51 * (i % 5)
    assert np.asarray(mask)[0, 0] == 0
  assert both == {'train': {}, 'test': {}}


@pytest.mark.parametrize('layout', ['folders', 'parquet'])
def test_repacked_layouts_have_images_and_labels(unpacked, tmp_path, layout):
  manual_dir = tmp_path / 'manual'
  data = {'train': [], 'test': []}
  for name, class_id, is_train in layouts.cub_names():
    split = 'train' if is_train else 'test'
    content = (unpacked / PREFIX / name).read_bytes()
    data[split].append((content, class_id - 1))
    if layout == 'folders':
      # A mirror that calls the test split `val` and drops the numbers.
      folder = {'train': 'train', 'test': 'val'}[split]
      layouts.write(manual_dir / 'birds' / folder / name[4:], content)
  if layout == 'parquet':
    layouts.make_parquet(manual_dir, data, layouts.CUB_CLASSES)
  builder = prepare(cub.Builder, manual_dir, tmp_path / 'data')
  names = builder.info.features['label'].names
  assert len(names) == 200
  for split, expected in data.items():
    found = [
      (record['image'], names[record['label']])
      for record in examples(builder, split).values()
    ]
    assert sorted(found) == sorted(
      (content, layouts.CUB_CLASSES[label]) for content, label in expected
    )
  record = next(iter(examples(builder, 'train').values()))
  for name in ('bbox', 'parts', 'parts_visible', 'segmentation_mask'):
    assert record[name] is None


def test_a_folder_of_another_size_is_refused_with_both_numbers(
  unpacked, tmp_path
):
  text = refusal(cub.Builder, unpacked, tmp_path)
  assert '4 images in train, not 5,994' in text
  assert '4 images in test, not 5,794' in text
  assert not list(tmp_path.rglob('*.array_record*'))


def test_another_archive_is_refused_with_both_sizes(unpacked, tmp_path):
  _pack(unpacked, tmp_path / 'manual')
  archive = tmp_path / 'manual' / 'CUB_200_2011.tgz'
  text = refusal(cub.Builder, tmp_path / 'manual', tmp_path / 'data')
  assert f'{archive.stat().st_size:,} bytes' in text
  assert '1,150,585,339' in text and 'data.caltech.edu' in text
  archive.unlink()
  layouts.make_cub(tmp_path / 'manual', masks=False)
  text = refusal(cub.Builder, tmp_path / 'manual', tmp_path / 'data')
  assert 'segmentations.tgz has' in text and '39,272,883' in text


def test_missing_files_are_named_with_size_and_place(unpacked, tmp_path):
  manual_dir = tmp_path / 'manual'
  layouts.write(manual_dir / 'readme.txt', 'nothing here')
  text = refusal(cub.Builder, manual_dir, tmp_path / 'data')
  for words in (
    str(manual_dir),
    'CUB_200_2011.tgz',
    '1,150,585,339 bytes',
    'data.caltech.edu',
    '--manual_dir',
  ):
    assert words in text
  # It would take a gigabyte that was not asked for.
  assert 'downloaded' not in text


def test_damaged_files_are_named_and_not_dropped(tmp_path):
  base = layouts.make_cub(tmp_path / 'manual')
  names = [name for name, _, is_train in layouts.cub_names() if is_train]
  (base / 'images' / names[0]).unlink()
  whole = (base / 'images' / names[1]).read_bytes()
  (base / 'images' / names[1]).write_bytes(whole[: len(whole) // 2])
  (base / 'images' / names[2]).write_bytes(b'')
  text = refusal(
    cub.Builder, tmp_path / 'manual', tmp_path / 'data', config='quicktest'
  )
  assert f'1 of 4 images are missing: images/{names[0]}' in text
  assert '2 of 4 images are damaged' in text
  assert names[1] in text and names[2] in text and 'truncated' in text
  assert not list((tmp_path / 'data').rglob('*.array_record*'))


def test_lists_that_do_not_fit_are_refused(tmp_path):
  base = layouts.make_cub(tmp_path / 'manual')
  split = base / 'train_test_split.txt'
  lines = split.read_text().splitlines()
  split.write_text('\n'.join(lines[:-1]))
  text = refusal(
    cub.Builder, tmp_path / 'manual', tmp_path / 'data', config='quicktest'
  )
  assert 'train_test_split.txt' in text and 'do not fit' in text
  split.write_text('\n'.join([*lines[:-1], '8']))
  text = refusal(
    cub.Builder, tmp_path / 'manual', tmp_path / 'data', config='quicktest'
  )
  assert 'train_test_split.txt, line 8' in text
  split.unlink()
  text = refusal(
    cub.Builder, tmp_path / 'manual', tmp_path / 'data', config='quicktest'
  )
  assert 'lacks train_test_split.txt' in text


def test_masks_of_another_size_are_left_out_aloud(tmp_path, caplog):
  layouts.make_cub(tmp_path / 'manual')
  name = layouts.cub_names()[0][0]
  path = (tmp_path / 'manual' / 'segmentations' / name).with_suffix('.png')
  Image.new('L', (10, 10)).save(path)
  with caplog.at_level(logging.WARNING):
    builder = prepare(cub.Builder, tmp_path / 'manual', tmp_path / 'data')
  record = examples(builder, 'train')[name]
  assert record['segmentation_mask'] is None and record['bbox'] is not None
  assert f'1 images have no mask of their size, the first is {name}' in (
    caplog.text
  )


def test_the_official_list_of_classes():
  assert len(set(cub.CLASS_NAMES)) == 200
  numbers = [int(name[:3]) for name in cub.CLASS_NAMES]
  assert numbers == list(range(1, 201))
  assert set(layouts.CUB_CLASSES) <= set(cub.CLASS_NAMES)
  # Spelt so in the published set.
  assert '141.Artic_Tern' in cub.CLASS_NAMES
