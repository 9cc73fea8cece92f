import numpy as np
import pytest

from cmd_jax.errors import UserError
from cmd_jax.parts import baselines


def test_grid_cells_have_their_own_ids():
  masks = baselines.grid_masks(2, 12, num_cells=3)
  assert masks.shape == (2, 12, 12)
  assert masks.dtype == np.uint8
  np.testing.assert_array_equal(masks[0, ::4, ::4], np.arange(9).reshape(3, 3))
  np.testing.assert_array_equal(np.bincount(masks[1].ravel()), [16] * 9)


@pytest.mark.parametrize('num_cells', [0, 17])
def test_a_grid_that_cannot_be_is_refused(num_cells):
  with pytest.raises(UserError, match='num_cells'):
    baselines.grid_masks(1, 32, num_cells=num_cells)


def test_felzenszwalb_separates_what_looks_different():
  pytest.importorskip('skimage')
  images = np.zeros((2, 32, 32, 3), np.uint8)
  images[:, :, 20:] = 255
  images[1, :10, :10] = (255, 0, 0)
  masks = baselines.felzenszwalb_masks(
    images, scale=100, sigma=0.0, max_parts=2
  )
  np.testing.assert_array_equal(masks[0], images[0, :, :, 0] > 0)
  # The largest first; the third segment joins the second.
  assert masks[1][30, 5] == 0
  assert set(np.unique(masks[1])) == {0, 1}


def test_without_scikit_image_it_says_what_to_install(monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'skimage.segmentation', None)
  with pytest.raises(UserError, match=r'cmd_jax\[parts\]'):
    baselines.felzenszwalb_masks(np.zeros((1, 4, 4, 3), np.uint8))
