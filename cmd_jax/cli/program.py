"""Runs a command line: `cmd-jax COMMAND --flags`."""

from __future__ import annotations

import functools
import io
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence

from absl import flags

import cmd_jax
from cmd_jax.cli import options
from cmd_jax.cli.commands import COMMANDS, Command
from cmd_jax.config import builtin
from cmd_jax.config.fields import describe_config
from cmd_jax.devices import launchers, processes, stopping
from cmd_jax.errors import UserError
from cmd_jax.files import disk_errors

_HELP = {'--help', '-help', '-h', '--helpfull'}


def _usage() -> str:
  width = max(map(len, COMMANDS))
  lines = [f'  {name:{width}}  {c.help}' for name, c in COMMANDS.items()]
  return '\n'.join(
    [
      'usage: cmd-jax COMMAND --flags',
      '',
      'Tells look-alikes apart without labels.',
      '',
      *lines,
      '',
      '`cmd-jax COMMAND --help` shows its flags, `cmd-jax --version` the '
      'version.',
    ]
  )


def _help_of(name: str, argv: Sequence[str]) -> str:
  """What a command does, its flags, and the fields of a config if given."""
  command = COMMANDS[name]
  described = options.describe(
    command.options, with_config=command.config is not None
  )
  start = ' '.join(filter(None, ['cmd-jax', name, '|'.join(command.actions)]))
  text = f'usage: {start} --flags\n\n{command.help}\n\n{described}'
  argv = [x for x in argv if x not in _HELP]
  if not any(x.startswith('--config') for x in argv):
    return text
  values = options.parse(
    argv, command.options, with_config=True, words=_words_of(command, argv)
  )
  fields = describe_config(values.config.to_dict())
  return f'{text}\n\nThe fields of this config:\n\n{fields}'


def _words_of(command: Command, argv: Sequence[str]) -> Mapping[str, str]:
  """The words that a command adds to `--config`."""
  workdir, weights = (
    options.value_of(argv, name) or None for name in ('workdir', 'weights')
  )
  # Neither or both are refused later.
  if command.words is None or bool(workdir) == bool(weights):
    return {}
  return command.words(workdir, weights)


def _address(values: flags.FlagValues) -> launchers.Address | None:
  if 'num_processes' not in values:
    return None
  return launchers.check_address(
    values.coordinator_address, values.num_processes, values.process_id
  )


def _check(name: str, command: Command, values: flags.FlagValues) -> None:
  """Refuses flags that do not go together.

  Raises:
    UserError: what is missing, or one too many.
  """
  if command.config == 'required' and values.config is None:
    raise UserError(
      f'--config is missing: choose {", ".join(builtin.BUILTIN)}, or a file '
      'such as configs/toybirds.py'
    )
  if command.needs_trained and bool(values.weights) == bool(values.workdir):
    raise UserError('give one of --workdir, a run, and --weights, a file')
  several = _address(values) or launchers.launcher_of(os.environ) in (
    'SLURM',
    'Open MPI',
  )
  if several and not command.is_distributed:
    raise UserError(
      f'{name} runs in one process, and several are started: start one, '
      'without --num_processes'
    )
  if command.workdir == 'required' and not values.workdir:
    raise UserError('--workdir is missing: name a directory for the run')


def _run_command(name: str, argv: Sequence[str], names: Sequence[str]) -> int:
  """Runs a command, which may be given flags of these names."""
  command, run = COMMANDS[name], COMMANDS[name].run
  if command.actions:
    action, argv = options.take_action(argv, name, command.actions)
    run = functools.partial(run, action=action)
  values = options.parse(
    argv,
    names,
    with_config=command.config is not None,
    of_run=command.config_of_run if command.config == 'optional' else '',
    words=_words_of(command, argv),
  )
  _check(name, command, values)
  if command.is_distributed:
    processes.start(_address(values), timeout_s=values.meeting_timeout_s)
  with (
    processes.failing_together(),
    disk_errors.explaining(None),
    stopping.during('start-up' if name == 'train' else name),
  ):
    return run(values) or 0


def _escape_what_cannot_be_printed() -> None:
  """Lets a terminal that is not UTF-8 show what it can of any file's name."""
  for stream in (sys.stdout, sys.stderr):
    # Others may have put something else in their place.
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors='backslashreplace')


def _told(run: Callable[[], int]) -> int:
  """The exit status of what is run, its mistakes told on one line."""
  try:
    return run()
  except UserError as error:
    # A file's name may hold what a terminal would obey.
    text = ''.join(
      c if c.isprintable() or c == '\n' else ascii(c)[1:-1] for c in str(error)
    )
    print(f'error: {text}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    # Within a program that has its own handlers.
    print(stopping.describe(signal.SIGINT), file=sys.stderr)
    return 128 + signal.SIGINT


def run(argv: Sequence[str]) -> int:
  """Runs `cmd-jax`.

  Args:
    argv: what follows the program's name: a command and its flags.

  Returns:
    The exit status: 2 where the user can mend it, 128 + N after signal N.
  """
  _escape_what_cannot_be_printed()
  name, *rest = argv or ('--help',)
  if name in _HELP:
    print(_usage())
    return 0
  if name == '--version':
    print(cmd_jax.__version__)
    return 0

  def run_named() -> int:
    if name not in COMMANDS:
      raise UserError(
        f'unknown command {name!r}: choose one of {", ".join(COMMANDS)}'
      )
    if _HELP & set(rest):
      print(_help_of(name, rest))
      return 0
    return _run_command(name, rest, COMMANDS[name].options)

  return _told(run_named)


def run_mode(argv: Sequence[str]) -> int:
  """Runs `python main.py`, where the command is a flag: `--mode=COMMAND`.

  Flags of other commands may be given too, and are not looked at.

  Args:
    argv: what follows the program's name.

  Returns:
    The exit status.
  """
  _escape_what_cannot_be_printed()
  if _HELP & set(argv):
    described = options.describe(tuple(options.OPTIONS), with_config=True)
    modes = '|'.join(COMMANDS)
    print(f'  --mode={modes}\n      What to do. Default: train.\n{described}')
    return 0

  def run_named() -> int:
    mode, rest = options.take_mode(argv, tuple(COMMANDS))
    return _run_command(mode, rest, tuple(options.OPTIONS))

  return _told(run_named)


def main() -> None:
  """As `cmd_jax.__main__.main`, for scripts installed before that was."""
  stopping.run_program(lambda: run(sys.argv[1:]))
