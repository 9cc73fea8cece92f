import concurrent.futures
import json
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import tensorflow_datasets as tfds

from cmd_jax.data.sources.tfds_source import make_builder, tfds_source
from cmd_jax.errors import UserError
from tfds_builders.toybirds import toybirds_dataset_builder as toybirds
from tfds_builders.toybirds.species import SPECIES


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tfds')
  tfds_source(
    'toybirds',
    'train',
    data_dir=str(folder),
    builder_config='quicktest',
    progress=False,
  )
  return str(folder)


def _quicktest(split, data_dir):
  return tfds_source('toybirds/quicktest', split, data_dir=data_dir)


@pytest.mark.parametrize('split, n', [('train', 96), ('test', 48)])
def test_examples_equal_the_renderer_s_output(split, n, data_dir):
  source = _quicktest(split, data_dir)
  assert source.class_names == tuple(s.name for s in SPECIES)
  assert sorted(source.file_names) == [f'{split}_{i:05d}.png' for i in range(n)]
  assert source.labels.dtype == np.int32
  np.testing.assert_array_equal(np.bincount(source.labels), [n // 24] * 24)
  for i in range(n):
    index = int(source.file_names[i].removesuffix('.png').split('_')[1])
    drawing, label = toybirds.draw_example(split, index, 32)
    example = source.load(i)
    assert source.labels[i] == label
    assert example.image.mode == 'RGB'
    np.testing.assert_array_equal(np.asarray(example.image), drawing.image)
    np.testing.assert_array_equal(example.part_ids, drawing.part_ids)
    assert example.part_ids.dtype == np.uint8
    np.testing.assert_array_equal(example.box, drawing.box)
    assert example.box.dtype == np.float32


def test_stored_order_is_shuffled(data_dir):
  names = _quicktest('train', data_dir).file_names
  assert list(names) != sorted(names)


def test_slices_of_a_split(data_dir):
  whole = _quicktest('train', data_dir)
  part = _quicktest('train[25%:50%]', data_dir)
  assert part.file_names == whole.file_names[24:48]
  np.testing.assert_array_equal(part.labels, whole.labels[24:48])


def test_loading_from_threads(data_dir):
  source = _quicktest('train', data_dir)
  indices = list(range(96)) * 3
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    loaded = list(pool.map(source.load, indices))
  fresh = _quicktest('train', data_dir)
  for i, example in zip(indices, loaded):
    expected = fresh.load(i)
    assert example.image.tobytes() == expected.image.tobytes()
    np.testing.assert_array_equal(example.part_ids, expected.part_ids)


def test_no_folder_is_left_for_temporary_files(tmp_path, monkeypatch):
  monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'temporary'))
  (tmp_path / 'temporary').mkdir()
  builder = make_builder(toybirds.Builder, data_dir=tmp_path / 'data')
  assert not builder.data_path.exists()
  assert not list((tmp_path / 'temporary').iterdir())


def test_preparing_is_quiet(tmp_path, capfd):
  tfds_source(
    'toybirds/quicktest', 'test', data_dir=str(tmp_path), progress=False
  )
  out, err = capfd.readouterr()
  assert (out, err) == ('', '')


_PREPARE = """
import json, random, sys
from cmd_jax.data.sources.tfds_source import tfds_source
random.seed(0)
source = tfds_source(
  'toybirds/quicktest', 'train', data_dir=sys.argv[1], progress=False
)
images = [source.load(i).image.tobytes().hex()[:64] for i in range(96)]
print(json.dumps([source.file_names, images, 'tensorflow' in sys.modules]))
"""


def test_processes_at_once_agree_and_do_not_import_tensorflow(tmp_path):
  processes = [
    subprocess.Popen(
      [sys.executable, '-W', 'error', '-c', _PREPARE, str(tmp_path)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for _ in range(2)
  ]
  results = [p.communicate(timeout=300) for p in processes]
  assert [p.returncode for p in processes] == [0, 0], results
  assert [err for _, err in results] == ['', '']
  assert results[0][0] == results[1][0]
  names, images, has_tensorflow = json.loads(results[0][0])
  assert len(set(names)) == len(set(images)) == 96
  assert not has_tensorflow
  left = [p.name for p in tmp_path.glob('toybirds/quicktest/*')]
  assert left == ['1.0.0']


def _message(*args, **kwargs):
  with pytest.raises(UserError) as e:
    tfds_source(*args, **kwargs)
  assert '\n' not in str(e.value)
  return str(e.value)


def test_unknown_names_are_answered_with_the_valid_ones(data_dir):
  message = _message('toybird', 'train', data_dir=data_dir)
  assert "'toybird'" in message
  assert 'this project has' in message and 'toybirds' in message
  message = _message('cifar11', 'train', data_dir=data_dir)
  assert 'cifar10' in message

  message = _message('toybirds', 'train', builder_config='65px')
  for name in ('65px', '32px', '64px', '224px', 'quicktest'):
    assert name in message
  message = _message('cifar10', 'train', builder_config='64px')
  assert 'leave it out' in message

  for split in ('val', 'train['):
    message = _message('toybirds/quicktest', split, data_dir=data_dir)
    assert f"'{split}'" in message and 'train, validation, test' in message


def test_missing_manual_files_are_answered_with_the_instructions(tmp_path):
  message = _message(
    'imagenet2012', 'train', data_dir=str(tmp_path), progress=False
  )
  assert str(tmp_path) in message
  assert 'ILSVRC2012_img_train.tar' in message


def test_incomplete_and_foreign_folders(tmp_path, data_dir):
  (tmp_path / 'toybirds/quicktest/1.0.0').mkdir(parents=True)
  message = _message('toybirds/quicktest', 'train', data_dir=str(tmp_path))
  assert 'delete it' in message
  # A folder that can't be written to.
  blocked = tmp_path / 'file'
  blocked.touch()
  message = _message('toybirds/quicktest', 'train', data_dir=str(blocked))
  assert 'could not be prepared' in message


class _Plain(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A set without labels, parts, boxes or file names."""

  name = 'plain'
  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict({'image': tfds.features.Image()}),
    )

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    for i in range(3):
      drawing, _ = toybirds.draw_example('train', i, 32)
      yield i, {'image': toybirds._png(drawing.image)}


def test_a_set_with_images_only(tmp_path, monkeypatch):
  monkeypatch.setattr(
    'cmd_jax.data.sources.tfds_source.find_builder_class', lambda name: _Plain
  )
  source = tfds_source('plain', 'train', data_dir=tmp_path, progress=False)
  assert source.class_names == ()
  np.testing.assert_array_equal(source.labels, [-1, -1, -1])
  assert len(set(source.file_names)) == 3
  example = source.load(1)
  assert example.image.size == (32, 32)
  assert example.part_ids is None and example.box is None


@pytest.mark.parametrize(
  'name, file',
  [
    ('cub_200_2011', 'CUB_200_2011.tgz'),
    ('stanford_cars', 'cars_train.tgz'),
    ('fgvc_aircraft', 'fgvc-aircraft-2013b.tar.gz'),
  ],
)
def test_training_fetches_nothing(tmp_path, monkeypatch, name, file):
  def download(*args, **kwargs):
    raise AssertionError('it was asked for')

  manager = tfds.download.DownloadManager
  monkeypatch.setattr(manager, 'download', download)
  monkeypatch.setattr(manager, 'download_and_extract', download)
  with pytest.raises(UserError, match='is not prepared') as caught:
    tfds_source(name, 'train', data_dir=str(tmp_path), progress=False)
  message = str(caught.value)
  assert file in message and 'cmd-jax prepare' in message
  assert '\n' not in message
