import numpy as np
import pytest
from scipy import io as matlab_io

from tests.tfds_builders import layouts
from tests.tfds_builders.preparing import examples, prepare, refusal
from tfds_builders.stanford_cars import matlab
from tfds_builders.stanford_cars import stanford_cars_dataset_builder as cars


def _pack(folder):
  """Puts the originals in their archives."""
  for split in ('train', 'test'):
    layouts.tgz(folder / f'cars_{split}.tgz', folder / f'cars_{split}')
  layouts.tgz(folder / 'car_devkit.tgz', folder / 'devkit')
  for name in ('cars_train', 'cars_test', 'devkit'):
    for path in (folder / name).iterdir():
      path.unlink()
    (folder / name).rmdir()


def _make(layout, folder):
  if layout == 'archives':
    layouts.make_cars(folder)
    _pack(folder)
  elif layout == 'unpacked':
    layouts.make_cars(folder)
  elif layout == 'nested':
    # As a mirror has it: every archive in a folder of its own, and the name
    # that a browser gives to a file fetched twice.
    layouts.make_cars(folder)
    for name in ('cars_train', 'cars_test'):
      (folder / name).rename(folder / 'x')
      (folder / name).mkdir()
      (folder / 'x').rename(folder / name / name)
    labels = 'cars_test_annos_withlabels'
    (folder / f'{labels}.mat').rename(folder / f'{labels} (1).mat')
  elif layout == 'joint':
    layouts.make_joint_cars(folder)
  elif layout == 'tables':
    layouts.make_car_folders(folder / 'car_data' / 'car_data', boxes=True)
  elif layout == 'folders':
    layouts.make_car_folders(folder, boxes=False)
  elif layout == 'parquet':
    images = {
      split: [
        (layouts.car_image(split, i), label - 1)
        for i, (_, label, _) in enumerate(layouts.car_labels(split), 1)
      ]
      for split in ('train', 'test')
    }
    layouts.make_parquet(folder, images, layouts.CAR_CLASSES, shards=2)


@pytest.mark.parametrize(
  'layout',
  ['archives', 'unpacked', 'nested', 'joint', 'tables', 'folders', 'parquet'],
)
def test_every_layout_gives_images_labels_and_the_boxes_it_has(
  tmp_path, layout
):
  _make(layout, tmp_path / 'manual')
  builder = prepare(cars.Builder, tmp_path / 'manual', tmp_path / 'data')
  names = builder.info.features['label'].names
  is_repacked = layout in ('tables', 'folders', 'parquet')
  assert len(names) == (196 if is_repacked else 2)
  for split in ('train', 'test'):
    found = {r['image']: r for r in examples(builder, split).values()}
    assert len(found) == 6
    for i, (_, label, box) in enumerate(layouts.car_labels(split), 1):
      record = found[layouts.car_image(split, i)]
      assert names[record['label']] == layouts.CAR_CLASSES[label - 1]
      if layout in ('folders', 'parquet'):
        assert record['bbox'] is None
        continue
      x1, y1, x2, y2 = box
      # 40 x 60 pixels; the last of a box belongs to it, and some lie beyond.
      np.testing.assert_allclose(
        record['bbox'],
        [(y1 - 1) / 40, (x1 - 1) / 60, min(y2 / 40, 1), x2 / 60],
        rtol=1e-6,
      )


def test_a_part_of_the_originals_is_not_enough(tmp_path):
  manual_dir = tmp_path / 'manual'
  layouts.make_cars(manual_dir)
  (manual_dir / 'cars_test_annos_withlabels.mat').unlink()
  text = refusal(cars.Builder, manual_dir, tmp_path / 'data')
  assert 'lacks cars_test_annos_withlabels.mat (185,758 bytes)' in text
  assert 'car_devkit' not in text and 'cars_train.tgz' not in text
  (manual_dir / 'devkit' / 'cars_meta.mat').unlink()
  text = refusal(cars.Builder, manual_dir, tmp_path / 'data')
  assert 'car_devkit.tgz (330,960 bytes)' in text

  layouts.write(tmp_path / 'empty' / 'readme.txt', '')
  text = refusal(cars.Builder, tmp_path / 'empty', tmp_path / 'data')
  for words in (
    'cars_train.tgz (979,269,282 bytes)',
    'cars_test.tgz',
    'Kaggle',
  ):
    assert words in text


@pytest.mark.parametrize('layout', ['joint', 'tables'])
def test_wrong_counts_are_refused_with_both_numbers(tmp_path, layout):
  _make(layout, tmp_path / 'manual')
  text = refusal(cars.Builder, tmp_path / 'manual', tmp_path / 'data')
  if layout == 'joint':
    assert '6 images in train, not 8,144' in text
    assert '6 images in test, not 8,041' in text
  else:
    assert 'has 2 classes, not 196' in text


def test_other_archives_and_lists_are_refused(tmp_path):
  manual_dir = tmp_path / 'manual'
  _make('archives', manual_dir)
  text = refusal(cars.Builder, manual_dir, tmp_path / 'data')
  assert 'cars_train.tgz has ' in text and '979,269,282' in text
  _make('unpacked', tmp_path / 'unpacked')
  text = refusal(cars.Builder, tmp_path / 'unpacked', tmp_path / 'data')
  assert 'cars_test_annos_withlabels.mat has ' in text and '185,758' in text


def test_lists_without_labels_or_damaged_are_refused(tmp_path):
  _make('unpacked', tmp_path / 'manual')
  path = tmp_path / 'manual' / 'cars_test_annos_withlabels.mat'
  whole = path.read_bytes()
  fields = [('bbox_x1', object), ('fname', object)]
  rows = np.array([[(np.uint8(1), '00001.jpg')]], fields)
  layouts.save_matlab(path, {'annotations': rows})
  args = cars.Builder, tmp_path / 'manual', tmp_path / 'data', 'quicktest'
  assert 'does not have the fields' in refusal(*args)
  path.write_bytes(whole[:200])
  assert 'cut off' in refusal(*args)
  path.write_bytes(b'<html>Not found</html>')
  assert 'not a MATLAB file' in refusal(*args)


@pytest.mark.parametrize('layout', ['unpacked', 'joint'])
def test_labels_without_a_class_are_refused(tmp_path, layout):
  _make(layout, tmp_path / 'manual')
  name = {'unpacked': 'devkit/cars_meta.mat', 'joint': 'cars_annos.mat'}[layout]
  path = tmp_path / 'manual' / name
  variables = matlab_io.loadmat(path)
  variables['class_names'] = variables['class_names'][:, :1]
  layouts.save_matlab(path, {k: v for k, v in variables.items() if k[0] != '_'})
  text = refusal(
    cars.Builder, tmp_path / 'manual', tmp_path / 'data', 'quicktest'
  )
  assert 'is of class 2, but there are 1' in text


def test_a_table_that_lacks_an_image_is_refused(tmp_path):
  _make('tables', tmp_path / 'manual')
  path = next((tmp_path / 'manual').rglob('anno_test.csv'))
  path.write_text('\n'.join(path.read_text().splitlines()[:-1]))
  args = cars.Builder, tmp_path / 'manual', tmp_path / 'data', 'quicktest'
  assert 'lacks 1 of 6 images' in refusal(*args)
  path.write_text('name,x1,y1,x2,y2,class\n00001.jpg,1,1,a,1,1\n')
  assert 'anno_test.csv, line 2' in refusal(*args)


@pytest.mark.parametrize('compressed', [True, False])
def test_matlab_files_are_read_as_scipy_wrote_them(tmp_path, compressed):
  names = np.zeros((1, 3), object)
  names[0, :] = ['one', 'a name longer than four', 'é']
  rows = np.zeros((1, 2), [('x', object), ('long_name', object)])
  rows[0, 0] = (np.uint16(65535), 'a.jpg')
  rows[0, 1] = (np.float64(-2.5), 'bb.jpg')
  variables = {
    'class_names': names,
    'annotations': rows,
    'numbers': np.arange(6, dtype=np.int32).reshape(2, 3),
    'small': np.uint8([[7]]),
    'complex': np.array([[1j]]),
    'empty': np.zeros((0, 0)),
  }
  path = tmp_path / 'file.mat'
  layouts.save_matlab(path, variables, compressed=compressed)
  found = matlab.read_matlab(path.read_bytes())
  assert found == {
    'class_names': ['one', 'a name longer than four', 'é'],
    'annotations': [
      {'x': [65535], 'long_name': 'a.jpg'},
      {'x': [-2.5], 'long_name': 'bb.jpg'},
    ],
    # By columns.
    'numbers': [0, 3, 1, 4, 2, 5],
    'small': [7],
    'complex': None,
    'empty': [],
  }
  assert set(matlab_io.loadmat(path)) >= set(found)


def test_damaged_matlab_files_raise_one_kind_of_error(tmp_path):
  layouts.make_cars(tmp_path)
  path = tmp_path / 'devkit' / 'cars_train_annos.mat'
  variables = matlab_io.loadmat(path)
  layouts.save_matlab(
    path, {'annotations': variables['annotations']}, compressed=False
  )
  whole = path.read_bytes()
  rng = np.random.default_rng(0)
  for _ in range(200):
    damaged = bytearray(whole[: rng.integers(100, len(whole))])
    for at in rng.integers(0, len(damaged), 3):
      damaged[at] = rng.integers(256)
    try:
      matlab.read_matlab(bytes(damaged))
    except ValueError as error:
      assert str(error)


def test_the_official_list_of_classes():
  assert len(set(cars.CLASS_NAMES)) == 196
  assert cars.CLASS_NAMES[0] == 'AM General Hummer SUV 2000'
  assert cars.CLASS_NAMES[-1] == 'smart fortwo Convertible 2012'
  assert set(layouts.CAR_CLASSES) <= set(cars.CLASS_NAMES)
