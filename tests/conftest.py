"""Several CPU devices for every test, compiled quickly rather than well.

What is compiled is kept in a folder that git ignores: tests, workers, the
programs that tests start and the next run share it.
"""

import gc
import os
import pathlib
import signal

_CACHE = pathlib.Path(__file__).resolve().parents[1] / '.compilation_cache'
_CACHE_BYTES = 2**30

# All must be set before JAX wakes up; subprocesses inherit the environment.
# The older emitter of fused loops takes half the time to compile, and a module
# in one piece less than one in 32.
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_backend_optimization_level=0',
    '--xla_cpu_use_fusion_emitters=false',
    '--xla_cpu_parallel_codegen_split_count=1',
  ]
)
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_CACHE))
# With a size, JAX locks the folder, which two workers need.
os.environ.setdefault('JAX_COMPILATION_CACHE_MAX_SIZE', str(_CACHE_BYTES))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')

import jax  # noqa: E402
import psutil  # noqa: E402
import pytest  # noqa: E402
from jax._src import lru_cache  # noqa: E402

from cmd_jax.devices.host_memory import give_back_freed  # noqa: E402

jax.config.update('jax_platforms', 'cpu')
# Tracing makes millions of small objects, few of them garbage.
gc.set_threshold(100_000, 50, 50)
jax.config.update('jax_num_cpu_devices', 8)

pytest_plugins = ['tests.budget']

# Before it keeps a program, JAX reads the age of every one that is there, to
# forget the oldest if need be. With thousands of them that takes longer than to
# compile one, so it is done once, before the tests.
_forget_oldest = lru_cache.LRUCache._evict_if_needed
lru_cache.LRUCache._evict_if_needed = lambda self, *, additional_size=0: None


def pytest_sessionstart(session):
  if not hasattr(session.config, 'workerinput'):
    folder = os.environ['JAX_COMPILATION_CACHE_DIR']
    cache = lru_cache.LRUCache(folder, max_size=_CACHE_BYTES)
    with cache.lock:
      _forget_oldest(cache)


_CACHING = {
  name: getattr(jax.config, name)
  for name in (
    'jax_compilation_cache_dir',
    'jax_persistent_cache_min_compile_time_secs',
  )
}


@pytest.fixture(autouse=True)
def _keep_large_programs():
  """As commands run in this process, they ask JAX to keep small ones too."""
  yield
  for name, value in _CACHING.items():
    jax.config.update(name, value)


@pytest.fixture(autouse=True, scope='session')
def _ctrl_c_is_not_ignored():
  """As in a terminal; jobs in the background of a shell begin otherwise."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


_CLEAR_ABOVE_MIB = 1300


@pytest.fixture(autouse=True)
def _forget_programs():
  """Keeps a worker small: programs of earlier tests are seldom used again."""
  yield
  if psutil.Process().memory_info().rss > _CLEAR_ABOVE_MIB * 2**20:
    jax.clear_caches()
    gc.collect()
    give_back_freed()
