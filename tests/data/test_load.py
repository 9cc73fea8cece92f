import pathlib
import tarfile

import numpy as np
import pytest
from PIL import Image

from cmd_jax.data.pipeline import lazy, load
from cmd_jax.devices import sharding
from cmd_jax.errors import UserError
from configs import folder, shards


@pytest.fixture
def photographs(tmp_path):
  rng = np.random.default_rng(0)
  for name in ('robin', 'wren'):
    (tmp_path / name).mkdir()
    for number in range(8):
      pixels = rng.integers(0, 256, (9, 9, 3), np.uint8)
      Image.fromarray(pixels).save(tmp_path / name / f'{number}.png')
  return tmp_path


def _config(path: pathlib.Path, **fields):
  config = folder.get_config('quicktest').unlock()
  config.dataset.path = str(path)
  config.batch_size = 8
  config.update(fields)
  return config


def test_both_routes_load_one_set(photographs):
  mesh = sharding.make_mesh(8)
  held, streamed = (
    load.load_data(_config(photographs, placement=route), mesh)
    for route in ('device', 'stream')
  )
  # Nothing else tells them apart, so a run may go on by the other route.
  assert held.sha256 == streamed.sha256
  assert isinstance(streamed.pretrain.images, lazy.LazyArray)
  assert isinstance(held.test.images, np.ndarray)
  np.testing.assert_array_equal(streamed.test.images, held.test.images)
  assert 'placement stream: 16 images' in streamed.placement
  with held.make_batches(None) as ours, streamed.make_batches(None) as theirs:
    np.testing.assert_array_equal(ours(3).images, theirs(3).images)
    np.testing.assert_array_equal(ours(3).index, theirs(3).index)


@pytest.mark.parametrize('route', ['device', 'stream'])
def test_fewer_images_than_a_batch_are_refused(photographs, route):
  config = _config(photographs, placement=route, batch_size=16)
  with pytest.raises(UserError, match='usable images, fewer than .* 16'):
    load.load_data(config, sharding.make_mesh(8))


def test_fields_that_do_not_fit_the_source_are_refused():
  dataset = folder.get_config().dataset.to_dict()
  with pytest.raises(UserError, match="'tape': choose one of tfds, folder, sh"):
    load.load_source({**dataset, 'source': 'tape'}, 'train', 8)
  with pytest.raises(UserError, match="'shards', but .* no 'train': use conf"):
    load.load_source({**dataset, 'source': 'shards'}, 'train', 8)
  dataset = shards.get_config().dataset.to_dict()
  with pytest.raises(UserError, match="no 'val': choose one of test, train"):
    load.load_source(dataset, 'val', 8)


@pytest.mark.parametrize('source', ['folder', 'shards'])
def test_grey_files_are_scaled_in_every_source(tmp_path, monkeypatch, source):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  folder = tmp_path / 'photos'
  folder.mkdir()
  Image.fromarray(np.full((4, 4), 4095, np.uint16)).save(folder / 'a.png')
  with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
    tar.add(folder / 'a.png', 'a.png')
  dataset = {'source': source, 'pretrain_split': '', 'test_split': ''}
  dataset |= {
    'folder': {'path': str(folder)},
    'shards': {'train': str(tmp_path / 'a.tar'), 'test': ''},
  }[source]
  for white, shown in ((4095, 255), (65535, 16)):
    loaded = load.load_source(dataset, 'train', 0, white)
    assert loaded.load(0).image.getpixel((1, 1)) == (shown,) * 3
