import jax
import pytest

from tests.parity import golden


def pytest_report_header():
  return f'golden fixtures: {golden.folder()}'


@pytest.fixture(autouse=True)
def _exact_products():
  with jax.default_matmul_precision('highest'):
    yield


@pytest.fixture
def fixture(golden_file):
  return golden.Fixture(golden_file)
