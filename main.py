r"""Trains and scores encoders that tell look-alikes apart.

  python main.py --config=configs/toybirds.py --workdir=runs/toybirds
  python main.py --config=configs/folder.py --workdir=runs/mine \
    --config.dataset.path=/my/photographs --config.batch_size=32

The same command again resumes where it stopped; `--mode=evaluate` scores the
newest checkpoint again, `--mode=export` writes its encoder for timm, and
`--mode=discover` finds parts with it. `--mode=prepare` makes a data set of
files fetched by hand.
"""

from __future__ import annotations

import os
import pathlib
import signal
import sys

from absl import app, flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from cmd_jax.errors import UserError

MODES = ('train', 'evaluate', 'export', 'discover', 'prepare')

_CONFIG = config_flags.DEFINE_config_file(
  'config', help_string='Config file, e.g. configs/cub.py:method=dino.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Directory of the run: checkpoints, metrics, results.'
)
_MANUAL_DIR = flags.DEFINE_string(
  'manual_dir',
  None,
  'Folder of the files fetched by hand, for --mode=prepare: docs/datasets.md.',
)
_MODE = flags.DEFINE_enum('mode', 'train', MODES, 'What to do.')
_CACHE = flags.DEFINE_string(
  'compilation_cache',
  os.path.join(
    os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'),
    'cmd_jax',
    'compilation',
  ),
  'Directory of the persistent compilation cache; empty turns it off.',
)


def _explain_unknown_field(config: ConfigDict, argv: list[str]) -> str | None:
  """Names the first override of a field that the config lacks."""
  for argument in argv:
    if not argument.startswith('--config.'):
      continue
    path = argument.removeprefix('--config.').partition('=')[0]
    node, walked = config, 'config'
    for part in path.split('.'):
      if not isinstance(node, ConfigDict):
        return f'{walked} is a value and has no field {part!r}'
      if part not in node:
        return (
          f'{walked} has no field {part!r}: choose one of '
          f'{", ".join(sorted(node))}'
        )
      node, walked = node[part], f'{walked}.{part}'
  return None


def _load_config_alone(argv: list[str]) -> ConfigDict | None:
  for argument, following in zip(argv, [*argv[1:], '']):
    name, _, value = argument.partition('=')
    if name == '--config':
      try:
        return ConfigFileFlagParser('config').parse(value or following)
      except (ImportError, OSError, SyntaxError, TypeError, ValueError):
        return None
  return None


def parse_flags(argv: list[str]) -> None:
  """Parses the command line.

  Raises:
    UserError: anything wrong with it, on one line.
  """
  app.define_help_flags()
  try:
    unexpected = flags.FLAGS(argv)[1:]
  except flags.Error as error:
    # A config file's own ValueError arrives as a trace; its last line says it.
    reason = str(error).strip().splitlines()[-1]
    raise UserError(reason.removeprefix('ValueError: ')) from error
  except (
    AttributeError,
    ImportError,
    KeyError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
  ) as error:
    config = _load_config_alone(argv)
    reason = config and _explain_unknown_field(config, argv)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    raise UserError(reason or lines[-1].removeprefix('ValueError: ')) from error
  if unexpected:
    raise UserError(
      f'unexpected argument {unexpected[0]!r}: write flags as --name=value'
    )
  if _CONFIG.value is None:
    known = sorted(
      str(path)
      for path in pathlib.Path('configs').glob('*.py')
      if path.stem not in ('__init__', 'common', 'small')
    )
    raise UserError(f'--config is missing: choose e.g. {", ".join(known)}')
  if not isinstance(_CONFIG.value, ConfigDict):
    raise UserError('--config names a file that does not exist or cannot load')
  if _MODE.value != 'prepare' and not _WORKDIR.value:
    raise UserError('--workdir is missing: name a directory for the run')


def main() -> None:
  """Runs the mode that the flags name."""
  if _MODE.value == 'prepare':
    from cmd_jax.data.prepare import prepare_config

    dataset = _CONFIG.value.dataset.to_dict()
    print(prepare_config(dataset, manual_dir=_MANUAL_DIR.value))
    return
  # Imported late: a mistake in the flags is told without waiting for JAX.
  import jax

  from cmd_jax import evaluate, experiment, train
  from cmd_jax.workdir import Workdir

  if _CACHE.value:
    jax.config.update('jax_compilation_cache_dir', _CACHE.value)
  config = _CONFIG.value
  workdir = Workdir(_WORKDIR.value)
  workdir.check(config.to_dict())
  built = experiment.build(config)
  if _MODE.value == 'evaluate':
    results = evaluate.evaluate_run(built, workdir)
    print(evaluate.results_table(results['init'], results['final']))
    return
  if _MODE.value == 'export':
    from cmd_jax.convert.save import timm_constructor
    from cmd_jax.export.weights import export_weights

    print(f'{export_weights(built, workdir)}: the state dict of')
    print(timm_constructor(built.encoder))
    return
  workdir.open(config.to_dict())
  if _MODE.value == 'discover':
    from cmd_jax.part_masks import discover_parts

    print(f'part masks in {discover_parts(built, workdir)}')
    return
  try:
    results = train.train(built, workdir)
  except train.Interrupted as stop:
    print(stop, file=sys.stderr)
    # As a shell reports a process that died of the signal.
    sys.exit(128 + stop.signal)
  print(train.summary(built, workdir, results))


if __name__ == '__main__':
  try:
    parse_flags(sys.argv)
    main()
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    # Before or after the steps; within them the state is saved first.
    sys.exit(128 + signal.SIGINT)
