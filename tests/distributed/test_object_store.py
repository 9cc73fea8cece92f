"""A work directory in an object store, of which memory takes the place."""

import importlib
import json

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cmd_jax.errors import UserError
from cmd_jax.files.atomic import write_atomically
from cmd_jax.rundir.workdir import Workdir
from cmd_jax.training.metrics import MetricWriter


class _Store(MemoryFileSystem):
  protocol = ('gs', 'gcs')
  store = {}
  pseudo_dirs = ['']

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(str(path).removeprefix('gs://'))


@pytest.fixture
def workdir(monkeypatch):
  # The package's attribute of that name is not the module.
  registry = importlib.import_module('fsspec.registry')
  monkeypatch.setitem(registry._registry, 'gcs', _Store)
  return Workdir('gs://bucket/runs/x')


def test_config_results_and_metrics_are_kept_there(workdir):
  workdir.open({'seed': 1, 'log': {'every_steps': 2}})
  workdir.update_results(init={'knn': 0.5})
  other = Workdir('gs://bucket/runs/x')
  other.check({'seed': 1, 'log': {'every_steps': 3}})
  with pytest.raises(UserError, match='seed is 1 there and 2 here'):
    other.check({'seed': 2})
  assert other.update_results(steps=3) == {'init': {'knn': 0.5}, 'steps': 3}
  assert not other.has_checkpoint()

  writer = MetricWriter(workdir.metrics_file, workdir.tensorboard, step=0)
  for step in (1, 2, 3):
    writer.write(step, {'loss': 1.0 / step})
  writer.close()
  # Resumed after the second step.
  writer = MetricWriter(workdir.metrics_file, workdir.tensorboard, step=2)
  writer.write(3, {'loss': 9.0})
  writer.close()
  lines = workdir.metrics_file.read_text().splitlines()
  assert [json.loads(x)['loss'] for x in lines] == [1.0, 0.5, 9.0]

  write_atomically(workdir.skipped_file, 'text')
  assert workdir.skipped_file.read_text() == 'text'
