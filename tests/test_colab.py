"""The notebook, run from its first cell to its last."""

import base64
import io
import pathlib

import jax
import nbclient
import nbformat
import numpy as np
import pytest
from PIL import Image

from cmd_jax.cli import program
from cmd_jax.convert.save import save_encoder
from tests import saved_runs, tiny

_REPO = pathlib.Path(__file__).resolve().parents[1]
_CELL_PX, _SHOWN = 128 + 2 * 3, 4


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
  path = tmp_path_factory.mktemp('photographs')
  saved_runs.write_images(path, [f'{index:02}.png' for index in range(12)])
  return path


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """The work directory of a run on toybirds."""
  root = tmp_path_factory.mktemp('colab')
  status = program.run(
    [
      'train',
      f'--workdir={root / "run"}',
      '--config=toybirds:quicktest',
      '--compilation_cache=',
      '--config.dataset.builder_config=quicktest',
      f'--config.dataset.data_dir={root / "tfds"}',
      '--config.total_epochs=1',
      '--config.augment.num_local=0',
      '--config.model.depth=1',
      '--config.parallel.num_devices=1',
      "--config.eval.protocols=('knn/20',)",
    ]
  )
  assert status == 0
  return root / 'run'


def _read():
  return nbformat.read(_REPO / 'colab' / 'evaluate.ipynb', as_version=4)


def _execute(workdir, weights, photographs):
  """What the notebook prints, and the pictures it shows."""
  notebook = _read()
  (parameters,) = (
    cell
    for cell in notebook.cells
    if 'parameters' in cell.metadata.get('tags', ())
  )
  named = dict(WORKDIR=workdir, WEIGHTS=weights, IMAGES=photographs)
  assert all(f'{name} = ' in parameters.source for name in named)
  lines = [f'{name} = {str(value)!r}' for name, value in named.items()]
  parameters.source = '\n'.join([*lines, f'NUM_SHOWN = {_SHOWN}'])
  client = nbclient.NotebookClient(notebook, timeout=300, kernel_name='python3')
  client.execute()
  outputs = [x for cell in notebook.cells for x in cell.get('outputs', ())]
  printed = ''.join(x.text for x in outputs if x.get('name') == 'stdout')
  encoded = [x.data['image/png'] for x in outputs if 'data' in x]
  pictures = [
    np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
    for text in encoded
  ]
  return printed, pictures


# The cells of a file of weights are looked at always.
@pytest.mark.slow
def test_a_run_is_shown(workdir, photographs):
  printed, (attention, found) = _execute(workdir, '', photographs)
  assert f'teacher of {workdir} after step' in printed
  assert 'knn/20/top1' in printed and 'trained' in printed
  assert '12 photographs, 0 unreadable' in printed
  assert attention.shape == (2 * _CELL_PX, _SHOWN * _CELL_PX, 3)
  assert found.shape == (_SHOWN * _CELL_PX, (_SHOWN + 1) * _CELL_PX, 3)
  above, below = np.split(attention.astype(int), 2)
  assert above.mean() > below.mean() + 10
  # Whatever is searched with is found first.
  for row in range(_SHOWN):
    cell = slice(row * _CELL_PX, (row + 1) * _CELL_PX)
    np.testing.assert_array_equal(found[cell, :_CELL_PX], above[:, cell])


def test_a_weight_file_is_shown(photographs, tmp_path):
  module = tiny.make_tiny_encoder('resnet')
  images = jax.ShapeDtypeStruct((1, 16, 16, 3), np.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), images)
  weights = tmp_path / 'resnet.safetensors'
  save_encoder(weights, module, tiny.draw_like(shapes))
  printed, (found,) = _execute('', weights, photographs)
  assert 'this encoder has no attention' in printed
  assert 'knn' not in printed
  assert found.shape == (_SHOWN * _CELL_PX, (_SHOWN + 1) * _CELL_PX, 3)


def test_it_installs_the_package_first_and_is_kept_without_outputs():
  code = [cell for cell in _read().cells if cell.cell_type == 'code']
  assert 'pip install' in code[0].source and 'cmd_jax' in code[0].source
  for cell in code:
    assert not cell.outputs and cell.execution_count is None
