"""The flags of the program, and how they are read."""

from __future__ import annotations

import contextlib
import difflib
import os
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from cmd_jax.cli.option_table import CONFIG_HELP, OPTIONS, Option
from cmd_jax.config import builtin
from cmd_jax.errors import UserError
from cmd_jax.files.safe_read import one_line

# What libraries say of a value that they cannot read, and what to do.
_REMEDIES = {
  'invalid literal for int()': 'give a whole number',
  'could not convert string to float': 'give a number',
  "'Non-boolean argument": 'give true or false',
  'Error while parsing string': (
    "give a tuple such as (0.1,2) or ('knn/20',), in quotes of the shell"
  ),
  'Failed to parse': 'it has fields, give those: --config.GROUP.FIELD=VALUE',
}


def _define(name: str, option: Option, values: flags.FlagValues) -> None:
  """Adds a flag to `values`."""
  if isinstance(option.kind, tuple):
    flags.DEFINE_enum(
      name, option.default, option.kind, option.help, flag_values=values
    )
    return
  define: Callable = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_boolean,
  }[option.kind]
  define(name, option.default, option.help, flag_values=values)


def nearest(name: str, known: Iterable[str]) -> str:
  """` (did you mean X?)` where a known name is much like it, else nothing."""
  # A built-in config has the name of a file without its folder and ending.
  stem = os.path.splitext(os.path.basename(name))[0]
  found = difflib.get_close_matches(name, known, 1) or (
    difflib.get_close_matches(stem, known, 1)
  )
  return f' (did you mean {found[0]}?)' if found else ''


def _name_file_of_builtin(argument: str) -> str:
  """Lets config_flags, which knows files alone, find a built-in config.

  Raises:
    UserError: there is neither a file nor a built-in config of the name.
  """
  name, colon, words = argument.partition(':')
  if os.path.exists(name):
    return argument
  if name in builtin.BUILTIN:
    return f'{builtin.__file__}:{name}{colon}{words}'
  folder = os.path.dirname(name) or '.'
  files = []
  if os.path.isdir(folder):
    files = [f'{folder}/{x}' for x in os.listdir(folder) if x.endswith('.py')]
  raise UserError(
    f'--config={name} does not exist{nearest(name, [*builtin.BUILTIN, *files])}'
    f': give a file, or a built-in config: {", ".join(builtin.BUILTIN)}'
  )


def _resolve_config(argv: Sequence[str]) -> list[str]:
  """The arguments with `--config=NAME` in terms of files."""
  resolved = list(argv)
  for i, argument in enumerate(resolved):
    if argument in ('--config', '-config') and i + 1 < len(resolved):
      resolved[i + 1] = _name_file_of_builtin(resolved[i + 1])
    elif argument.startswith('--config='):
      name = argument.removeprefix('--config=')
      resolved[i] = f'--config={_name_file_of_builtin(name)}'
  return resolved


def value_of(argv: Sequence[str], flag: str) -> str:
  """What a flag is given in a command line; empty without."""
  found = ''
  for argument, following in zip(argv, [*argv[1:], '']):
    name, _, value = argument.partition('=')
    if name == f'--{flag}':
      found = value or following
  return found


def _add_words(argv: list[str], words: Mapping[str, str]) -> list[str]:
  """Adds words to `--config`, but for keys that it has a word of."""
  said = value_of(argv, 'config')
  file, _, given = said.partition(':')
  if not file:
    return argv
  # A built-in config is its file and a name: FILE:NAME:WORDS.
  is_builtin = file == builtin.__file__
  name, _, own = given.partition(':') if is_builtin else ('', '', given)
  keys = {word.partition('=')[0] for word in own.split(',')}
  own = ','.join(
    [
      *filter(None, [own]),
      *(f'{key}={word}' for key, word in words.items() if key not in keys),
    ]
  )
  new = ':'.join(filter(None, [file, name, own]))
  known = {said: new, f'--config={said}': f'--config={new}'}
  return [known.get(argument, argument) for argument in argv]


def _add_config_of_run(argv: list[str], made_by: str) -> list[str]:
  """Lets fields be changed of the config that a work directory has."""
  workdir = value_of(argv, 'workdir')
  if not workdir or value_of(argv, 'config'):
    return argv
  if not any(x.startswith('--config.') for x in argv):
    return argv
  package = os.path.dirname(os.path.dirname(builtin.__file__))
  file = os.path.join(package, made_by)
  return [f'--config={file}:{workdir}', *argv]


def _load_config_alone(argv: Sequence[str]) -> ConfigDict | None:
  with contextlib.suppress(Exception, SystemExit):
    return ConfigFileFlagParser('config').parse(value_of(argv, 'config'))
  return None


def _explain_value(reason: str) -> str:
  """Says what a flag may be where a library says why it cannot read it."""
  for words, remedy in _REMEDIES.items():
    before, found, _ = reason.partition(words)
    if found:
      return f'{before.rstrip(" (")} {remedy}'
  return reason


def _explain_flag(
  argv: Sequence[str], error: flags.Error, *, with_config: bool
) -> str:
  """Says what of a flag is wrong, or that it is one of a missing config."""
  # A config file's own ValueError arrives as a trace; its last line says it.
  reason = str(error).strip().splitlines()[-1]
  reason = _explain_value(reason.removeprefix('ValueError: '))
  is_of_config = with_config and "flag 'config." in reason
  if is_of_config and not value_of(argv, 'config'):
    return (
      '--config is missing, whose field is given: name a built-in config '
      f'({", ".join(builtin.BUILTIN)}) or a file'
    )
  return reason


def _explain_config_file(argv: Sequence[str], error: BaseException) -> str:
  """Names the line of a config file that fails."""
  file = value_of(argv, 'config').partition(':')[0]
  lines = [
    frame.lineno
    for frame in traceback.extract_tb(error.__traceback__)
    if os.path.realpath(frame.filename) == os.path.realpath(file)
  ]
  if isinstance(error, SyntaxError):
    lines = [error.lineno]
  # Most errors of ml_collections show all of the config.
  text = f'{type(error).__name__}: {str(error).partition(". ")[0]}'
  where = f'{file}, line {lines[-1]}' if lines else file
  return f'--config: {where} fails ({one_line(text)}): correct it'


def _explain_unknown_field(
  config: ConfigDict, argv: Sequence[str]
) -> str | None:
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
          f'{walked} has no field {part!r}{nearest(part, node)}: choose one of '
          f'{", ".join(sorted(node))}'
        )
      node, walked = node[part], f'{walked}.{part}'
  return None


def parse(
  argv: Sequence[str],
  options: Sequence[str],
  *,
  with_config: bool,
  of_run: str = '',
  words: Mapping[str, str] | None = None,
) -> flags.FlagValues:
  """Reads a command line.

  Args:
    argv: flags alone.
    options: names in `OPTIONS` that may be given.
    with_config: whether `--config` may be given.
    of_run: file of the package that makes a config of the run in --workdir,
      where fields are given without `--config`; empty where they may not be.
    words: by key, what `--config` gets where it has none of that key.

  Returns:
    The values by name; `config` is None where it is not given.

  Raises:
    UserError: anything wrong with it, on one line.
  """
  values = flags.FlagValues()
  # The first is the program's name, which is not looked at.
  argv = _resolve_config(argv)
  if words:
    argv = _add_words(argv, words)
  argv = ['', *(_add_config_of_run(argv, of_run) if of_run else argv)]
  for name in options:
    _define(name, OPTIONS[name], values)
  if with_config:
    config_flags.DEFINE_config_file(
      'config', help_string=CONFIG_HELP, flag_values=values, sys_argv=argv
    )
  try:
    unexpected = values(argv)[1:]
  except flags.Error as error:
    reason = _explain_flag(argv, error, with_config=with_config)
    raise UserError(reason) from error
  except (Exception, SystemExit) as error:
    config = _load_config_alone(argv)
    reason = config and _explain_unknown_field(config, argv)
    if config is None and not isinstance(error, ValueError):
      # A file that runs into something; what it refuses itself it says.
      reason = _explain_config_file(argv, error)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    raise UserError(reason or lines[-1].removeprefix('ValueError: ')) from error
  if unexpected:
    raise UserError(
      f'unexpected argument {unexpected[0]!r}: write flags as --name=value'
    )
  if with_config and not isinstance(values.config, ConfigDict | None):
    raise UserError(
      '--config names a file that cannot be loaded, or has no get_config that '
      'returns a ConfigDict'
    )
  return values


def take_mode(
  argv: Sequence[str], modes: Sequence[str]
) -> tuple[str, list[str]]:
  """Takes `--mode=MODE` out of a command line.

  Args:
    argv: flags.
    modes: what it may be; the first is the default.

  Raises:
    UserError: another mode.
  """
  rest, mode = list(argv), modes[0]
  for i, argument in enumerate(argv):
    name, is_joined, value = argument.lstrip('-').partition('=')
    if name == 'mode' and argument.startswith('-'):
      if not is_joined:
        value = rest.pop(i + 1) if i + 1 < len(rest) else ''
      rest.pop(i)
      mode = value
      break
  if mode not in modes:
    raise UserError(
      f'flag --mode={mode}: value should be one of <{"|".join(modes)}>'
    )
  return mode, rest


def take_action(
  argv: Sequence[str], command: str, actions: Sequence[str]
) -> tuple[str, list[str]]:
  """Takes what a command is to do off the front of its command line.

  Args:
    argv: what follows the command, such as `build --input=x`.
    command: its name, for messages.
    actions: what it may do.

  Raises:
    UserError: none of them.
  """
  action, *rest = [*argv, '']
  if action not in actions:
    given = f' {action}' if action and not action.startswith('-') else ''
    raise UserError(
      f'cmd-jax {command}{given}: say what to do, cmd-jax {command} '
      f'{"|".join(actions)} --flags'
    )
  return action, rest[:-1]


def describe(options: Sequence[str], *, with_config: bool) -> str:
  """The flags, a paragraph each, for --help."""
  lines = []
  if with_config:
    lines += ['  --config=NAME[:WORDS]', f'      {CONFIG_HELP}']
  for name in options:
    kind, default, text = OPTIONS[name]
    shown = '|'.join(kind) if isinstance(kind, tuple) else kind.__name__.upper()
    lines.append(f'  --{name}' if kind is bool else f'  --{name}={shown}')
    if default not in (None, False):
      text = f'{text} Default: {default}.'
    lines.append(f'      {text}')
  return '\n'.join(lines)
