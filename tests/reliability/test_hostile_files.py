"""Changed files of all kinds, read by a process that may die of them."""

import os

import pytest

from tests.reliability import (
  test_hostile_annotations,
  test_hostile_images,
  test_hostile_lists,
  test_hostile_runs,
  test_hostile_weights,
)
from tests.reliability import worker as worker_lib

_MODULES = (
  test_hostile_images,
  test_hostile_lists,
  test_hostile_weights,
  test_hostile_runs,
  test_hostile_annotations,
)
_FEW, _MANY = 2, 10_000


@pytest.fixture
def run(tmp_path, monkeypatch):
  """(which, changed files of each) -> counts of each target."""
  # Where listings are kept.
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))

  def run(count, **options):
    folder = tmp_path / 'inputs'
    folder.mkdir()
    targets = [
      target for module in _MODULES for target in module.make_targets(folder)
    ]
    with worker_lib.Worker() as worker:
      return [
        worker_lib.run(
          worker,
          target,
          folder,
          tmp_path / 'failed',
          count=count or _MANY // len(targets) + 1,
          **options,
        )
        for target in targets
      ]

  return run


def _check(results):
  failures = [failure for result in results for failure in result.failures]
  assert not failures, '\n'.join([f'{len(failures)} failures', *failures[:20]])


def test_a_few_changed_files_of_every_kind(run):
  _check(run(_FEW))


@pytest.mark.slow
def test_ten_thousand_changed_files(run, record_property):
  seed = int(os.environ.get('CMD_JAX_FUZZ_SEED', '0'))
  results = run(0, seed=seed)
  tried = sum(result.tried for result in results)
  lines = [
    f'hostile files, seed {seed}:',
    *(f'  {result.line()}' for result in results),
    f'  all: {tried:,} inputs tried',
  ]
  record_property('counted', '\n'.join(lines))
  assert tried >= _MANY
  _check(results)
