import numpy as np
import pytest
from PIL import Image

from cmd_jax.data import canvas
from cmd_jax.data.pipeline import lazy, worker
from cmd_jax.data.sources import base
from cmd_jax.errors import UserError

PX = 6
BROKEN = (3, 4, 9)


def _source(broken=(), count=10, masked=999, loaded=None):
  """Images of random pixels and sizes; loading a broken one raises."""

  def load(index):
    if loaded is not None:
      loaded.append(index)
    if index in broken:
      raise OSError(f'damaged {index}')
    rng = np.random.default_rng(index)
    shape = (8 + index, 9)
    image = Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8))
    part_ids = rng.integers(0, 5, shape, np.uint8)
    box = np.float32((0.1, 0.2, 0.3, 0.01 * index))
    return base.Example(image, part_ids if index < masked else None, box)

  return base.Source(
    name='birds/train',
    class_names=('wren',),
    file_names=tuple(f'{i}.png' for i in range(count)),
    labels=np.zeros(count, np.int32),
    load=load,
  )


def test_any_rows_are_those_of_canvases_in_memory():
  held = canvas.make_canvases(_source(), canvas_px=PX)
  made = lazy.lazy_canvases(_source(), canvas_px=PX)
  for field in ('images', 'sizes', 'part_ids', 'boxes'):
    ours, theirs = getattr(made, field), getattr(held, field)
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert (len(ours), ours.ndim) == (len(theirs), theirs.ndim)
    assert ours.nbytes == theirs.nbytes
    for rows in (slice(2, 5), [7, 0, 7], np.array([9, 1]), 3, slice(4, 4), -1):
      np.testing.assert_array_equal(ours[rows], theirs[rows])
    np.testing.assert_array_equal(np.asarray(ours), theirs)
    np.testing.assert_array_equal(list(ours), theirs)
    assert ours.max() == theirs.max()
  np.testing.assert_array_equal(made.labels, held.labels)
  assert made.file_names == held.file_names


def test_only_what_is_looked_at_is_decoded():
  loaded = []
  made = lazy.lazy_canvases(_source(loaded=loaded), canvas_px=PX)
  assert loaded == [0]
  loaded.clear()
  made.images[[5, 6]]
  # Sizes of what was decoded are known.
  np.testing.assert_array_equal(made.sizes[5:8], [(13, 9), (14, 9), (15, 9)])
  assert sorted(loaded) == [5, 6, 7]


def test_what_cannot_be_read_is_shown_as_the_next_and_loses_its_label():
  made = lazy.lazy_canvases(_source(BROKEN), canvas_px=PX)
  whole = lazy.lazy_canvases(_source(), canvas_px=PX)
  assert not made.skipped
  np.testing.assert_array_equal(made.images[[3]], whole.images[[5]])
  # 3 and 4 are known now, 9 is not.
  assert [skipped.file_name for skipped in made.skipped] == ['3.png', '4.png']
  np.testing.assert_array_equal(made.images[9], whole.images[0])
  assert tuple(made.skipped) == tuple(
    canvas.Skipped(f'{row}.png', f'damaged {row}') for row in BROKEN
  )
  assert np.flatnonzero(made.labels == base.UNLABELLED).tolist() == [3, 4, 9]
  assert ': 10 images, 7 used, 3 skipped\n' in canvas.skip_report(made)


def test_what_can_never_be_read_is_told():
  with pytest.raises(UserError, match=r'10 images in .* 0.png: damaged 0'):
    lazy.lazy_canvases(_source(range(10)), canvas_px=PX)
  with pytest.raises(UserError, match='100 images in a row .* 5.png'):
    worker.decode_readable(_source(range(200), count=300), 5, PX)
  with pytest.raises(UserError, match='canvas_px is 0'):
    lazy.lazy_canvases(_source(), canvas_px=0)


def test_masks_of_some_images_alone_are_refused():
  made = lazy.lazy_canvases(_source(masked=1), canvas_px=PX)
  with pytest.raises(UserError, match='1.png has no part mask'):
    made.part_ids.max()


def test_a_source_without_examples():
  made = lazy.lazy_canvases(_source(count=0), canvas_px=PX)
  assert made.images.shape == (0, PX, PX, 3)
  assert np.asarray(made.sizes).shape == (0, 2)
