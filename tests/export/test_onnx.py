"""Networks as ONNX, run by onnxruntime."""

import numpy as np
import onnxruntime
import pytest

from cmd_jax.errors import UserError
from cmd_jax.export import onnx


def _run(model, images):
  session = onnxruntime.InferenceSession(model.SerializeToString())
  names = [output.name for output in session.get_outputs()]
  inputs = {'images': images.transpose(0, 3, 1, 2)}
  return dict(zip(names, session.run(names, inputs), strict=True))


@pytest.mark.parametrize(
  'name, mil',
  [
    ('vit', True),
    ('vit on another grid', False),
    ('modern vit', False),
    ('swin', True),
    ('padded swin', False),
    ('resnet', True),
    ('efficientnet', 'strength'),
  ],
)
def test_it_computes_what_the_encoder_computes(draw_encoder, name, mil):
  encoder, images, embedding, attention = draw_encoder(name, mil=mil)
  has_attention = attention is not None
  model = onnx.to_onnx(encoder, attention=has_attention)
  for count in (1, 3):
    got = _run(model, images[:count])
    np.testing.assert_allclose(got['embedding'], embedding[:count], atol=1e-5)
    if has_attention:
      np.testing.assert_allclose(got['attention'], attention[:count], atol=1e-6)


def test_depthwise_convolutions_stay_convolutions(draw_encoder):
  encoder, *_ = draw_encoder('efficientnet')
  nodes = onnx.to_onnx(encoder).graph.node
  groups = [
    attribute.i
    for node in nodes
    if node.op_type == 'Conv'
    for attribute in node.attribute
    if attribute.name == 'group'
  ]
  # The stem, and one in each of the seven blocks: of its own width, then six
  # times that of the block before.
  assert groups == [1, 32, 12, 18, 24, 36, 48, 72]


def test_attention_is_left_out_or_refused(draw_encoder):
  encoder, images, embedding, _ = draw_encoder('vit', mil=True)
  got = _run(onnx.to_onnx(encoder), images)
  assert got.keys() == {'embedding'}
  np.testing.assert_allclose(got['embedding'], embedding, atol=1e-5)
  encoder, *_ = draw_encoder('resnet')
  with pytest.raises(UserError, match='resnet has no attention: leave out'):
    onnx.to_onnx(encoder, attention=True)


def test_bfloat16_is_computed_in_float32(draw_encoder):
  encoder, images, embedding, _ = draw_encoder('bfloat16')
  _, _, exact, _ = draw_encoder('vit')
  got = _run(onnx.to_onnx(encoder), images)['embedding']
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, exact, atol=1e-5)
  assert np.abs(embedding - exact).max() > 1e-4


def test_the_model_describes_itself(draw_encoder):
  encoder, *_ = draw_encoder('vit', mil=True)
  model = onnx.to_onnx(encoder, attention=True)
  assert onnx.describe_onnx(model) == {
    'inputs': [
      {
        'name': 'images',
        'shape': ['batch', 3, 16, 16],
        'dtype': 'float32',
        'layout': 'NCHW',
      }
    ],
    'outputs': [
      {'name': 'embedding', 'shape': ['batch', 16], 'dtype': 'float32'},
      {'name': 'attention', 'shape': ['batch', 16], 'dtype': 'float32'},
    ],
    'opset': 18,
    'ir_version': 8,
  }
  names = {tensor.name for tensor in model.graph.initializer}
  assert 'encoder.params.block_0.attn.qkv.kernel' in names
  assert 'mil.params.hidden.kernel' in names


def test_what_is_too_large_is_refused(draw_encoder, monkeypatch):
  encoder, *_ = draw_encoder('vit')
  monkeypatch.setattr(onnx, '_MAX_BYTES', 10_000)
  with pytest.raises(UserError, match='holds 2: use --format=stablehlo'):
    onnx.to_onnx(encoder)


@pytest.mark.parametrize('name, mil', [('vit', True), ('resnet', False)])
def test_float16_has_half_the_size_and_nearly_the_same_features(
  draw_encoder, name, mil
):
  encoder, images, embedding, _ = draw_encoder(name, mil=mil)
  exact = onnx.to_onnx(encoder, attention=mil)
  half = onnx.to_onnx(encoder, attention=mil, dtype='float16')
  got, want = _run(half, images), _run(exact, images)
  for output, values in got.items():
    assert values.dtype == np.float32
    scale = np.abs(want[output]).max()
    difference = np.abs(values - want[output]).max() / scale
    assert 0 < difference < 5e-3, output

  def bytes_of_weights(model):
    return sum(len(x.raw_data) for x in model.graph.initializer)

  assert bytes_of_weights(half) < 0.6 * bytes_of_weights(exact)


def test_float16_refuses_weights_that_it_cannot_hold(draw_encoder):
  encoder, *_ = draw_encoder('vit')
  kernel = encoder.variables['params']['patch_embed']['kernel']
  encoder.variables['params']['patch_embed']['kernel'] = kernel * 1e7
  with pytest.raises(UserError, match='ends at 65504: leave out --dtype'):
    onnx.to_onnx(encoder, dtype='float16')
