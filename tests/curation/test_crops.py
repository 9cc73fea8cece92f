import numpy as np
import pytest
from PIL import Image, ImageOps

from cmd_jax.curation.crops import GREY_PX, find_part, make_greys
from tests.stub_encoder import CANVAS_PX, draw_photograph


def _grey(image):
  canvas = np.array(image.resize((CANVAS_PX, CANVAS_PX)))
  return make_greys(canvas[None])[0], np.array([image.height, image.width])


def _find(whole, part):
  (whole, whole_size), (part, part_size) = map(_grey, (whole, part))
  return find_part(whole, part, whole_size, part_size)


@pytest.mark.parametrize(
  'box',
  [(0, 0, 96, 96), (10, 5, 80, 75), (30, 38, 90, 90), (0, 20, 96, 80)],
)
@pytest.mark.parametrize('mirrored', [False, True])
def test_a_part_is_found_wherever_it_lies(box, mirrored):
  whole = draw_photograph(0)
  part = whole.crop(box)
  if mirrored:
    part = ImageOps.mirror(part)
  # Another size in pixels changes nothing.
  part = part.resize((2 * part.width, 2 * part.height))
  match = _find(whole, part)
  assert match.correlation > 0.95 and match.is_mirrored == mirrored
  width, height = box[2] - box[0], box[3] - box[1]
  assert match.share == pytest.approx(width * height / 96**2, abs=0.06)


def test_the_correlation_is_that_of_the_pixels():
  whole = draw_photograph(1, side=GREY_PX)
  darker = Image.fromarray((np.array(whole) * 0.5 + 20).astype(np.uint8))
  match = _find(whole, darker)
  a, b = (_grey(x)[0].astype(float).ravel() for x in (whole, darker))
  assert match.correlation == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-3)


def test_other_photographs_and_flat_ones_have_no_part_of_it():
  whole = draw_photograph(2)
  for seed in range(3, 9):
    assert _find(whole, draw_photograph(seed)).correlation < 0.85
  flat = Image.new('RGB', (50, 50), 'white')
  assert _find(whole, flat).correlation < 0
  assert _find(flat, whole).correlation < 0.5
