"""Encoders to export, of random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.api import Encoder, Preprocessing
from cmd_jax.models import heads, make_encoder
from tests import tiny

_MODERN = dict(
  variant='Mu',
  width=16,
  depth=2,
  num_heads=2,
  image_px=16,
  patch_px=4,
  pool='mean',
  positions='rotary',
  ffn='swiglu',
  num_registers=2,
  layer_scale=1e-5,
)
# The encoder, and the side of the images.
_ENCODERS = {
  'vit': (lambda: tiny.make_tiny_encoder('vit'), 16),
  'vit on another grid': (lambda: tiny.make_tiny_encoder('vit'), 20),
  'modern vit': (lambda: make_encoder('vit', **_MODERN), 16),
  'bfloat16': (
    lambda: tiny.make_tiny_encoder('vit').clone(dtype=jnp.bfloat16),
    16,
  ),
  'swin': (lambda: tiny.make_tiny_encoder('swin'), 16),
  'padded swin': (lambda: tiny.make_tiny_encoder('swin').clone(window=3), 22),
  'resnet': (lambda: tiny.make_tiny_encoder('resnet'), 32),
  'efficientnet': (lambda: tiny.make_tiny_encoder('efficientnet'), 32),
}


def _draw(module, *args):
  return tiny.draw_like(jax.eval_shape(module.init, jax.random.key(0), *args))


@pytest.fixture
def draw_encoder():
  """Makes an encoder of `_ENCODERS`, with multi-instance attention or without.

  With `mil='strength'` its attention learns nothing. Returns also images for
  it, and what it and its attention say of them.
  """

  def make(name, *, mil=False, num_images=3, crop_fraction=None):
    make_module, side = _ENCODERS[name]
    module = make_module()
    images = np.random.default_rng(0).normal(size=(num_images, side, side, 3))
    images = images.astype(np.float32)
    # Parameters are those of the images that it is built for.
    variables = _draw(module, images[:1, :16, :16])
    output = jax.jit(module.apply)(variables, images)
    output = jax.device_get(output)
    attention = None if output.attention is None else output.attention.mean(1)
    head = mil_params = None
    if mil:
      head = heads.MilAttention(8, dtype=module.dtype)
      if mil == 'strength':
        head = heads.StrengthAttention(dtype=module.dtype)
      mil_params = _draw(head, output.tokens).get('params', {})
      attention = jax.jit(head.apply)({'params': mil_params}, output.tokens)
    encoder = Encoder(
      module,
      variables,
      Preprocessing(side, side, crop_fraction),
      source=name,
      mil=head,
      mil_params=mil_params,
      batch_size=8,
    )
    return encoder, images, output.image, attention

  return make
