"""Several CPU devices for every test, compiled quickly rather than well."""

import os

# Both must be set before JAX wakes up; subprocesses inherit the environment.
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

import jax  # noqa: E402

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)

pytest_plugins = ['tests.budget']
