"""Several CPU devices for every test, compiled quickly rather than well."""

import os

# Both must be set before JAX wakes up; subprocesses inherit the environment.
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_backend_optimization_level=0'
)
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import jax  # noqa: E402

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)

pytest_plugins = ['tests.budget']
