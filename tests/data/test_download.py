"""Downloads, from a server of this process that breaks off and refuses."""

import hashlib
import http.server
import threading

import numpy as np
import pytest

from cmd_jax.data.sources import download as download_lib
from cmd_jax.data.sources.download import download
from cmd_jax.data.sources.prepare import prepare
from cmd_jax.errors import UserError
from tests.tfds_builders import layouts
from tfds_builders import manual
from tfds_builders.cub_200_2011 import cub_200_2011_dataset_builder as cub

_CONTENT = np.random.default_rng(0).bytes(3_000_000)


class _Handler(http.server.BaseHTTPRequestHandler):
  def do_GET(self):  # noqa: N802
    server = self.server
    server.ranges.append(self.headers.get('Range'))
    name = self.path.rpartition('/')[2]
    content = server.files.get(name)
    if content is None:
      self.send_error(404)
      return
    if server.errors:
      self.send_error(server.errors.pop())
      return
    begin = 0
    if server.takes_ranges and self.headers.get('Range'):
      begin = int(self.headers['Range'].removeprefix('bytes=').rstrip('-'))
      if begin >= len(content):
        self.send_response(416)
        self.send_header('Content-Range', f'bytes */{len(content)}')
        self.end_headers()
        return
      self.send_response(206)
      last = len(content) - 1
      self.send_header('Content-Range', f'bytes {begin}-{last}/{len(content)}')
    else:
      self.send_response(200)
    self.send_header('Content-Length', str(len(content) - begin))
    self.end_headers()
    end = server.cuts.pop() if server.cuts else len(content)
    self.wfile.write(content[begin : begin + end])

  def log_message(self, *args):
    pass


@pytest.fixture
def server(monkeypatch):
  monkeypatch.setattr(download_lib, '_WAITS_S', (0, 0))
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), _Handler) as server:
    server.files = {'birds.tgz': _CONTENT}
    server.ranges, server.cuts, server.errors = [], [], []
    server.takes_ranges = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def _original(server, name='birds.tgz', content=_CONTENT, **changes):
  original = manual.Original(
    name,
    len(content),
    hashlib.sha256(content).hexdigest(),
    'the authors',
    f'http://127.0.0.1:{server.server_port}/{name}',
  )
  return original._replace(**changes)


def _fetch(original, folder):
  return download(original, folder, progress=False)


@pytest.mark.parametrize('changes', [{}, {'size': 0, 'sha256': ''}])
def test_a_connection_that_breaks_is_gone_on_with(server, tmp_path, changes):
  server.cuts = [1_000_000, 1_500_000]
  path = _fetch(_original(server, **changes), tmp_path / 'new')
  assert path.read_bytes() == _CONTENT
  assert server.ranges == [None, 'bytes=1500000-', 'bytes=2500000-']
  assert [x.name for x in path.parent.iterdir()] == ['birds.tgz']
  # What is there is not asked for again.
  assert _fetch(_original(server, **changes), tmp_path / 'new') == path
  assert len(server.ranges) == 3
  path.write_bytes(_CONTENT[:7])
  if not changes:
    with pytest.raises(UserError, match='has 7 bytes.*move it away'):
      _fetch(_original(server), tmp_path / 'new')
    assert path.read_bytes() == _CONTENT[:7]


def test_a_server_without_ranges_begins_again(server, tmp_path):
  server.takes_ranges = False
  server.cuts = [1_000_000]
  assert _fetch(_original(server), tmp_path).read_bytes() == _CONTENT
  assert server.ranges == [None, 'bytes=1000000-']


def test_what_a_process_left_is_gone_on_with(server, tmp_path):
  (tmp_path / 'birds.tgz.part').write_bytes(_CONTENT[:2_000_000])
  assert _fetch(_original(server), tmp_path).read_bytes() == _CONTENT
  assert server.ranges == ['bytes=2000000-']
  # All of it, of a size that only the server knows.
  (tmp_path / 'birds.tgz').rename(tmp_path / 'birds.tgz.part')
  unknown = _original(server, size=0)
  assert _fetch(unknown, tmp_path).read_bytes() == _CONTENT


def test_a_tired_server_is_asked_again(server, tmp_path):
  server.errors = [503, 429]
  assert _fetch(_original(server), tmp_path).read_bytes() == _CONTENT
  server.errors = [503] * 9
  with pytest.raises(UserError, match=r'503.*0 bytes of it.*asks for the rest'):
    _fetch(_original(server), tmp_path / 'other')


def test_what_cannot_be_fetched_is_explained(server, tmp_path):
  def message(original):
    with pytest.raises(UserError) as caught:
      _fetch(original, tmp_path)
    assert '\n' not in str(caught.value)
    return str(caught.value)

  assert 'refused (404' in message(_original(server, name='cars.tgz'))
  assert len(server.ranges) == 1
  text = message(_original(server, sha256='0' * 64))
  assert 'SHA-256' in text and 'was removed' in text
  assert 'has 3,000,000 bytes, not 2,999' in message(
    _original(server, size=2_999_999)
  )
  assert 'make room' in message(_original(server, size=10**18))
  assert not list(tmp_path.iterdir())
  (tmp_path / 'birds.tgz.part').write_bytes(_CONTENT[:5])
  gone = _original(server, url='http://127.0.0.1:9/birds.tgz')
  text = message(gone)
  assert '5 bytes of it are in' in text and 'the same command' in text
  assert (tmp_path / 'birds.tgz.part').read_bytes() == _CONTENT[:5]


def test_a_set_is_fetched_and_prepared(server, tmp_path, monkeypatch):
  layouts.make_cub(tmp_path / 'unpacked')
  archives = tmp_path / 'archives'
  archives.mkdir()
  for name, folder in (
    ('CUB_200_2011.tgz', 'CUB_200_2011'),
    ('segmentations.tgz', 'segmentations'),
  ):
    layouts.tgz(archives / name, tmp_path / 'unpacked' / folder)
  server.files = {x.name: x.read_bytes() for x in archives.iterdir()}
  originals = tuple(
    _original(server, name, content) for name, content in server.files.items()
  )
  monkeypatch.setattr(cub.Builder, 'ORIGINALS', originals)
  options = dict(data_dir=str(tmp_path / 'data'), progress=False)
  with pytest.raises(UserError, match=r'or let --download fetch it'):
    prepare('cub_200_2011/quicktest', **options)
  assert not server.ranges
  made = prepare('cub_200_2011/quicktest', download=True, **options)
  assert made.is_new and made.num_examples['train']
  assert len(server.ranges) == 2
  again = prepare('cub_200_2011/quicktest', download=True, **options)
  assert not again.is_new and len(server.ranges) == 2
  with pytest.raises(UserError, match=r'--download: stanford_cars is not'):
    prepare('stanford_cars', download=True, **options)
