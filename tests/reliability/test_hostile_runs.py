"""What lies beside a run: part masks, embeddings, what a report is made of."""

import io
import json
import os
import pathlib

import numpy as np
import pytest

from cmd_jax.data.canvas import printable
from cmd_jax.errors import UserError
from cmd_jax.export import embed, search
from cmd_jax.export.images import Embeddings
from cmd_jax.parts import store
from cmd_jax.report import history, page
from tests.reliability import mutate, readers

_DEEP = b'[' * 100_000
_WHERE = 'tests.reliability.readers:'


def _masks():
  buffer = io.BytesIO()
  np.savez_compressed(buffer, masks=np.ones((2, 4, 4), np.uint8))
  return buffer.getvalue()


def _save_masks(folder):
  masks = np.ones((2, 4, 4), np.uint8)
  store.save_masks(folder, masks, store.Manifest(**readers.MASKS))
  return (folder / 'manifest.json').read_bytes()


def _manifest(**changes):
  record = {
    'format': 1,
    'file': 'masks-0123456789abcdef.npz',
    'file_sha256': '3' * 64,
    **readers.MASKS,
  }
  return json.dumps(record | changes).encode()


def _manifests():
  return {
    'deep': _DEEP,
    'deep objects': b'{"a":' * 100_000,
    'deep settings': _manifest(settings=0)[:-1].replace(
      b'"settings": 0', b'"settings": ' + _DEEP
    ),
    'settings that are a list': _manifest(settings=[1]),
    'settings that are a number': _manifest(settings=5),
    'settings that are none': _manifest(settings=None),
    'a device': _manifest(file='/dev/zero'),
    'a file elsewhere': _manifest(file='../../../../etc/passwd'),
    'a file of lines': _manifest(file='a\nb.npz'),
    'a file that is none': _manifest(file=None),
    'a name with a null': _manifest(file='a\0b'),
    'a long name': _manifest(file='x' * 300),
    'a long setting': _manifest(settings={'x\n' * 10**6: 1}),
    'not unicode': b'{"\xff": 1}',
    'a large number': b'{"format": %s}' % (b'9' * 5000),
    'an array': b'[]',
    'a mark': b'\xef\xbb\xbf{}',
    'empty': b'',
  }


def _mask_files():
  def save(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()

  return mutate.zip_bombs('masks.npy') | {
    'of another shape': save(masks=np.ones((2, 4, 5), np.uint8)),
    'of another dtype': save(masks=np.ones((2, 4, 4))),
    'of another name': save(parts=np.ones((2, 4, 4), np.uint8)),
    'a lone array': mutate.npy('(2, 4, 4)', bytes(32)),
    'a pickle': b'\x80\x04N.',
    'empty': b'',
  }


def _embeddings(**changes):
  arrays = dict(
    file_names=np.array(['a/1.jpg', 'b/2.jpg']),
    vectors=np.ones((2, 3), np.float32),
    encoder='here',
    encoder_sha256=readers.ENCODER.hash,
    preprocessing=json.dumps(readers.ENCODER.preprocessing),
    folder='/photographs',
    skipped='[["c.jpg", "damaged"]]',
    cmd_jax_version='0',
  )
  buffer = io.BytesIO()
  np.savez(buffer, **arrays | changes)
  return buffer.getvalue()


def _parquet():
  names = Embeddings(
    pathlib.Path('/photographs'),
    ('a/1.jpg', 'b/2.jpg'),
    np.ones((2, 3), np.float32),
    (),
  )
  return embed._parquet(names, embed.describe(readers.ENCODER, names))


def _embedding_files():
  return mutate.zip_bombs('vectors.npy') | {
    'one name too few': _embeddings(file_names=np.array(['a'])),
    'names that are numbers': _embeddings(file_names=np.arange(2)),
    'names outside': _embeddings(file_names=np.array(['../../x', '/etc/y'])),
    'a name alone': _embeddings(file_names=np.array('a')),
    'vectors that are words': _embeddings(vectors=np.array([['a'], ['b']])),
    'vectors in a row': _embeddings(vectors=np.ones(2, np.float32)),
    'vectors of nothing': _embeddings(
      vectors=np.ones((0, 3), np.float32), file_names=np.array([], 'U1')
    ),
    'vectors of no features': _embeddings(vectors=np.ones((2, 0), np.float32)),
    'complex vectors': _embeddings(vectors=np.ones((2, 3), np.complex64)),
    'skipped that is deep': _embeddings(skipped='[' * 100_000),
    'skipped that are numbers': _embeddings(skipped='[[1, 2]]'),
    'skipped that is one': _embeddings(skipped='[7]'),
    'a folder of null': _embeddings(folder='a\0b'),
    'another encoder of lines': _embeddings(
      encoder='a\nb' * 9999, encoder_sha256='4'
    ),
    'descriptions that are arrays': _embeddings(folder=np.ones((9, 9))),
    'empty': b'',
  }


def _curves():
  line = {'step': 10, 'loss': 1.5, 'loss/image': 0.5}
  text = ''.join(
    json.dumps({**line, 'step': step}) + '\n' for step in range(10, 60, 10)
  )
  many = ''.join(
    json.dumps({'step': i, **{f'{i}-{k}': k for k in range(99)}}) + '\n'
    for i in range(2000)
  )
  return text.encode(), {
    'deep': _DEEP + b'\n' + text.encode(),
    'infinite steps': b'{"step": 1e999}\n{"step": NaN}\n{"step": Infinity}\n',
    'a large step': b'{"step": %s}\n' % (b'9' * 4000),
    'a large value': b'{"step": 1, "loss": %s}\n' % (b'9' * 4000),
    'not unicode': b'\xff\xfe\n' + text.encode(),
    'lists': b'[]\n7\nnull\n"step"\n',
    'a script': b'{"step": 1, "</script><script>alert(1)": 2}\n',
    'a name of JavaScript': b'{"step": 1, "__proto__": 2}\n',
    'a name of many': many.encode(),
    'one long line': b'{"step":1,"a":"%s"}' % (b'x' * 10**7),
  }


def _scores():
  return {
    'not numbers': b'{"init": {"a": "b"}, "final": {"a": [1], "b": {}}}',
    'not finite': b'{"init": {"a": NaN}, "final": {"a": Infinity}}',
    'large': b'{"init": {"a": %s}}' % (b'9' * 400),
    'lists': b'{"init": [1], "final": "x"}',
    'numbers': b'{"init": 7, "final": 1.5}',
  }


def make_targets(folder):
  curves, odd_curves = _curves()
  table = b'{"init": {"knn/20/top1": 0.5}, "final": {"knn/20/top1": 0.75}}'
  embeddings = _embeddings()
  members = ('vectors', 'file_names', 'skipped', 'folder')
  return [
    mutate.Target(
      'part masks, manifest',
      f'{_WHERE}masks_manifest',
      'manifests/manifest.json',
      [mutate.Seed(_save_masks(folder / 'manifests'))],
      _manifests(),
    ),
    mutate.Target(
      'part masks',
      f'{_WHERE}masks_file',
      'parts/m.npz',
      [mutate.Seed(_masks()), mutate.in_member(_masks(), 'masks.npy')],
      _mask_files(),
    ),
    mutate.Target(
      'part masks, unfinished',
      f'{_WHERE}chunks',
      'chunks/sums.npz',
      [mutate.Seed(_masks()), mutate.in_member(_masks(), 'masks.npy')],
      mutate.zip_bombs('masks.npy'),
    ),
    mutate.Target(
      'embeddings, npz',
      f'{_WHERE}embeddings',
      'embeddings/e.npz',
      [
        mutate.Seed(embeddings),
        *(mutate.in_member(embeddings, f'{name}.npy') for name in members),
      ],
      _embedding_files(),
    ),
    mutate.Target(
      'embeddings, Parquet',
      f'{_WHERE}embeddings',
      'embeddings/e.parquet',
      [mutate.Seed(_parquet())],
      {'empty': b'', 'marks alone': b'PAR1PAR1', 'a zip': embeddings},
    ),
    mutate.Target(
      'curves of a report',
      f'{_WHERE}curves',
      'curves/metrics.jsonl',
      [mutate.Seed(curves)],
      odd_curves,
    ),
    mutate.Target(
      'scores of a report',
      f'{_WHERE}scores',
      'scores/results.json',
      [mutate.Seed(table)],
      _scores(),
    ),
  ]


def test_masks_are_read_from_their_own_folder(tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  for name in ('pipe', '/dev/zero', '../masks-0123456789abcdef.npz'):
    (tmp_path / 'manifest.json').write_bytes(_manifest(file=name))
    with pytest.raises(UserError, match='manifest.json'):
      store.load_masks(tmp_path, store.Manifest(**readers.MASKS))


def test_a_manifest_that_is_a_pipe_is_refused(tmp_path):
  os.mkfifo(tmp_path / 'manifest.json')
  with pytest.raises(UserError, match='manifest.json'):
    store.load_masks(tmp_path, store.Manifest(**readers.MASKS))


def test_results_are_printed_in_one_line_each_whatever_files_are_called():
  names = ('a\nb.jpg', os.fsdecode(b'\xff.jpg'), '\x1b[2J.jpg', 'é.jpg')
  gallery = Embeddings(pathlib.Path('x'), names, np.ones((4, 2)), ())
  found = search.Found(np.arange(4), np.ones(4), np.ones(4))
  text = search.table(gallery, found)
  text, about = text.split('\n\n')
  assert 'mean of the images searched' in about
  assert len(text.splitlines()) == 5
  assert text.replace('\n', '').isprintable()
  assert 'é.jpg' in text and printable(names[2]) in text
  text.encode()


def test_nothing_of_a_name_is_markup_in_a_report():
  names = [
    '</script><script>window.hacked = 1</script>',
    '<!--<script>',
    ']]><img src=x onerror=alert(1)>',
    '\u2028\u2029\x85\0\ufeff',
    os.fsdecode(b'\xff\xfe</script>'),
    '@@script@@',
    '__proto__',
  ]
  data = {
    'classes': names,
    'results': history.table({'final': {n: 1 for n in names}}),
  }
  html = page.render(data)
  content = html.split('id="data">')[1].split('</script>')[0]
  assert '<' not in content and content.isascii()
  assert json.loads(content)['classes'] == names
  assert html.count('</script') == page.render({}).count('</script')
