import jax
import numpy as np
import pytest

from cmd_jax.errors import UserError
from cmd_jax.models import make_encoder
from cmd_jax.models.feature_maps import check_facet, feature_map
from tests import tiny
from tests.tiny import make_tiny_encoder


def test_tokens_and_keys_of_a_vit_keep_their_places():
  encoder = make_tiny_encoder()
  images = tiny.normal(2, 16, 16, 3)
  variables = tiny.draw_like(
    jax.eval_shape(encoder.init, jax.random.key(1), images)
  )
  tokens, keys = (
    jax.jit(feature_map, static_argnums=(0, 3))(
      encoder, variables, images, facet
    )
    for facet in ('token', 'key')
  )
  assert tokens.shape == keys.shape == (2, 4, 4, 16)
  assert not np.allclose(tokens, keys)
  output = jax.jit(encoder.apply)(variables, images)
  np.testing.assert_allclose(
    tokens.reshape(2, 16, 16), output.tokens, rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize(
  'name, facet, word',
  [('vit', 'query', 'token, key'), ('swin', 'key', 'encoder=vit')],
)
def test_facets_that_are_not_there_are_refused(name, facet, word):
  with pytest.raises(UserError, match=word):
    check_facet(make_tiny_encoder(name), facet)


def test_a_residual_network_has_its_last_stage_at_half_the_stride():
  encoder = make_encoder('resnet', variant='Mu', width_ratio=0.25)
  images = tiny.normal(1, 64, 64, 3)
  shapes = jax.eval_shape(
    lambda: feature_map(
      encoder, encoder.init(jax.random.key(1), images), images
    )
  )
  assert shapes.shape[:3] == (1, 4, 4)
