"""Addresses on the Hugging Face Hub, by its cache and without a network."""

import json
import sys
import types

import numpy as np
import pytest
from safetensors.numpy import save_file

import cmd_jax
from cmd_jax.convert import hub, load, pretrained
from cmd_jax.errors import UserError
from tests.convert import family_fixtures as fixtures

_COMMIT = 'a' * 40


class _Errors(types.ModuleType):
  """The errors of huggingface_hub that are told apart."""

  class HfHubHTTPError(OSError):
    pass

  class RepositoryNotFoundError(HfHubHTTPError):
    pass

  class GatedRepoError(RepositoryNotFoundError):
    pass

  class RevisionNotFoundError(HfHubHTTPError):
    pass

  class EntryNotFoundError(Exception):
    pass

  class LocalEntryNotFoundError(FileNotFoundError, EntryNotFoundError):
    pass


class _Package(types.ModuleType):
  """huggingface_hub without a network, over a cache folder as it has it.

  Attributes:
    fails: what a file that is not there raises.
    asked: (name of the file, whether from the cache alone) of every call.
  """

  def __init__(self, cache):
    super().__init__('huggingface_hub')
    self.errors = _Errors('huggingface_hub.errors')
    self.fails = self.errors.LocalEntryNotFoundError
    self.asked = []
    self._cache = cache

  def hf_hub_download(self, repo, name, *, revision, local_files_only):
    self.asked.append((name, local_files_only))
    folder = self._cache / f'models--{repo.replace("/", "--")}'
    ref = folder / 'refs' / (revision or 'main')
    commit = ref.read_text() if ref.exists() else revision or ''
    path = folder / 'snapshots' / commit / name
    if not path.is_file():
      raise self.fails('it says\nmuch')
    return str(path)


def _install(monkeypatch, package):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', package)
  errors = package and package.errors
  monkeypatch.setitem(sys.modules, 'huggingface_hub.errors', errors)


@pytest.fixture
def stub(tmp_path, monkeypatch):
  package = _Package(tmp_path / 'cache')
  _install(monkeypatch, package)
  return package


@pytest.fixture(params=['stub', 'real'])
def cache(request, tmp_path, monkeypatch):
  """The cache of a stand-in, or of the package itself without a network."""
  if request.param == 'stub':
    request.getfixturevalue('stub')
  else:
    reason = 'huggingface_hub is not installed'
    pytest.importorskip('huggingface_hub', reason=reason)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  return tmp_path / 'cache'


def _put(cache, name, content, *, repo='owner/birds', ref='main'):
  """A file in the cache of huggingface_hub; its path."""
  folder = cache / f'models--{repo.replace("/", "--")}'
  path = folder / 'snapshots' / _COMMIT / name
  path.parent.mkdir(parents=True, exist_ok=True)
  (folder / 'refs').mkdir(exist_ok=True)
  (folder / 'refs' / ref).write_text(_COMMIT)
  if isinstance(content, dict):
    save_file(content, path)
  else:
    path.write_bytes(content)
  return path


@pytest.mark.parametrize(
  'address, parts',
  [
    ('hf://a/b', ('a/b', None, None)),
    ('hf://a/b/', ('a/b', None, None)),
    ('hf:/a/b', ('a/b', None, None)),
    ('hf://a/b/c.npz', ('a/b', None, 'c.npz')),
    ('hf://a/b/c/d.pth', ('a/b', None, 'c/d.pth')),
    ('hf://a/b@v1', ('a/b', 'v1', None)),
    ('hf://a/b@refs%2Fpr%2F1/c/d.pth', ('a/b', 'refs/pr/1', 'c/d.pth')),
  ],
)
def test_addresses_are_taken_apart(address, parts):
  assert hub.is_address(address)
  assert hub.parse(address) == parts


@pytest.mark.parametrize(
  'address', ['hf://a', 'hf://a/@v', 'hf://a/b@', 'hf://a/b/../c', 'hf://a//b']
)
def test_what_is_no_address_is_told(address):
  with pytest.raises(UserError, match='no address on the Hub: give hf://OWNER'):
    hub.parse(address)


def test_paths_are_no_addresses():
  for path in ('hf', 'hf/a/b', './hf:/a', '/x/hf://a/b', 'gs://a/b'):
    assert not hub.is_address(path)


def test_an_encoder_comes_from_the_cache(cache):
  weights = fixtures.weights('timm_vit')
  path = _put(cache, 'model.safetensors', weights)
  assert pretrained.resolve('hf://owner/birds') == path
  assert pretrained.resolve(f'hf://owner/birds@{_COMMIT}') == path
  encoder = fixtures.encoder_of('timm_vit')
  imported = load.load_encoder('hf://owner/birds', encoder)
  assert imported.report.path == str(path)
  direct = load.load_encoder(path, encoder)
  assert imported.report == direct.report
  encoder = cmd_jax.load('hf://owner/birds/model.safetensors', num_heads=2)
  assert encoder.source.startswith(str(path))


def test_the_usual_file_is_taken_in_its_order(cache):
  second = _put(cache, 'pytorch_model.bin', b'x')
  assert hub.fetch('hf://owner/birds') == second
  first = _put(cache, 'model.safetensors', b'x')
  assert hub.fetch('hf://owner/birds') == first
  other = _put(cache, 'more/weights.npz', b'x')
  assert hub.fetch('hf://owner/birds/more/weights.npz') == other


def test_all_files_of_an_index_are_fetched(cache):
  weights = fixtures.weights('timm_vit')
  names = {
    name: f'model-0000{1 + i % 2}-of-00002.safetensors'
    for i, name in enumerate(weights)
  }
  index = json.dumps({'weight_map': names}).encode()
  _put(cache, 'model.safetensors.index.json', index)
  shard_names = sorted(set(names.values()))
  for shard in shard_names:
    if shard == shard_names[1]:
      with pytest.raises(UserError, match=f'names {shard}, which is not there'):
        hub.fetch('hf://owner/birds')
    part = {name: weights[name] for name in weights if names[name] == shard}
    _put(cache, shard, part)
  encoder = fixtures.encoder_of('timm_vit')
  imported = load.load_encoder('hf://owner/birds', encoder)
  kernel = imported.variables['params']['block_1']['mlp']['fc1']['kernel']
  np.testing.assert_array_equal(kernel, weights['blocks.1.mlp.fc1.weight'].T)


def test_without_network_and_file_one_line_says_so(cache):
  _put(cache, 'config.json', b'{}')
  for address in ('hf://owner/birds', 'hf://owner/none', 'hf://owner/birds@v9'):
    with pytest.raises(UserError, match='not in the cache') as caught:
      cmd_jax.load(address)
    assert str(caught.value).isprintable() and address in str(caught.value)


def test_the_network_is_waited_for_once(stub):
  with pytest.raises(UserError, match='out of reach'):
    hub.fetch('hf://owner/birds')
  assert [offline for _, offline in stub.asked] == [False, True, True, True]


@pytest.mark.parametrize(
  'name, word',
  [
    ('EntryNotFoundError', 'owner/birds has no model.safetensors, '),
    ('RepositoryNotFoundError', 'no repository owner/birds, or it is private'),
    ('GatedRepoError', 'accepted its terms'),
    ('RevisionNotFoundError', 'no revision v1'),
    ('HfHubHTTPError', r'could not be fetched \(it says much\)'),
  ],
)
def test_what_the_hub_refuses_is_told_in_one_line(stub, name, word):
  stub.fails = getattr(stub.errors, name)
  with pytest.raises(UserError, match=word) as caught:
    hub.fetch('hf://owner/birds@v1')
  assert str(caught.value).isprintable()


def test_the_missing_package_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(UserError, match=r"pip install 'cmd_jax\[hub\]'"):
    cmd_jax.load('hf://owner/birds')
