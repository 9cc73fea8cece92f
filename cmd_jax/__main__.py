"""`cmd-jax`, and the same as `python -m cmd_jax`."""

import sys

from cmd_jax.devices import stopping


def _run() -> int:
  # Imported late: from the first moment on a signal is answered.
  from cmd_jax.cli.program import run

  return run(sys.argv[1:])


def main() -> None:
  """The console command."""
  stopping.run_program(_run)


if __name__ == '__main__':
  main()
