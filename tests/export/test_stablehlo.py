"""Networks as StableHLO, run in a process without this package."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from cmd_jax.errors import UserError
from cmd_jax.export.stablehlo import describe_stablehlo, to_stablehlo

_PROGRAM = """
import pathlib, sys
import jax, numpy as np
from jax import export
for folder in map(pathlib.Path, sys.argv[1:]):
  call = export.deserialize((folder / 'model').read_bytes()).call
  images = np.load(folder / 'images.npy')
  # Any number of images, which is a matter of no encoder.
  for count in (1, 5) if folder.name == 'vit' else (5,):
    results = call(images[:count])
    np.savez(folder / f'{count}.npz', **results)
assert not [name for name in sys.modules if name.split('.')[0] == 'cmd_jax']
assert 'flax' not in sys.modules
"""


def test_a_process_without_this_package_computes_the_same(
  draw_encoder, tmp_path
):
  wanted = {}
  for name, mil in (
    ('vit', True),
    ('padded swin', False),
    ('resnet', True),
    ('efficientnet', True),
  ):
    encoder, images, embedding, attention = draw_encoder(
      name, mil=mil, num_images=5
    )
    has_attention = attention is not None
    exported = to_stablehlo(encoder, attention=has_attention)
    folder = tmp_path / name.replace(' ', '_')
    folder.mkdir()
    (folder / 'model').write_bytes(exported.serialize())
    np.save(folder / 'images.npy', images)
    wanted[folder] = {'embedding': embedding}
    if has_attention:
      wanted[folder]['attention'] = attention
  subprocess.run(
    [sys.executable, '-c', _PROGRAM, *map(str, wanted)],
    cwd=tmp_path,
    check=True,
    timeout=120,
  )
  for folder, results in wanted.items():
    for count in (1, 5) if folder.name == 'vit' else (5,):
      with np.load(folder / f'{count}.npz') as file:
        got = dict(file)
      assert set(got) == set(results)
      for name, want in results.items():
        np.testing.assert_allclose(got[name], want[:count], atol=1e-6)


def test_canvases_are_viewed_as_by_the_encoder(draw_encoder):
  encoder, *_ = draw_encoder('vit', crop_fraction=0.8)
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (3, 20, 30, 3), np.uint8)
  made = [encoder.make_canvas(image) for image in images]
  canvases, sizes = (np.stack(column) for column in zip(*made))
  exported = to_stablehlo(encoder, canvases=True)
  got = jax.jit(exported.call)(canvases, sizes.astype(np.int32))
  want = encoder.embed(images)
  np.testing.assert_allclose(got['embedding'], want, atol=1e-6)
  assert describe_stablehlo(exported)['inputs'] == [
    {
      'name': 'canvases',
      'shape': ['batch', 16, 16, 3],
      'dtype': 'uint8',
      'layout': 'NHWC',
    },
    {'name': 'sizes', 'shape': ['batch', 2], 'dtype': 'int32'},
  ]


def test_it_is_for_all_platforms_and_any_batch(draw_encoder):
  encoder, *_ = draw_encoder('swin')
  exported = to_stablehlo(encoder)
  description = describe_stablehlo(exported)
  assert description['platforms'] == ['cpu', 'cuda', 'tpu']
  assert description['inputs'][0]['shape'] == ['batch', 16, 16, 3]
  assert description['outputs'] == [
    {'name': 'embedding', 'shape': ['batch', 16], 'dtype': 'float32'}
  ]
  encoder, *_ = draw_encoder('resnet')
  with pytest.raises(UserError, match='has no attention'):
    to_stablehlo(encoder, attention=True)
