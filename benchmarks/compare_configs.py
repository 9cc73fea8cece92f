"""The config of every run of `benchmarks.compare`.

It is worked out from the config files as they are, and with it the fields that
main.py must be given beside the file's own.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.compare_rows import (
  RECIPE,
  REFERENCE,
  ROW_BY_NAME,
  SHARED,
  Row,
  Set,
)
from cmd_jax.config import published, vocabulary
from cmd_jax.convert import pretrained
from cmd_jax.errors import UserError
from cmd_jax.rundir.config_diff import FREE_FIELDS, flatten

# No protocol of any set looks at it.
_UNUSED = 'eval.segmentation.'
_PATHS = (
  'dataset.path',
  'dataset.labels_file',
  'eval.parts_hit.keypoints',
)
_WHERE = ('dataset.data_dir', 'dataset.index_file')
# Chosen by options of their own: a row would not be what its name says.
_NOT_OVERRIDDEN = {
  'seed': '--seeds',
  'method.name': '--rows',
  'method.variant': '--rows',
}


class Resolved(NamedTuple):
  """The config of a run.

  Attributes:
    argument: `FILE:words` of --config.
    config: nested dict, as main.py has it with the overrides.
    overrides: fields that main.py must be given, and their values.
    sha256: hash of all that decides what is computed, seed and places aside.
    shared_sha256: hash of what the rows of the set have in common.
    differs: fields of `SHARED` that are not as in `REFERENCE`.
  """

  argument: str
  config: dict[str, Any]
  overrides: dict[str, Any]
  sha256: str
  shared_sha256: str
  differs: tuple[str, ...]


@functools.cache
def _written(config: str, words: str, as_published: bool) -> dict[str, Any]:
  """Fields by dotted name, as a config file has them, or as published."""
  if as_published:
    argument = vocabulary.parse_argument(words)
    return flatten(published.published(argument).to_dict())
  module = importlib.import_module(f'configs.{config}')
  return flatten(module.get_config(words).to_dict())


def _fields_of_set(of: Set, method: str) -> tuple[str, dict, dict]:
  """The argument's words, what they give alone, and what they give in a set."""
  words = ','.join([f'method={method}', *of.words])
  base = _written(of.config, words, False)
  fields = dict(base)
  if of.published:
    of_images = _written(of.config, words, True)
    fields.update(
      (k, v)
      for k, v in of_images.items()
      if k in base and not k.startswith('dataset.')
    )
  fields.update((k, v) for k, v in of.overrides.items() if k in fields)
  # One term alone has nothing to wait for, and parts are the first to learn.
  if not base['term_warmup_epochs']:
    fields['term_warmup_epochs'] = 0.0
  return words, base, fields


def parse_override(text: str, fields: Mapping[str, Any]) -> tuple[str, Any]:
  """Reads `config.field=value`.

  Args:
    text: of the command line.
    fields: what there is, by dotted name.

  Raises:
    UserError: no such field, one that is not for rows to change, or a value of
      another kind.
  """
  path, _, value = text.partition('=')
  path = path.removeprefix('config.')
  if path in _NOT_OVERRIDDEN:
    raise UserError(
      f'--override={text}: {path} is chosen by {_NOT_OVERRIDDEN[path]}'
    )
  if path not in fields:
    near = [x for x in fields if x.split('.')[0] == path.split('.')[0]]
    raise UserError(
      f'--override={text}: the config has no field {path!r}: choose one of '
      f'{", ".join(near or fields)}'
    )
  old = fields[path]
  try:
    new = value if isinstance(old, str) else ast.literal_eval(value)
  except (SyntaxError, ValueError):
    new = None
  if isinstance(old, float) and type(new) is int:
    new = float(new)
  if type(new) is not type(old):
    raise UserError(
      f'--override={text}: {path} is {old!r}, give a value of that kind'
    )
  return path, new


def _nest(fields: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `flatten`, with the nodes of `like`, empty ones too."""

  def walk(node: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {
      key: walk(value, f'{prefix}{key}.')
      if isinstance(value, Mapping)
      else fields[prefix + key]
      for key, value in node.items()
    }

  return walk(like, '')


@functools.cache
def _file_sha256(path: str) -> str:
  try:
    with open(pretrained.resolve(path), 'rb') as file:
      return hashlib.file_digest(file, 'sha256').hexdigest()
  except OSError as error:
    raise UserError(
      f'config.init.path={path} cannot be read ({error.strerror}): give a file '
      'of weights'
    ) from error


def _hash(fields: Mapping[str, Any]) -> str:
  """Hash of what decides the scores: of paths only the last part."""
  # By how it is searched no row is scored.
  free = (*(x for x in FREE_FIELDS if x != 'eval.'), 'eval.search.')
  kept = {
    key: os.path.basename(value.rstrip('/')) if key in _PATHS else value
    for key, value in fields.items()
    if key != 'seed' and key not in _WHERE and not key.startswith(free)
  }
  if not kept.get('num_neighbours'):
    # As it was before the field was there, so that records still agree.
    kept.pop('num_neighbours', None)
  if kept.get('init.path'):
    kept['init.path'] = _file_sha256(kept['init.path'])
  return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def resolve(of: Set, row: Row, seed: int = 0) -> Resolved:
  """Works out the config of a run.

  Fields of `SHARED` are those of `REFERENCE`, whatever the method's own are,
  and the contrastive methods, whose own `RECIPE` is for other encoders, learn
  by that of `dino`, whose terms do not wait.

  Args:
    of: the set.
    row: the row.
    seed: of the run.

  Raises:
    UserError: a row sets a field that the config lacks, or the weights to start
      from cannot be read.
  """
  words, base, fields = _fields_of_set(of, row.method)
  _, _, reference = _fields_of_set(of, ROW_BY_NAME[REFERENCE].method)
  takes = {SHARED: reference}
  if row.method in ('simclr', 'detcon', 'particle'):
    takes[RECIPE] = _fields_of_set(of, 'dino')[2]
  for prefixes, source in takes.items():
    fields.update(
      (k, v)
      for k, v in source.items()
      if k in fields and k.startswith(prefixes) and not k.startswith(_UNUSED)
    )
  for key, value in row.overrides.items():
    if key not in fields:
      raise UserError(
        f'row {row.name} sets config.{key}, which the config of {of.name} '
        'lacks: mend benchmarks/compare_rows.py'
      )
    fields[key] = value
  fields['seed'] = seed
  module = importlib.import_module(f'configs.{of.config}')
  return Resolved(
    argument=f'configs/{of.config}.py:{words}',
    config=_nest(fields, module.get_config(words).to_dict()),
    overrides={k: v for k, v in fields.items() if v != base[k] or k == 'seed'},
    sha256=_hash(fields),
    shared_sha256=_hash(
      {k: v for k, v in reference.items() if k.startswith((*SHARED, *RECIPE))}
    ),
    differs=tuple(
      k
      for k, v in fields.items()
      if k.startswith(SHARED)
      and not k.startswith(_UNUSED)
      and v != reference.get(k, v)
    ),
  )


def override_row(of: Set, base: Row, name: str, texts: Sequence[str]) -> Row:
  """A row of its own, out of another.

  Args:
    of: a set that the fields are those of.
    base: the row that is changed.
    name: of the new one.
    texts: `config.field=value`, as of --override.

  Raises:
    UserError: a field that is not there, or a value of another kind.
  """
  fields = flatten(resolve(of, base).config)
  changed = dict(parse_override(text, fields) for text in texts)
  return Row(name, base.method, {**base.overrides, **changed}, base.name)


def arguments(resolved: Resolved) -> list[str]:
  """What main.py is given, but for --workdir."""
  return [
    f'--config={resolved.argument}',
    *(f'--config.{key}={value}' for key, value in resolved.overrides.items()),
  ]
