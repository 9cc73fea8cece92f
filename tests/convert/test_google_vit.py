"""Google's ViTs: files as they save them, against a forward pass of its own."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

import cmd_jax
from cmd_jax.convert import files, google_vit, load, recognise, save
from cmd_jax.data.augment import multi_crop
from cmd_jax.errors import UserError
from cmd_jax.models import make_encoder
from tests import tiny

_WIDTH, _DEPTH, _HEADS, _PX, _PATCH = 16, 2, 2, 32, 8
# Positions without parameters are taken for images of this size.
_USUAL_PX = 224
_FIELDS = dict(
  width=_WIDTH,
  depth=_DEPTH,
  num_heads=_HEADS,
  image_px=_PX,
  patch_px=_PATCH,
  mlp_ratio=2.0,
  drop_path_rate=0.0,
  gelu='tanh',
)


class _Reference(nn.Module):
  """The published programs by Flax's own layers, in their names.

  The older program numbers the parts of a block together and gives the class
  token a position; the newer one has neither.
  """

  older: bool
  class_token: bool
  positions: bool = True

  @property
  def px(self):
    return _PX if self.positions else _USUAL_PX

  def _block(self, x, name):
    first, second, third = (1, 2, 3) if self.older else (0, 1, 0)

    def inside(kind, number, **options):
      return kind(**options, name=f'{name}~{kind.__name__}_{number}')

    y = inside(nn.LayerNorm, 0)(x)
    attention = nn.MultiHeadDotProductAttention
    x = x + inside(attention, first, num_heads=_HEADS)(y, y)
    y = inside(nn.LayerNorm, second)(x)
    y = nn.Dense(2 * _WIDTH, name=f'{name}~MlpBlock_{third}~Dense_0')(y)
    y = nn.Dense(_WIDTH, name=f'{name}~MlpBlock_{third}~Dense_1')(nn.gelu(y))
    return x + y

  @nn.compact
  def __call__(self, x):
    """[B, H, W, 3] from 0 to 1 -> tokens [B, M, D]."""
    side = _PATCH * self.px // _PX
    sides = (side, side)
    conv = nn.Conv(_WIDTH, sides, sides, padding='VALID', name='embedding')
    x = conv((x - 0.5) / 0.5).reshape(len(x), -1, _WIDTH)
    normal = nn.initializers.normal(1.0)
    count = x.shape[1] + (self.older and self.class_token)
    name = 'Transformer~posembed_input~pos_embedding'
    if not self.older:
      name = 'pos_embedding'
    positions = jnp.asarray(_sine_cosine(_PX // _PATCH))
    if self.positions:
      positions = self.param(name, normal, (1, count, _WIDTH))
    if not self.older:
      x = x + positions
    if self.class_token:
      token = self.param('cls', normal, (1, 1, _WIDTH))
      token = jnp.broadcast_to(token, (len(x), 1, _WIDTH))
      x = jnp.concatenate([token, x], axis=1)
    if self.older:
      x = x + positions
    for index in range(_DEPTH):
      x = self._block(x, f'Transformer~encoderblock_{index}')
    return nn.LayerNorm(name='Transformer~encoder_norm')(x)


def _sine_cosine(side):
  """One position after the other, by the formula of MoCo v3."""
  rows = []
  for y in range(side):
    for x in range(side):
      waves = [1e4 ** (-i / (_WIDTH // 4 - 1)) for i in range(_WIDTH // 4)]
      parts = [np.sin, x], [np.cos, x], [np.sin, y], [np.cos, y]
      rows.append([f(place * wave) for f, place in parts for wave in waves])
  return np.array([rows], np.float32)


def _draw(older, class_token, positions=True):
  """Images from 0 to 1, the tokens of the reference, and its parameters."""
  reference = _Reference(older, class_token, positions)
  shape = (2, reference.px, reference.px, 3)
  images = np.random.default_rng(0).random(shape, np.float32)
  variables = tiny.draw_like(
    jax.eval_shape(reference.init, jax.random.key(0), images)
  )
  with jax.default_matmul_precision('highest'):
    tokens = np.asarray(jax.jit(reference.apply)(variables, images))
  names = flatten_dict(variables['params'], sep='/')
  return images, tokens, {k.replace('~', '/'): v for k, v in names.items()}


def _normalised(images):
  mean, std = multi_crop.IMAGENET_MEAN, multi_crop.IMAGENET_STD
  return (images - np.float32(mean)) / np.float32(std)


def _stacked(arrays):
  """The blocks along a leading axis, as big_vision has them where it scans."""
  first = 'Transformer/encoderblock_0/'
  stacked = {k: v for k, v in arrays.items() if 'encoderblock_' not in k}
  for name in [name for name in arrays if name.startswith(first)]:
    rest = name.removeprefix(first)
    blocks = [
      arrays[f'Transformer/encoderblock_{i}/{rest}'] for i in range(_DEPTH)
    ]
    stacked[f'Transformer/encoderblock/{rest}'] = np.stack(blocks)
  return stacked


def _two_towers(arrays):
  towers = {f'params/img/{name}': x for name, x in _stacked(arrays).items()}
  text = {
    'params/txt/Embed_0/embedding': np.ones((9, _WIDTH), np.float32),
    'params/txt/Encoder_0/encoderblock_0/LayerNorm_0/scale': np.ones(3),
    'params/txt/pos_embedding': np.ones((1, 9, _WIDTH), np.float32),
    'params/t': np.zeros(1, np.float32),
  }
  state = {k.replace('params', 'opt/0/mu'): v + 1 for k, v in towers.items()}
  head = {
    'params/img/head/kernel': np.ones((_WIDTH, 3), np.float32),
    'params/img/MAPHead_0/probe': np.ones((1, 1, _WIDTH), np.float32),
    'params/img/MAPHead_0/LayerNorm_0/scale': np.ones(_WIDTH, np.float32),
  }
  return towers | text | state | head


def _with_head(arrays):
  return arrays | {
    'head/kernel': np.ones((_WIDTH, 3), np.float32),
    'head/bias': np.ones(3, np.float32),
    'pre_logits/kernel': np.ones((_WIDTH, 3), np.float32),
  }


def _of_optimiser(arrays):
  state = {f'opt/state/{k}/grad_ema': x + 1 for k, x in arrays.items()}
  return state | {f'opt/target/{k}': x for k, x in arrays.items()}


# Whether it is the older program, has a class token, has positions; and what
# else is in the file.
_CASES = {
  'vision_transformer': (True, True, True, _with_head),
  'an old optimiser': (True, True, True, _of_optimiser),
  'its mean of patches': (True, False, True, dict),
  'big_vision': (False, True, True, dict),
  'two towers, stacked': (False, False, True, _two_towers),
  'its mean of patches, newer': (False, False, True, dict),
  'sines and cosines': (False, False, False, dict),
}


@pytest.fixture(scope='module')
def drawn():
  """(case) -> images, tokens, parameters; each reference compiled once."""
  known = {}

  def get(case):
    key = _CASES[case][:3]
    if key not in known:
      known[key] = _draw(*key)
    return known[key]

  return get


def _encoder(case, **changes):
  _, class_token, positions, _ = _CASES[case]
  fields = _FIELDS | dict(
    class_token=class_token, pool='cls' if class_token else 'mean'
  )
  if not positions:
    fields |= dict(image_px=_USUAL_PX, patch_px=_PATCH * _USUAL_PX // _PX)
  return make_encoder('vit', **fields | changes)


def _write(path, case, arrays):
  np.savez(path, **_CASES[case][3](arrays))
  return path


def _apply(encoder, variables, images):
  with jax.default_matmul_precision('highest'):
    return jax.jit(encoder.apply)(variables, _normalised(images))


@pytest.mark.parametrize('case', _CASES)
def test_features_are_those_of_the_reference(tmp_path, drawn, case):
  images, expected, arrays = drawn(case)
  path = _write(tmp_path / 'weights.npz', case, arrays)
  encoder = _encoder(case)
  found = recognise.recognise_encoder(path)
  assert found.encoder == encoder
  report = found.imported.report
  assert report.family == google_vit.FAMILY
  assert not report.resized and not report.missing and not report.cast
  output = _apply(encoder, found.imported.variables, images)
  patches = expected[:, 1:] if encoder.class_token else expected
  image = expected[:, 0] if encoder.class_token else patches.mean(1)
  np.testing.assert_allclose(output.tokens, patches, rtol=0, atol=1e-5)
  np.testing.assert_allclose(output.image, image, rtol=0, atol=1e-5)
  told = ' '.join(report.notes)
  assert 'scaled to [-1, 1]' in told
  assert ('attention pooling' in told) == (case == 'two towers, stacked')
  assert ('sines and cosines' in told) == (case == 'sines and cosines')


def test_the_exact_gelu_is_another_network_and_is_told(tmp_path, drawn):
  case = 'vision_transformer'
  images, expected, arrays = drawn(case)
  path = _write(tmp_path / 'weights.npz', case, arrays)
  encoder = _encoder(case, gelu='exact')
  imported = load.load_encoder(path, encoder)
  assert any('gelu is exact' in note for note in imported.report.notes)
  output = _apply(encoder, imported.variables, images)
  assert np.abs(output.tokens - expected[:, 1:]).max() > 1e-4


def test_what_differs_is_refused_with_the_flags_that_fit(tmp_path, drawn):
  case = 'two towers, stacked'
  path = _write(tmp_path / 'weights.npz', case, drawn(case)[2])
  with pytest.raises(UserError) as caught:
    load.load_encoder(path, make_encoder('vit'))
  message = str(caught.value)
  for flag in ('class_token=false', 'pool=mean', 'gelu=tanh', 'num_heads=2'):
    assert f'--config.model.{flag}' in message.split()
  with pytest.raises(UserError, match='has 2 attention heads, the encoder has'):
    load.load_encoder(path, _encoder(case, num_heads=4))


def test_bfloat16_is_read_as_numpy_writes_it(tmp_path, drawn):
  case = 'big_vision'
  arrays = {
    name: np.asarray(x).astype(ml_dtypes.bfloat16)
    for name, x in drawn(case)[2].items()
  }
  path = tmp_path / 'weights.npz'
  np.savez(path, **arrays)
  with np.load(path) as written:
    assert written['cls'].dtype == np.dtype('V2')
  narrow = load.load_encoder(path, _encoder(case)).variables
  np.savez(path, **{k: x.astype(np.float32) for k, x in arrays.items()})
  wide = load.load_encoder(path, _encoder(case)).variables
  jax.tree.map(np.testing.assert_array_equal, narrow, wide)


def test_a_file_alone_makes_an_encoder_that_goes_out_again(tmp_path, drawn):
  case = 'its mean of patches'
  images, expected, arrays = drawn(case)
  path = _write(tmp_path / 'weights.npz', case, arrays)
  encoder = cmd_jax.load(path)
  assert encoder.module == _encoder(case)
  outputs = encoder(np.uint8(255 * images[0]))
  assert outputs.image.shape == (1, _WIDTH) and outputs.grid == (4, 4)
  # What a patch receives of all, as a Swin's.
  assert outputs.attention.shape == (1, 16)
  np.testing.assert_allclose(outputs.attention.sum(), 1, rtol=1e-5)
  assert "approximate='tanh'" in save.timm_constructor(encoder.module)
  assert 'class_token=False' in save.timm_constructor(encoder.module)
  again = tmp_path / 'again.safetensors'
  variables = jax.tree.map(np.asarray, encoder.variables)
  save.save_encoder(again, encoder.module, variables)
  read = recognise.recognise_encoder(again)
  assert read.encoder == encoder.module
  jax.tree.map(
    np.testing.assert_array_equal, read.imported.variables, variables
  )


def _hostile(arrays):
  empty = np.zeros((10**9, 0), np.float32)
  stacked = _stacked(arrays)
  less = {k: x for k, x in arrays.items() if 'embedding' not in k}
  block = 'Transformer/encoderblock_1'
  query = f'{block}/MultiHeadDotProductAttention_0/query/kernel'
  return {
    'a stack of nothing': stacked
    | {'Transformer/encoderblock/LayerNorm_0/scale': empty},
    'a stack of scalars': stacked
    | {'Transformer/encoderblock/LayerNorm_0/scale': np.float32(1)},
    'stacks of other heights': stacked
    | {'Transformer/encoderblock/LayerNorm_0/scale': np.ones((3, _WIDTH))},
    'heads that differ': arrays | {query: np.ones((_WIDTH, 3, 5))},
    'a kernel of two axes': arrays
    | {'embedding/kernel': np.ones((3, _WIDTH), np.float32)},
    'no bias': {k: x for k, x in arrays.items() if k != 'embedding/bias'},
    'no positions, empty patches': less
    | {
      'embedding/kernel': np.zeros((0, 0, 3, 10**9), np.float32),
      'embedding/bias': np.zeros(1, np.float32),
    },
    'no positions, patches of a pixel': less
    | {
      'embedding/kernel': np.zeros((1, 1, 3, _WIDTH), np.float32),
      'embedding/bias': np.zeros(_WIDTH, np.float32),
    },
    'values that are not finite': arrays
    | {'embedding/bias': np.full(_WIDTH, np.nan, np.float32)},
    'whole numbers': arrays
    | {'embedding/kernel': np.ones((_PATCH, _PATCH, 3, _WIDTH), np.int8)},
    'positions of no grid': arrays
    | {'pos_embedding': np.ones((1, 6, _WIDTH), np.float32)},
    'two namings at once': arrays
    | {'Transformer/encoderblock_0/LayerNorm_2/scale': np.ones(_WIDTH)},
    'a stem of convolutions': arrays
    | {'conv_root/kernel': np.ones((7, 7, 3, 64), np.float32)},
    'a part of no block': arrays
    | {'Transformer/encoderblock_0/Adapter_0/kernel': np.ones((3, 3))},
  }


@pytest.mark.parametrize('kind', _hostile({}))
def test_what_is_no_encoder_is_told_in_one_line(tmp_path, drawn, kind):
  path = tmp_path / 'weights.npz'
  np.savez(path, **_hostile(drawn('its mean of patches, newer')[2])[kind])
  with pytest.raises(UserError) as caught:
    recognise.recognise_encoder(path)
  assert str(caught.value).isprintable() and len(str(caught.value)) < 4000
  assert 'weights.npz' in str(caught.value)


def test_pickled_arrays_are_refused(tmp_path, drawn):
  path = tmp_path / 'weights.npz'
  np.savez(path, **drawn('big_vision')[2], extra=np.array([None, {}]))
  with pytest.raises(UserError, match="'extra' that is not numeric"):
    files.read_tensors(path)
