"""Images that are elsewhere now: those of the run, or others."""

import types

import pytest

from cmd_jax.errors import UserError
from cmd_jax.rundir.workdir import Workdir
from cmd_jax.training.same_images import check_same_images, hash_of_sample
from tests.scored_runs import make_canvases


def _config(**dataset):
  return {'seed': 0, 'dataset': {'source': 'folder', **dataset}}


def _data(seed=0, sha256='a'):
  return types.SimpleNamespace(
    pretrain=make_canvases('train', 31, seed), sha256=sha256, name='birds/train'
  )


def _check(workdir, config, data):
  check_same_images(data, workdir, workdir.check(config))


@pytest.fixture
def workdir(tmp_path):
  made = Workdir(str(tmp_path / 'run'))
  made.open(_config(path='/photos', train='a.tar', test='b.tar'))
  made.update_results(data_sha256='a', sample_sha256=hash_of_sample(_data()))
  return made


@pytest.mark.parametrize(
  'place',
  [
    dict(path='/photos/'),
    dict(path='../photos'),
    dict(path='/moved/elsewhere'),
    dict(train='/data/a.tar'),
    dict(test='gs://bucket/b.tar'),
  ],
)
def test_the_same_images_may_be_elsewhere(workdir, place):
  config = _config(**{'path': '/photos', 'train': 'a.tar', 'test': 'b.tar'})
  config['dataset'].update(place)
  _check(workdir, config, _data())
  (name,) = place
  with pytest.raises(UserError, match=f'other names or labels; dataset.{name}'):
    _check(workdir, config, _data(sha256='b'))
  # The same names in another folder are not the same images.
  with pytest.raises(UserError, match=f'other pixels; dataset.{name} is'):
    _check(workdir, config, _data(seed=1))


def test_a_run_of_an_older_program_is_known_by_its_names(workdir):
  workdir.update_results(sample_sha256=None)
  config = _config(path='/moved', train='a.tar', test='b.tar')
  _check(workdir, config, _data(seed=1))


def test_where_nothing_tells_only_one_place_is_taken(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'photos').mkdir()
  (tmp_path / 'link').symlink_to(tmp_path / 'photos')
  workdir = Workdir(str(tmp_path / 'run'))
  workdir.open(_config(path=str(tmp_path / 'photos')))
  for path in ('photos', './photos/', f'{tmp_path}/link', 'run/../photos'):
    _check(workdir, _config(path=path), _data())
  with pytest.raises(UserError, match='has no data_sha256.*other --workdir'):
    _check(workdir, _config(path='elsewhere'), _data())


def test_another_field_of_the_set_is_refused_as_before(workdir):
  config = _config(path='/moved', train='a.tar', test='b.tar', seed=3)
  with pytest.raises(UserError, match=r'\(dataset.seed is missing there'):
    workdir.check(config)
