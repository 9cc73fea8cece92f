import json

import numpy as np
import pytest
from PIL import Image

from cmd_jax.errors import UserError
from cmd_jax.parts import sheet, store

_NAMES = ['a.jpg', 'b.jpg', 'c.jpg']


def _variables(scale=1.0):
  return {'params': {'b': np.ones((2, 3)) * scale, 'a': np.zeros(4)}}


def _manifest(
  scale=1.0, names=_NAMES, settings=None, seed=3, mask_px=4
) -> store.Manifest:
  return store.make_manifest(
    _variables(scale),
    names,
    settings=settings or {'kind': 'x', 'heads': (0, 2), 'num_parts': 9},
    seed=seed,
    mask_px=mask_px,
  )


def _masks(seed=0):
  return np.random.default_rng(seed).integers(0, 9, (3, 4, 4), np.uint8)


def test_masks_come_back(tmp_path):
  folder = tmp_path / 'new' / 'parts'
  store.save_masks(folder, _masks(), _manifest())
  np.testing.assert_array_equal(store.load_masks(folder, _manifest()), _masks())
  # The next round's replace them, and leave nothing behind.
  store.save_masks(folder, _masks(1), _manifest(seed=4))
  np.testing.assert_array_equal(
    store.load_masks(folder, _manifest(seed=4)), _masks(1)
  )
  assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(
  'change, words',
  [
    (dict(scale=2.0), ['encoder_sha256']),
    (dict(names=['a.jpg', 'b.jpg']), ['num_images is 3 there and 2 here']),
    (dict(names=['a.jpg', 'b.jpg', 'd.jpg']), ['names_sha256']),
    (dict(mask_px=8), ['mask_px is 4 there and 8 here']),
    (dict(seed=0), ['seed is 3 there and 0 here']),
    (dict(settings={'kind': 'y'}), ["settings.kind is 'x'", "'y' here"]),
  ],
)
def test_other_masks_are_refused_with_the_difference(tmp_path, change, words):
  store.save_masks(tmp_path, _masks(), _manifest())
  with pytest.raises(UserError) as caught:
    store.load_masks(tmp_path, _manifest(**change))
  assert all(word in str(caught.value) for word in words)


def test_missing_and_damaged_masks_are_explained(tmp_path):
  with pytest.raises(UserError, match='no part masks'):
    store.load_masks(tmp_path, _manifest())
  store.save_masks(tmp_path, _masks(), _manifest())
  (file,) = tmp_path.glob('masks-*.npz')
  whole = file.read_bytes()
  file.write_bytes(whole[:-9])
  with pytest.raises(UserError, match='cannot be read'):
    store.load_masks(tmp_path, _manifest())
  file.unlink()
  with pytest.raises(UserError, match='cannot be read'):
    store.load_masks(tmp_path, _manifest())
  for text in ('{', '[]', json.dumps({'format': 2}), json.dumps({'format': 1})):
    (tmp_path / 'manifest.json').write_text(text)
    with pytest.raises(UserError):
      store.load_masks(tmp_path, _manifest())


def test_masks_must_be_those_of_the_manifest(tmp_path):
  with pytest.raises(ValueError, match='not'):
    store.save_masks(tmp_path, _masks()[:2], _manifest())


def test_hash_knows_values_and_names_but_not_their_order():
  same = {'params': dict(reversed(_variables()['params'].items()))}
  assert store.hash_variables(same) == store.hash_variables(_variables())
  renamed = {'params': {'b': np.ones((2, 3)), 'c': np.zeros(4)}}
  hashes = {store.hash_variables(x) for x in (same, renamed, _variables(2))}
  assert len(hashes) == 3


def test_chunks_are_computed_once_even_after_an_interruption(tmp_path):
  folder = tmp_path / 'chunks'
  calls = []

  def compute():
    calls.append(1)
    return {'x': np.arange(3)}

  for _ in range(2):
    chunks = store.Chunks(folder, _manifest())
    np.testing.assert_array_equal(chunks.get('0', compute)['x'], np.arange(3))
  assert len(calls) == 1
  (folder / '0.npz').write_bytes(b'half')
  np.testing.assert_array_equal(chunks.get('0', compute)['x'], np.arange(3))
  assert len(calls) == 2
  with pytest.raises(UserError, match='seed is 3 there and 4 here'):
    store.Chunks(folder, _manifest(seed=4))
  chunks.remove()
  assert not folder.exists()


def test_contact_sheet(tmp_path):
  path = tmp_path / 'sheet.png'
  images = np.full((3, 4, 4, 3), 200, np.uint8)
  masks = np.zeros((3, 4, 4), np.uint8)
  masks[0, :2] = 1
  sheet.save_contact_sheet(
    path, images, masks, background=True, columns=2, cell_px=8
  )
  picture = np.asarray(Image.open(path))
  assert picture.shape == (20, 36, 3)
  np.testing.assert_array_equal(picture[:8, :8], 200)
  # The part is coloured, the background is grey and darker.
  part, background = picture[1, 9].astype(int), picture[6, 9].astype(int)
  assert np.ptp(part) > 50
  assert np.ptp(background) <= 2
  assert background.max() < 120


def test_colours_differ():
  colours = sheet.part_colours(16)
  assert len(np.unique(colours, axis=0)) == 16
