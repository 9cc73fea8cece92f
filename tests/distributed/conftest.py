"""Runs that the tests of several processes share."""

import pytest

from .launcher import Launcher


@pytest.fixture(scope='session')
def launcher(tmp_path_factory):
  return Launcher(tmp_path_factory.mktemp('launcher'))


@pytest.fixture(scope='session')
def alone(launcher, tmp_path_factory):
  """Work directory of a run of one process."""
  workdir = tmp_path_factory.mktemp('alone') / 'run'
  launcher.run_here(workdir)
  return workdir
