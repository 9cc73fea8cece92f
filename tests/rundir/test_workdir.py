import copy
import json

import pytest

from cmd_jax.errors import UserError
from cmd_jax.rundir import workdir as workdir_lib
from cmd_jax.rundir.workdir import Workdir

CONFIG = {
  'seed': 0,
  'batch_size': 32,
  'dataset': {'name': 'toybirds', 'data_dir': ''},
  'augment': {'global_scale': (0.4, 1.0)},
  'eval': {'protocols': ('knn/20',)},
  'checkpoint': {'every_steps': 10},
  'log': {'every_steps': 1},
  'parallel': {'mode': 'jit'},
}


def _changed(**fields):
  config = copy.deepcopy(CONFIG)
  for path, value in fields.items():
    *parents, last = path.split('__')
    node = config
    for parent in parents:
      node = node[parent]
    node[last] = value
  return config


def test_the_config_is_recorded_and_the_same_command_is_let_in(tmp_path):
  workdir = Workdir(str(tmp_path / 'a' / 'b'))
  workdir.check(CONFIG)
  assert not workdir.path.exists()
  workdir.open(CONFIG)
  recorded = json.loads(workdir.config_file.read_text())
  assert recorded.pop('format_version') == 1
  assert recorded == json.loads(json.dumps(CONFIG))
  # Tuples have become lists in the file and still count as equal.
  workdir.open(CONFIG)
  workdir.open(_changed(augment__global_scale=[0.4, 1.0]))


def test_drift_names_each_field_with_both_values(tmp_path):
  workdir = Workdir(str(tmp_path))
  workdir.open(CONFIG)
  before = workdir.config_file.read_bytes()
  changed = _changed(seed=1, augment__global_scale=(0.3, 1.0), optim={'b1': 1})
  with pytest.raises(UserError) as error:
    workdir.open(changed)
  message = str(error.value)
  assert '\n' not in message
  assert str(tmp_path) in message
  assert 'seed is 0 there and 1 here' in message
  assert 'augment.global_scale is [0.4, 1.0] there and [0.3, 1.0]' in message
  assert 'optim.b1 is missing there and 1 here' in message
  assert 'batch_size' not in message
  assert workdir.config_file.read_bytes() == before


def test_a_long_list_of_differences_is_cut_short(tmp_path):
  workdir = Workdir(str(tmp_path))
  workdir.open({f'field{i}': i for i in range(7)})
  with pytest.raises(UserError, match=r'field3 is 3 .* and 3 more\)'):
    workdir.check({f'field{i}': -1 for i in range(7)})


@pytest.mark.parametrize(
  'fields',
  [
    {'dataset__data_dir': '/elsewhere'},
    {'eval__protocols': ('linear/logreg',)},
    {'checkpoint__every_steps': 99},
    {'log__every_steps': 99},
    {'parallel__mode': 'pmap'},
  ],
)
def test_fields_that_change_no_result_may_differ(tmp_path, fields):
  workdir = Workdir(str(tmp_path))
  workdir.open(CONFIG)
  workdir.open(_changed(**fields))
  recorded = json.loads(workdir.config_file.read_text())
  assert recorded.pop('format_version') == 1
  assert recorded == json.loads(json.dumps(_changed(**fields)))


def test_a_file_in_place_of_the_directory_is_told(tmp_path):
  file = tmp_path / 'file'
  file.write_text('mine')
  with pytest.raises(UserError, match='is a file: give --workdir'):
    Workdir(str(file)).open(CONFIG)
  with pytest.raises(UserError, match='cannot be written'):
    Workdir(str(file / 'below')).open(CONFIG)
  assert file.read_text() == 'mine'


@pytest.mark.parametrize('text', ['{"seed": 0', '', '[1, 2]', 'null', '\x00'])
def test_a_corrupt_config_is_told_and_kept(tmp_path, text):
  workdir = Workdir(str(tmp_path))
  workdir.config_file.write_text(text)
  with pytest.raises(UserError, match='config.json cannot be read') as error:
    workdir.check(CONFIG)
  assert '\n' not in str(error.value)
  assert workdir.config_file.read_text() == text


def test_results_are_added_to_and_replaced_by_name(tmp_path):
  workdir = Workdir(str(tmp_path))
  assert workdir.results() == {}
  workdir.update_results(init={'knn/20/top1': 0.25}, steps=0)
  returned = workdir.update_results(final={'knn/20/top1': 0.5}, steps=9)
  expected = {
    'init': {'knn/20/top1': 0.25},
    'steps': 9,
    'final': {'knn/20/top1': 0.5},
  }
  assert returned == workdir.results() == expected
  recorded = json.loads(workdir.results_file.read_text())
  assert recorded == {'format_version': 1, **expected}
  workdir.results_file.write_text('{')
  with pytest.raises(UserError, match='results.json cannot be read'):
    workdir.results()


def test_what_json_cannot_hold_leaves_the_old_file_alone(tmp_path):
  file = tmp_path / 'results.json'
  workdir_lib.write_json(file, {'a': 1})
  with pytest.raises(TypeError):
    workdir_lib.write_json(file, {'a': object()})
  assert json.loads(file.read_text()) == {'a': 1}


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  workdir = Workdir('~/runs/mine')
  workdir.open({'seed': 0})
  assert (tmp_path / 'runs' / 'mine' / 'config.json').exists()
