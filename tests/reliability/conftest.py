import pytest

from tests.reliability import small_run


@pytest.fixture(scope='session')
def photos(tmp_path_factory):
  """The photographs of `small_run`, which compiles once for all who use it."""
  path = tmp_path_factory.mktemp('photos')
  small_run.write_photos(path)
  return path


@pytest.fixture
def unscored(monkeypatch):
  """Trains alone."""
  small_run.leave_out_scores(monkeypatch)
