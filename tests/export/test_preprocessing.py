"""What the sidecar and docs/export.md say of preprocessing."""

import doctest
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image, ImageOps

from cmd_jax.api import Encoder, Preprocessing
from cmd_jax.data.augment.multi_crop import IMAGENET_STD, make_eval_view
from cmd_jax.export.preprocessing import describe_preprocessing
from tests import saved_runs, tiny

_DOCS = pathlib.Path(__file__).resolve().parents[2] / 'docs' / 'export.md'


def _documented_make_view():
  examples = doctest.DocTestParser().get_examples(_DOCS.read_text())
  (source,) = (x.source for x in examples if x.source.startswith('def make_v'))
  names = {'np': np, 'Image': Image, 'ImageOps': ImageOps}
  exec(source, names)
  return names['make_view']


@pytest.mark.parametrize('crop_fraction', [None, 0.875])
def test_pillow_alone_makes_the_views(tmp_path, crop_fraction):
  names = ['wide.png', 'high.jpg']
  saved_runs.write_images(tmp_path, names[:1], px=(150, 200))
  saved_runs.write_images(tmp_path, names[1:], px=(600, 390))
  encoder = Encoder(
    tiny.make_tiny_encoder(),
    {},
    Preprocessing(64, 48, crop_fraction),
    source='a test',
  )
  told = describe_preprocessing(encoder)
  assert len(told['steps']) == (2 if crop_fraction is None else 3)
  view = jax.jit(make_eval_view(view_px=48, crop_fraction=crop_fraction))
  for name in names:
    canvas, size = encoder.make_canvas(tmp_path / name)
    want = np.asarray(view(canvas[None], np.int32([size])))[0]
    got = _documented_make_view()(tmp_path / name, **told).transpose(1, 2, 0)
    # Pillow rounds to grey levels after each resize.
    assert np.abs((got - want) * IMAGENET_STD * 255).max() < 3
