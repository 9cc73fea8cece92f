"""Runs on images of other than three channels, from files to exports."""

import json

import numpy as np
import onnxruntime
import pytest
from PIL import Image

import cmd_jax
from cmd_jax.config import builtin
from cmd_jax.errors import UserError
from cmd_jax.export.model import Request, export_model
from cmd_jax.training import experiment


def _write(path, count):
  rng = np.random.default_rng(count)
  path.mkdir()
  for number in range(6):
    planes = rng.integers(0, 3000, (count, 20, 24)).astype(np.uint16)
    pages = [Image.fromarray(plane * (i + 1)) for i, plane in enumerate(planes)]
    pages[0].save(
      path / f'{number}.tif', save_all=True, append_images=pages[1:]
    )


def _config(path, count, words='encoder=vit', **fields):
  config = builtin.folder(f'method=dino,start=scratch,quicktest,{words}')
  config.dataset.path = str(path)
  config.update(batch_size=2, total_epochs=1, min_steps=0, canvas_px=16)
  config.augment.update(global_px=16, local_px=16, num_local=0)
  config.eval.update(view_px=16, crop_fraction=0.0, protocols=())
  if 'vit' in words:
    config.model.update(width=16, depth=1, num_heads=2, image_px=16, patch_px=8)
  else:
    config.model.update(width_ratio=0.25)
  config.model.channels = count
  config.parallel.num_devices = 1
  config.update(fields)
  return config


@pytest.mark.parametrize(
  'count, words', [(1, 'encoder=resnet'), (5, 'encoder=vit')]
)
def test_a_run_trains_loads_and_exports(tmp_path, count, words):
  images, run = tmp_path / 'images', tmp_path / 'run'
  _write(images, count)
  results = cmd_jax.train(_config(images, count, words), run)
  lines = (run / 'metrics.jsonl').read_text().splitlines()
  assert results['steps'] == len(lines) == 3
  means = results['image_statistics']['mean']
  want = [1500 * (i + 1) / 65535 for i in range(count)]
  np.testing.assert_allclose(means, want, rtol=0.1)
  assert all(np.isfinite(json.loads(line)['loss']) for line in lines)

  encoder = cmd_jax.load(run)
  assert encoder.preprocessing['mean'] == means
  paths = [images / '0.tif', images / '1.tif']
  embedding = encoder.embed(paths)
  export_model(Request(str(run), format='onnx'))
  told = json.loads((run / 'encoder.onnx.json').read_text())
  assert told['inputs'][0]['shape'] == ['batch', count, 16, 16]
  canvases = np.stack([encoder.make_canvas(path)[0] for path in paths])
  fields = told['preprocessing']
  views = (canvases / 65535 - fields['mean']) / fields['std']
  session = onnxruntime.InferenceSession(run / 'encoder.onnx')
  (got,) = session.run(
    ['embedding'], {'images': np.float32(views.transpose(0, 3, 1, 2))}
  )
  np.testing.assert_allclose(got, embedding, atol=2e-2)
  with pytest.raises(UserError, match='--format=safetensors does not know'):
    export_model(Request(str(run)))


@pytest.mark.parametrize(
  'words, fields, told',
  [
    (
      'encoder=vit',
      {'init': {'path': 'x.pth'}},
      'are for 3: start from nothing',
    ),
    ('encoder=vit', {'method': {'teacher': {}}}, 'for photographs, of 3'),
    ('encoder=vit', {'parts': {'source': 'grid'}}, 'for photographs, of 3'),
  ],
)
def test_what_is_for_photographs_is_refused(tmp_path, words, fields, told):
  _write(tmp_path / 'images', 2)
  config = _config(tmp_path / 'images', 2, words)
  with config.unlocked():
    config.update(fields)
  with pytest.raises(UserError, match=told):
    experiment.build(config)


def test_images_of_other_channels_are_told(tmp_path):
  _write(tmp_path / 'images', 2)
  config = _config(tmp_path / 'images', 4)
  with pytest.raises(
    UserError, match='has 2 channels, and config.model.channe'
  ):
    experiment.build(config)
