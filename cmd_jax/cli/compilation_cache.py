"""Compiled programs are kept for the next start."""

from __future__ import annotations

from absl import flags


def use_compilation_cache(values: flags.FlagValues) -> None:
  """Keeps them where `--compilation_cache` says."""
  import jax

  if values.compilation_cache:
    jax.config.update('jax_compilation_cache_dir', values.compilation_cache)
    # Dozens of small programs take seconds together: all are kept.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
