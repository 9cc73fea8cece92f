"""Trackers: offline, and when they fail."""

import json
import os
import threading
import time

import pytest

from cmd_jax.errors import UserError
from cmd_jax.rundir.workdir import Workdir
from cmd_jax.training import trackers
from tests import saved_runs

STEPS = (1, 2, 3)


@pytest.fixture(name='workdir')
def _workdir(tmp_path):
  def make(names):
    fields = saved_runs.make_config('dino')
    fields['log'].update(trackers=names, project='birds')
    workdir = Workdir(str(tmp_path / 'mine'))
    workdir.open(fields)
    return workdir

  return make


class _Fake:
  """Remembers what it is given."""

  made = []

  def __init__(self, run):
    self.run, self.lines, self.closed = run, [], False
    self.id = run.id_before or 'new'
    self.made.append(self)

  def write(self, step, scalars):
    self.lines.append((step, scalars))

  def close(self):
    self.closed = True


class _NoServer(_Fake):
  def __init__(self, run):
    raise OSError('no route\nto host')


class _Exits(_Fake):
  def write(self, step, scalars):
    raise SystemExit(3)


class _Hangs(_Fake):
  event = threading.Event()

  def write(self, step, scalars):
    self.event.wait(60)


@pytest.fixture(name='fakes')
def _fakes(monkeypatch):
  kinds = {'good': _Fake, 'lost': _NoServer, 'exits': _Exits, 'hangs': _Hangs}
  monkeypatch.setattr(trackers, 'TRACKERS', kinds)
  monkeypatch.setattr(trackers, '_CLOSE_S', 0.5)
  monkeypatch.setattr(_Fake, 'made', [])
  _Hangs.event.clear()
  yield
  _Hangs.event.set()


def _write_all(workdir):
  opened = trackers.Trackers(workdir)
  for step in STEPS:
    opened.write(step, {'loss': step / 4, 'bad': float('nan')})
  opened.close()


def test_a_tracker_has_the_config_and_every_finite_scalar(workdir, fakes):
  _write_all(workdir('good'))
  (fake,) = _Fake.made
  assert fake.lines == [(step, {'loss': step / 4}) for step in STEPS]
  assert fake.closed
  assert fake.run.project == 'birds' and fake.run.name == 'mine'
  assert fake.run.config['method.name'] == 'dino'


def test_a_resumed_run_finds_itself(workdir, fakes):
  opened = workdir('good')
  _write_all(opened)
  assert json.loads((opened.path / 'trackers.json').read_text()) == {
    'good': 'new'
  }
  _write_all(opened)
  assert [fake.run.id_before for fake in _Fake.made] == ['', 'new']


def test_those_that_fail_cost_a_line_each_and_nothing_else(
  workdir, fakes, capsys
):
  _write_all(workdir('lost,exits,hangs,good'))
  lines = [x for x in capsys.readouterr().err.splitlines() if 'warning' in x]
  assert sorted(line.split()[1] for line in lines) == ['exits', 'hangs', 'lost']
  assert any('(no route to host)' in line for line in lines)
  assert all('the run goes on' in line for line in lines)
  good = _Fake.made[-1]
  assert len(good.lines) == 3 and good.closed


def test_unknown_and_missing_trackers_are_told(monkeypatch):
  with pytest.raises(UserError, match="'wandbb': choose from wandb, mlflow"):
    trackers.check_installed('mlflow, wandbb')
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  for name in trackers.TRACKERS:
    with pytest.raises(UserError, match=rf"pip install 'cmd_jax\[{name}\]'"):
      trackers.check_installed(name)
  trackers.check_installed('')


@pytest.mark.filterwarnings('ignore')
def test_wandb_offline(workdir, monkeypatch, capsys):
  pytest.importorskip('wandb', reason='wandb is not installed')
  monkeypatch.setenv('WANDB_MODE', 'offline')
  opened = workdir('wandb')
  _write_all(opened)
  assert 'warning' not in capsys.readouterr().err
  (file,) = opened.path.glob('wandb/offline-run-*/*.wandb')
  run_id = json.loads((opened.path / 'trackers.json').read_text())['wandb']
  assert file.name == f'run-{run_id}.wandb'
  # A process of its own writes the file, now and then after the end.
  deadline = time.monotonic() + 20
  while file.stat().st_size < 500 and time.monotonic() < deadline:
    time.sleep(0.05)
  content = file.read_bytes()
  assert b'method.name' in content and b'loss' in content


@pytest.mark.filterwarnings('ignore')
def test_wandb_without_a_key_does_not_ask(workdir, monkeypatch, capsys):
  wandb = pytest.importorskip('wandb', reason='wandb is not installed')
  monkeypatch.delenv('WANDB_MODE', raising=False)
  monkeypatch.setattr(wandb.api.__class__, 'api_key', None)
  _write_all(workdir('wandb'))
  assert 'no API key: run `wandb login`' in capsys.readouterr().err


@pytest.mark.filterwarnings('ignore')
def test_mlflow_in_a_file(workdir, monkeypatch, capsys):
  pytest.importorskip('mlflow', reason='mlflow is not installed')
  pytest.importorskip('sqlalchemy', reason='SQLAlchemy is not installed')
  from mlflow.tracking import MlflowClient

  monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)
  opened = workdir('mlflow')
  _write_all(opened)
  _write_all(opened)
  assert 'warning' not in capsys.readouterr().err
  client = MlflowClient(f'sqlite:///{opened.path}/mlflow.db')
  experiment = client.get_experiment_by_name('birds')
  (run,) = client.search_runs([experiment.experiment_id])
  assert run.data.params['method.name'] == 'dino'
  history = client.get_metric_history(run.info.run_id, 'loss')
  assert {(x.step, x.value) for x in history} == {(i, i / 4) for i in STEPS}
  assert run.info.status == 'FINISHED'


@pytest.mark.filterwarnings('ignore')
def test_trackio_in_its_folder(workdir, monkeypatch, tmp_path, capsys):
  pytest.importorskip('trackio', reason='trackio is not installed')
  import sqlite3

  import trackio.sqlite_storage as storage

  # Read when the package is imported.
  folder = storage.TRACKIO_DIR
  project = f'birds-{os.getpid()}'
  opened = workdir('trackio')
  fields = opened.read_config()
  fields['log']['project'] = project
  opened.open(fields)
  _write_all(opened)
  assert 'warning' not in capsys.readouterr().err
  database = folder / f'{project}.db'
  rows = sqlite3.connect(database).execute('select step, metrics from metrics')
  assert {step for step, _ in rows} == set(STEPS)
  database.unlink()
