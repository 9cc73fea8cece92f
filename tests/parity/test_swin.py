"""Swin encoder against the released swin_transformer.py."""

import functools

import jax
import numpy as np
import pytest
from flax import linen as nn

from cmd_jax.convert import entries, heads, swin
from cmd_jax.models import swin as models
from cmd_jax.models.heads import PrototypeHead
from tests.parity import golden

_DEPTHS = {'swin_forward': (2, 2), 'swin3_forward': (2, 2, 2)}
_HEADS = {'swin_forward': (2, 4), 'swin3_forward': (2, 4, 4)}
_SIZES = (32, 26, 24)
_HEAD = PrototypeHead(
  num_prototypes=64, hidden_dim=96, bottleneck_dim=24, norm_last_layer=False
)

_files = pytest.mark.parametrize(
  'golden_file',
  [file for name in _DEPTHS for file in golden.require(f'{name}_s*.npz')],
)


@pytest.fixture(autouse=True)
def _exact():
  with jax.default_matmul_precision('highest'):
    yield


def _close(ours, theirs):
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def _apply(module, variables, x):
  return module.apply(variables, x)


class _Model:
  """Encoder and heads with the weights of a fixture."""

  def __init__(self, golden_file):
    self.fixture = golden.Fixture(golden_file)
    name = golden_file.stem.rpartition('_s')[0]
    self.encoder = models.make_swin(
      variant='Mu',
      image_px=32,
      patch_px=2,
      window=4,
      width=24,
      depths=_DEPTHS[name],
      num_heads=_HEADS[name],
      drop_path_rate=0.0,
    )
    self.weights = swin.from_official(self.fixture.under('w/'))
    self.variables = entries.from_torch(
      swin.entries(self.encoder), self.weights
    )

    # Compiled once a size, for all tests.
    @jax.jit
    def encode(images):
      return self.encoder.apply(
        self.variables,
        images,
        capture_intermediates=lambda module, _: isinstance(
          module, models.Block
        ),
      )

    self._encode = encode

  def encode(self, images):
    """Output, and (features, attention) of every block in order."""
    output, state = jax.device_get(self._encode(images))
    blocks = state['intermediates']
    return output, [
      blocks[f'stage_{stage}_block_{block}']['__call__'][0]
      for stage, depth in enumerate(self.encoder.depths)
      for block in range(depth)
    ]

  def images(self, px):
    return golden.images(self.fixture[f'in/images{px}'])

  def head(self, prefix, x):
    table = heads.entries(_HEAD, prefix)
    return _apply(_HEAD, entries.from_torch(table, self.weights), x)


_model = functools.cache(_Model)


@_files
@pytest.mark.parametrize('px', _SIZES)
def test_embeddings_and_logits(golden_file, px):
  model = _model(golden_file)
  output, _ = model.encode(model.images(px))
  expected = model.fixture.under(f'out/s{px}/')
  _close(output.image, expected['cls'])
  _close(output.tokens, expected['patches'])
  _close(model.head('head.', output.image), expected['head'])
  logits = model.head('head_dense.', output.tokens)
  _close(logits.reshape(-1, 64), expected['head_dense'])


@_files
@pytest.mark.parametrize('px', _SIZES)
def test_attention_of_the_blocks(golden_file, px):
  model = _model(golden_file)
  expected = model.fixture.under(f'out/s{px}/')
  _, blocks = model.encode(model.images(px))
  attentions = [
    weights.reshape(-1, *weights.shape[2:]) for _, weights in blocks
  ]
  _close(attentions[-1], expected['last_selfattention'])
  # Stored for one size only, the one with padding.
  if px == 26:
    for index, attention in enumerate(attentions):
      _close(attention, expected[f'all_selfattention{index}'])


@_files
@pytest.mark.parametrize('px', _SIZES)
def test_features_of_the_last_blocks(golden_file, px):
  model = _model(golden_file)
  norm = nn.LayerNorm(model.encoder.norm_epsilon)
  params = {'params': model.variables['params']['norm']}
  last_width = model.encoder.width * 2 ** (len(model.encoder.depths) - 1)
  _, blocks = model.encode(model.images(px))
  means = []
  for features, _ in blocks[-3:]:
    # The released function norms the features of the last stage only.
    if features.shape[-1] == last_width:
      features = _apply(norm, params, features)
    means.append(features.mean((1, 2)))
  expected = model.fixture[f'out/s{px}/n_last_blocks3']
  _close(np.concatenate(means, -1), expected)


@_files
def test_multicrop(golden_file):
  model = _model(golden_file)
  large, small = model.images(32), model.images(24)
  crops = [large, large[::-1], small, small[::-1], 0.5 * small]
  outputs = [model.encode(crop)[0] for crop in crops]
  image = np.concatenate([output.image for output in outputs])
  region = np.concatenate(
    [output.tokens.reshape(-1, image.shape[1]) for output in outputs]
  )
  expected = model.fixture.under('out/multicrop/')
  _close(model.head('head.', image), expected['cls_logits'])
  _close(region, expected['region_fea'])
  _close(model.head('head_dense.', region), expected['region_logits'])
  counts = [outputs[index].tokens.shape[1] for index in (0, 2)]
  np.testing.assert_array_equal(counts, expected['npatch'])


@_files
def test_weights_leave_as_they_came(golden_file):
  model = _model(golden_file)
  back = entries.to_torch(swin.entries(model.encoder), model.variables)
  assert set(back) == {
    name for name in model.weights if not name.startswith('head')
  }
  for name, value in back.items():
    np.testing.assert_array_equal(value, model.weights[name])


def test_official_names_become_those_of_timm():
  encoder = models.make_swin(
    variant='Mu', depths=(1, 1, 1), num_heads=(1, 1, 1)
  )
  names = [entry.name for entry in swin.entries(encoder)]
  # The merging comes before the blocks in timm, after them in the original.
  merged = {
    f'layers.{i}.downsample.': f'layers.{i - 1}.downsample.' for i in (1, 2)
  }
  official = {}
  for name in names:
    head, part, tail = name.partition('downsample.')
    official[merged.get(head + part, head + part) + tail] = name
  buffers = [
    'layers.0.blocks.0.attn.relative_position_index',
    'layers.0.blocks.1.attn_mask',
  ]
  renamed = swin.from_official(official | dict.fromkeys(buffers))
  assert renamed == {name: name for name in names}
  assert swin.from_official(renamed) == renamed
