"""The tiny models of tests/convert/families, and encoders that fit them."""

import functools
import pathlib

import jax
import numpy as np
from safetensors.numpy import save_file

from cmd_jax.models import make_encoder

_FOLDER = pathlib.Path(__file__).parent / 'families'

_VIT = dict(
  name='vit',
  width=16,
  depth=2,
  num_heads=2,
  image_px=32,
  patch_px=8,
  mlp_ratio=2.0,
  drop_path_rate=0.0,
)
_DINOV2 = _VIT | dict(layer_scale=1e-5)
_GATED = dict(ffn='swiglu', mlp_ratio=3.0)
_DINOV3 = _DINOV2 | dict(positions='rotary', norm_epsilon=1e-5)
_HF_VIT = _VIT | dict(norm_epsilon=1e-12)

# Keyword arguments of make_encoder.
ENCODERS = {
  'timm_vit': _VIT,
  'timm_registers': _DINOV2 | dict(image_px=28, patch_px=7, num_registers=4),
  'timm_registers_with_positions': _VIT | dict(num_registers=2),
  # timm counts both halves of a gated layer.
  'timm_swiglu': _DINOV2 | dict(ffn='swiglu', mlp_ratio=2.25, num_registers=4),
  'deit_distilled': _VIT | dict(num_registers=1),
  'timm_dinov3': _DINOV3 | dict(num_registers=4, ffn='swiglu', mlp_ratio=3.0),
  'timm_rotary': _DINOV3 | dict(num_registers=4),
  'timm_swin': dict(
    name='swin',
    image_px=32,
    patch_px=4,
    window=4,
    width=16,
    depths=(2, 2),
    num_heads=(2, 4),
    mlp_ratio=2.0,
    norm_epsilon=1e-5,
    drop_path_rate=0.0,
  ),
  'timm_resnet18': dict(name='resnet', variant='18', width_ratio=1 / 32),
  'timm_resnet50': dict(name='resnet', variant='50', width_ratio=1 / 32),
  'hf_vit': _HF_VIT,
  'hf_vit_classifier': _HF_VIT,
  'hf_dinov2': _DINOV2,
  'hf_dinov2_swiglu': _DINOV2 | _GATED,
  'hf_dinov2_registers': _DINOV2 | dict(num_registers=3),
  'hf_dinov3': _DINOV3 | dict(num_registers=3),
  'hf_dinov3_gated': _DINOV3
  | dict(num_registers=3, ffn='swiglu', mlp_ratio=3.0),
}
# What is exported with the names and shapes that it came with.
EXPORTED = (
  'timm_vit',
  'timm_registers',
  'timm_swiglu',
  'timm_rotary',
  'timm_swin',
  'timm_resnet18',
  'timm_resnet50',
)


def encoder_of(name, **changes):
  """The encoder that fits a fixture, or one that differs in some arguments."""
  return make_encoder(**ENCODERS[name] | changes)


@functools.cache
def arrays(name):
  """The arrays of a fixture by name."""
  with np.load(_FOLDER / f'{name}.npz') as file:
    return dict(file)


def weights(name, kind='w'):
  """The state dict of a fixture: published ('w') or of the class ('module')."""
  return {
    key.removeprefix(f'{kind}/'): value
    for key, value in arrays(name).items()
    if key.startswith(f'{kind}/')
  }


def write(path, tensors):
  """Writes a state dict as .safetensors and returns the path."""
  save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path)
  return path


@functools.cache
def _apply(encoder):
  return jax.jit(encoder.apply)


def features(encoder, variables, images):
  """Embeddings of torch's [B, 3, H, W]: (image [B, D], tokens [B, N, D])."""
  with jax.default_matmul_precision('highest'):
    output = _apply(encoder)(variables, np.moveaxis(images, 1, -1))
  return np.asarray(output.image), np.asarray(output.tokens)


def assert_same_features(name, encoder, variables):
  """Compares with what the real class computed."""
  expected = arrays(name)
  found = features(encoder, variables, expected['images'])
  for ours, theirs in zip(found, (expected['image'], expected['tokens'])):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
