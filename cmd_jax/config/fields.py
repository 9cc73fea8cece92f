"""The fields of a config: what each is, and what it may be.

One table validates configs and documents them: `cmd-jax COMMAND --config=NAME
--help`, and docs/config.md, which `python -m cmd_jax.config.fields` writes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from cmd_jax.config.table import FIELDS, Field
from cmd_jax.errors import UserError


def field_of(path: str) -> Field | None:
  """The field at a dotted path; None where the table has none."""
  parent, _, _ = path.rpartition('.')
  return FIELDS.get(path) or FIELDS.get(f'{parent}.*')


def leaves(
  config: Mapping[str, Any], parent: str = ''
) -> Iterator[tuple[str, Any]]:
  """Dotted paths and values of all fields of a nested dict."""
  for name, value in config.items():
    path = f'{parent}{name}'
    if isinstance(value, Mapping):
      yield from leaves(value, f'{path}.')
    else:
      yield path, value


def _is_of_kind(kind: type, value: Any) -> bool:
  if kind is object:
    return True
  if kind is tuple:
    return isinstance(value, list | tuple)
  if kind in (int, float) and isinstance(value, bool):
    return False
  return isinstance(value, int | float if kind is float else kind)


def _wrong(field: Field, value: Any) -> str | None:
  """What is wrong with a value, as the end of a sentence."""
  if not _is_of_kind(field.kind, value):
    return f'it must be of kind {field.kind.__name__}'
  if field.choices is not None and value not in field.choices:
    choices = ', '.join(x or "''" for x in field.choices)
    return f'choose one of {choices}'
  if not isinstance(value, int | float):
    return None
  if isinstance(value, float) and not math.isfinite(value):
    return 'it must be a finite number'
  if field.above is not None and value <= field.above:
    return f'it must be above {field.above}'
  if field.least is not None and value < field.least:
    return f'it must be at least {field.least}'
  if field.most is not None and value > field.most:
    return f'it must be at most {field.most}'
  return None


def check_fields(config: Mapping[str, Any]) -> None:
  """Refuses values that cannot be; fields of nobody are left alone.

  Args:
    config: nested dict.

  Raises:
    UserError: the field, its value and what it may be.
  """
  for path, value in leaves(config):
    field = field_of(path)
    reason = field and _wrong(field, value)
    if reason:
      shown = repr(value) if isinstance(value, str) else value
      raise UserError(f'config.{path} is {shown}: {reason}')


def allowed(field: Field) -> str:
  """What a field may be, in words; empty for anything of its kind."""
  if field.choices is not None:
    return ', '.join(field.choices)
  bounds = [
    f'{words} {bound:g}'
    for words, bound in (
      ('above', field.above),
      ('at least', field.least),
      ('at most', field.most),
    )
    if bound is not None
  ]
  return ', '.join(bounds)


def describe_config(config: Mapping[str, Any]) -> str:
  """Every field of a config with its value and what it is, for --help."""
  lines = []
  for path, value in leaves(config):
    field = field_of(path)
    lines.append(f'  --config.{path}={value}')
    if field is not None:
      limits = allowed(field)
      lines.append(
        f'      {field.help}' + (f' Allowed: {limits}.' if limits else '')
      )
  return '\n'.join(lines)


def document() -> str:
  """The page docs/config.md."""
  lines = [
    '# Fields of a config',
    '',
    'Made by `python -m cmd_jax.config.fields > docs/config.md`. A config has',
    'those of its method, encoder and data; `cmd-jax train --config=NAME',
    '--help` shows them with their values. Durations end in `_steps` or',
    '`_epochs`, sizes in `_px`.',
    '',
    '| field | kind | allowed | what it is |',
    '|---|---|---|---|',
  ]
  for path, field in FIELDS.items():
    kind = '' if field.kind is object else field.kind.__name__
    lines.append(f'| `{path}` | {kind} | {allowed(field)} | {field.help} |')
  return '\n'.join(lines)


if __name__ == '__main__':
  print(document())
