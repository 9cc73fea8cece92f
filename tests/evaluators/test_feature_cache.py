import numpy as np
import pytest

from cmd_jax.data.canvas import Canvases
from cmd_jax.errors import UserError
from cmd_jax.evaluators.feature_cache import FeatureCache, hash_canvases


def _compute(calls):
  calls.append(1)
  return {'vectors': np.full((2, 3), len(calls), np.float32)}


def test_features_are_computed_once_for_a_key(tmp_path):
  calls = []
  cache = FeatureCache(tmp_path / 'features', {'view_px': 32})
  for _ in range(2):
    got = cache.get('test', lambda: _compute(calls), sha='a')
    assert list(got) == ['vectors'] and got['vectors'][0, 0] == 1
  again = FeatureCache(tmp_path / 'features', {'view_px': 32})
  assert (
    again.get('test', lambda: _compute(calls), sha='a')['vectors'].max() == 1
  )
  others = (
    (cache, 'train', 'a'),
    (cache, 'test', 'b'),
    (FeatureCache(tmp_path / 'features', {'view_px': 40}), 'test', 'a'),
  )
  for number, (other, name, sha) in enumerate(others, 2):
    got = other.get(name, lambda: _compute(calls), sha=sha)
    assert got['vectors'].max() == number
  assert len(calls) == 4


@pytest.mark.parametrize('damage', ['cut', 'empty', 'junk', 'other'])
def test_a_damaged_file_is_computed_again_and_told(tmp_path, capsys, damage):
  calls = []
  cache = FeatureCache(tmp_path, {})
  cache.get('test', lambda: _compute(calls))
  (path,) = tmp_path.iterdir()
  content = path.read_bytes()
  if damage == 'other':
    with open(path, 'wb') as file:
      np.savez(file, vectors=np.zeros(3))
  else:
    cut = {'cut': content[:-40], 'empty': b'', 'junk': b'x' * 99}[damage]
    path.write_bytes(cut)
  for _ in range(2):
    assert cache.get('test', lambda: _compute(calls))['vectors'].max() == 2
  message = capsys.readouterr().err
  assert message.count('\n') == 1 and 'computing the features again' in message
  assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
  (tmp_path / 'features').write_text('a file')
  with pytest.raises(UserError, match='cannot be written'):
    FeatureCache(tmp_path / 'features', {}).get('test', lambda: _compute([]))


def test_the_hash_of_a_split_tells_names_sizes_and_pixels():
  rng = np.random.default_rng(0)
  canvases = Canvases(
    name='x',
    images=rng.integers(0, 256, (40, 4, 4, 3), np.uint8),
    sizes=np.full((40, 2), 9, np.int32),
    labels=np.zeros(40, np.int32),
    file_names=tuple(map(str, range(40))),
    class_names=(),
    part_ids=None,
    boxes=None,
    skipped=(),
  )
  want = hash_canvases(canvases)
  assert hash_canvases(canvases._replace(images=canvases.images.copy())) == want
  one_other = canvases.images.copy()
  one_other[17, 2, 1, 0] ^= 1
  for changes in (
    {'images': one_other},
    {'sizes': canvases.sizes + 1},
    {'file_names': (*canvases.file_names[:-1], 'y')},
  ):
    assert hash_canvases(canvases._replace(**changes)) != want
