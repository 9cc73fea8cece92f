"""Encoders of the published sizes, as docs/export.md lists them.

pytest -m slow tests/export/test_full_size.py -s
"""

import jax
import numpy as np
import onnxruntime
import pytest

from cmd_jax.api import Encoder, Preprocessing
from cmd_jax.export.onnx import to_onnx
from cmd_jax.export.stablehlo import to_stablehlo
from cmd_jax.models import make_encoder

_MODERN = dict(variant='S', patch_px=14, num_registers=4, layer_scale=1e-5)
_ENCODERS = {
  'ViT-S/16': ('vit', dict(variant='S')),
  'ViT-S/14 with registers and layer scale': ('vit', _MODERN),
  'Swin-T, window 7': ('swin', dict(variant='T')),
  'ResNet-50': ('resnet', dict(variant='50')),
}


def _draw(shapes):
  """Weights that keep the size of the features as they go through."""
  rng = np.random.default_rng(0)

  def draw(path, like):
    values = rng.normal(size=like.shape).astype(np.float32)
    kind = path[-1].key
    if kind == 'kernel':
      return values * np.float32((2 / np.prod(like.shape[:-1])) ** 0.5)
    if kind in ('scale', 'var'):
      return 1 + np.abs(values) / 10
    return values / 50

  return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.slow
@pytest.mark.parametrize('name', _ENCODERS)
def test_it_computes_what_the_encoder_computes(name, record_property):
  architecture, fields = _ENCODERS[name]
  module = make_encoder(architecture, **fields)
  rng = np.random.default_rng(1)
  images = rng.normal(size=(3, 224, 224, 3)).astype(np.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), images)
  variables = _draw(shapes)
  want = np.asarray(jax.jit(module.apply)(variables, images).image)
  preprocessing = Preprocessing(256, 224, 0.875)
  encoder = Encoder(module, variables, preprocessing, source=name, batch_size=8)
  size = np.abs(want).max()

  content = to_onnx(encoder).SerializeToString()
  session = onnxruntime.InferenceSession(content)
  by_onnx = 0.0
  for count in (1, 3):
    inputs = {'images': images[:count].transpose(0, 3, 1, 2)}
    (got,) = session.run(['embedding'], inputs)
    by_onnx = max(by_onnx, np.abs(got - want[:count]).max() / size)

  halves = to_onnx(encoder, dtype='float16').SerializeToString()
  session = onnxruntime.InferenceSession(halves)
  (got,) = session.run(['embedding'], inputs)
  by_halves = np.abs(got - want).max() / size

  serialised = to_stablehlo(encoder).serialize()
  call = jax.jit(jax.export.deserialize(serialised).call)
  by_stablehlo = np.abs(call(images)['embedding'] - want).max() / size
  megabytes = len(content) / 1e6
  record_property(
    'counted',
    f'{name} exported: differs by {by_onnx:.1e} (ONNX, {megabytes:.0f} MB), '
    f'{by_halves:.1e} (float16, {len(halves) / 1e6:.0f} MB) and '
    f'{by_stablehlo:.1e} (StableHLO)',
  )
  assert by_onnx < 1e-5 and by_stablehlo < 1e-5 and by_halves < 2e-2
