r"""Trains and scores encoders that tell look-alikes apart.

  python main.py --config=configs/toybirds.py --workdir=runs/toybirds
  python main.py --config=configs/folder.py --workdir=runs/mine \
    --config.dataset.path=/my/photographs --config.batch_size=32

The same as the installed program, whose command is here a flag: `--mode=report`
is `cmd-jax report`. `python main.py --help` names the modes and their flags.
"""

import sys

from cmd_jax.devices import stopping


def _run() -> int:
  # Imported late: from the first moment on a signal is answered.
  from cmd_jax.cli.program import run_mode

  return run_mode(sys.argv[1:])


if __name__ == '__main__':
  stopping.run_program(_run)
