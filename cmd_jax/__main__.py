"""`python -m cmd_jax` is `cmd-jax`."""

from cmd_jax.cli.program import main

main()
