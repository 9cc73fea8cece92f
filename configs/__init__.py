"""Configs: one file an experiment; they import nothing from cmd_jax."""
