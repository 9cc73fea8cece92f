import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cmd_jax
from cmd_jax.errors import UserError
from cmd_jax.export.embed import load_embeddings
from cmd_jax.files.formats import check_format
from cmd_jax.parts import store
from cmd_jax.report.write import write_report
from cmd_jax.rundir.checkpoint import Checkpoints
from cmd_jax.rundir.saved_run import read_config
from cmd_jax.rundir.workdir import Workdir, read_json, write_json
from cmd_jax.training import loop
from tests.reliability import small_run

_OLD_RUN = pathlib.Path(__file__).parent / 'data' / 'old_run'


def _edit(path, **changes):
  write_json(path, {**read_json(path), **changes})


@pytest.fixture
def old_run(tmp_path, photos):
  """A run of a program without versions, after one step of six."""
  shutil.copytree(_OLD_RUN, tmp_path / 'run')
  workdir = Workdir(str(tmp_path / 'run'))
  dataset = read_json(workdir.config_file)['dataset']
  dataset['path'] = str(photos)
  _edit(workdir.config_file, dataset=dataset)
  built = small_run.build(read_config(workdir))
  _edit(workdir.results_file, data_sha256=built.data.sha256)
  state = built.init_state()
  checkpoints = Checkpoints(workdir.checkpoints, keep=3)
  checkpoints.save(
    state._replace(step=jnp.ones_like(state.step)),
    {'train_seconds': 1.0, 'parts_encoder_sha256': ''},
  )
  checkpoints.close()
  return workdir, built


@pytest.mark.usefixtures('unscored')
def test_an_old_run_is_read_reported_and_resumed(old_run, tmp_path, photos):
  workdir, built = old_run
  there = read_json(workdir.config_file)
  assert 'format_version' not in there
  assert 'remat' not in there['model']

  encoder = cmd_jax.load(workdir.path)
  assert encoder.source.endswith('after step 1')
  page = write_report(built, workdir, tmp_path / 'page.html', max_images=4)
  assert 'optim.base_learning_rate' in page.read_text()

  # The command of then, with the config file of now.
  config = small_run.make_config(photos)
  # What the file has changed since, the command must say.
  config.head.use_bn = False
  workdir.check(config.to_dict())
  with pytest.raises(UserError, match='seed is 0 there and 1 here'):
    workdir.check({**config.to_dict(), 'seed': 1})
  workdir.open(config.to_dict())
  results = loop.train(small_run.build(config), workdir)
  assert results['steps'] == 6
  assert [x['step'] for x in small_run.read_metrics(workdir)] == [2, 3, 4, 5, 6]
  for path in (workdir.config_file, workdir.results_file):
    assert read_json(path)['format_version'] == 1
  newest = workdir.checkpoints / '6' / 'meta' / 'metadata'
  assert read_json(newest)['format_version'] == 1


@pytest.mark.parametrize('name', ['config.json', 'results.json'])
def test_what_a_newer_program_wrote_is_refused_as_such(tmp_path, name):
  workdir = Workdir(str(tmp_path / 'run'))
  config = small_run.make_config(tmp_path).to_dict()
  workdir.open(config)
  workdir.update_results(steps=1)
  path = workdir.path / name
  _edit(path, format_version=99)
  before = path.read_bytes()
  reads = {
    'config.json': (
      lambda: workdir.check(config),
      lambda: workdir.open(config),
      lambda: read_config(workdir),
      lambda: cmd_jax.load(workdir.path),
    ),
    'results.json': (
      workdir.results,
      lambda: workdir.update_results(steps=2),
    ),
  }
  for read in reads[name]:
    with pytest.raises(UserError, match='made by a newer cmd_jax') as caught:
      read()
    assert str(path) in str(caught.value)
    assert 'format 99, this program reads up to 1' in str(caught.value)
    assert 'pip install -U' in str(caught.value)
  assert path.read_bytes() == before


def test_versions_are_whole_numbers():
  path = pathlib.Path('results.json')
  check_format({}, 1, path)
  check_format({'format_version': 1}, 1, path)
  for version in ('two', None, -1, 1.5, [1]):
    with pytest.raises(UserError, match='which is no version'):
      check_format({'format_version': version}, 1, path)


@pytest.mark.usefixtures('unscored')
def test_a_checkpoint_of_a_newer_program_is_refused(tmp_path, photos):
  workdir = Workdir(str(tmp_path / 'run'))
  built = small_run.build(small_run.make_config(photos))
  state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), built.state_like)
  checkpoints = Checkpoints(workdir.checkpoints, keep=3)
  checkpoints.save(
    state._replace(step=jnp.ones((), jnp.int32)), {'format_version': 99}
  )
  checkpoints.close()
  with pytest.raises(UserError, match='made by a newer cmd_jax'):
    loop.train(built, workdir)


def test_part_masks_and_vectors_of_a_newer_program_are_refused(tmp_path):
  record = tmp_path / 'parts' / 'manifest.json'
  record.parent.mkdir()
  write_json(record, {'format': 99})
  with pytest.raises(UserError, match='manifest.json was made by a newer'):
    store.load_masks(record.parent, None)

  path = tmp_path / 'vectors.npz'
  np.savez(
    path,
    file_names=np.array(['a.jpg']),
    vectors=np.zeros((1, 2), np.float32),
    format_version=np.array('99'),
  )
  with pytest.raises(UserError, match='vectors.npz was made by a newer'):
    load_embeddings(path, None)
