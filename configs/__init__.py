"""Configs: one short file an experiment, over `cmd_jax.config.builtin`."""
