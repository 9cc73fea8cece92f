"""The features of the last blocks against the encoders' own."""

import jax
import numpy as np
import pytest

from cmd_jax.models.last_blocks import last_blocks
from tests import tiny


def _apply(encoder):
  images = np.random.default_rng(0).normal(size=(2, 16, 16, 3))
  variables = tiny.draw_like(
    jax.eval_shape(encoder.init, jax.random.key(0), images)
  )
  features = jax.jit(
    lambda variables, images: last_blocks(encoder, variables, images)
  )(variables, images)
  return variables, images, jax.jit(encoder.apply)(variables, images), features


@pytest.mark.parametrize('pool', ['cls', 'mean'])
def test_of_a_vit_the_last_is_the_embedding(pool):
  encoder = tiny.make_tiny_encoder('vit').clone(pool=pool)
  variables, images, output, features = _apply(encoder)
  assert features.shape == (2, 2 * 16)
  np.testing.assert_allclose(features[:, 16:], output.image, atol=1e-5)
  # One block less is the encoder whose last block that is.
  shorter = encoder.clone(depth=1)
  params = {k: v for k, v in variables['params'].items() if k != 'block_1'}
  shorter_output = jax.jit(shorter.apply)({'params': params}, images)
  np.testing.assert_allclose(features[:, :16], shorter_output.image, atol=1e-5)


def test_of_a_swin_the_last_stage_alone_is_normalised():
  encoder = tiny.make_tiny_encoder('swin')
  variables, images, output, features = _apply(encoder)
  assert features.shape == (2, 8 + 8 + 16 + 16)
  np.testing.assert_allclose(features[:, -16:], output.image, atol=1e-5)
  _, state = jax.jit(
    lambda variables, images: encoder.apply(
      variables,
      images,
      capture_intermediates=lambda m, _: m.name == 'stage_0_block_1',
      mutable=['intermediates'],
    )
  )(variables, images)
  ((x, _),) = state['intermediates']['stage_0_block_1']['__call__']
  np.testing.assert_allclose(features[:, 8:16], x.mean((1, 2)), atol=1e-5)


@pytest.mark.parametrize('name', ['resnet', 'efficientnet'])
def test_of_a_convolutional_network_it_is_the_embedding(name):
  _, _, output, features = _apply(tiny.make_tiny_encoder(name))
  np.testing.assert_allclose(features, output.image, atol=1e-5)
