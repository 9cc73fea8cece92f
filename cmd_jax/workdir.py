"""What a run leaves behind: config, metrics, results, reports."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from cmd_jax.atomic import write_atomically
from cmd_jax.errors import UserError

# Fields that may differ between a run and its resumption: they change what is
# recorded and where it runs, not what is computed.
FREE_FIELDS = (
  'checkpoint.',
  'eval.',
  'log.',
  'parallel.',
  'placement',
  'stream.',
  'dataset.data_dir',
  'dataset.index_file',
  'parts.keypoints',
)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes readable JSON atomically."""
  write_atomically(path, json.dumps(value, indent=2) + '\n')


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    UserError: the file can't be read or parsed, or holds no object.
  """
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
    if not isinstance(value, dict):
      raise ValueError('not a JSON object')
    return value
  except (OSError, ValueError) as error:
    raise UserError(
      f'{path} cannot be read ({error}): delete it or restore it from a copy'
    ) from error


def flatten(tree: Mapping, prefix: str = '') -> dict[str, Any]:
  """{'a': {'b': 1}} -> {'a.b': 1}."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat.update(flatten(value, f'{prefix}{key}.'))
    else:
      flat[prefix + key] = value
  return flat


class Workdir:
  """A work directory that belongs to one config."""

  def __init__(self, path: str):
    """Names the directory; nothing is touched yet."""
    self.path = pathlib.Path(path)
    self.config_file = self.path / 'config.json'
    self.metrics_file = self.path / 'metrics.jsonl'
    self.results_file = self.path / 'results.json'
    self.neighbours_file = self.path / 'neighbours.png'
    self.skipped_file = self.path / 'skipped_images.txt'
    self.checkpoints = self.path / 'checkpoints'
    self.tensorboard = self.path / 'tensorboard'
    self.parts = self.path / 'parts'
    self.features = self.path / 'features'

  def check(self, config: Mapping) -> None:
    """Refuses a directory that belongs to another config, touching nothing.

    Args:
      config: nested dict that JSON can represent.

    Raises:
      UserError: another config, with the fields that differ, or no directory.
    """
    if self.path.exists() and not self.path.is_dir():
      raise UserError(f'{self.path} is a file: give --workdir a directory')
    if not self.config_file.exists():
      return
    there = flatten(read_json(self.config_file))
    # Through JSON, so that tuples compare equal to the lists they become.
    here = flatten(json.loads(json.dumps(config)))
    differing = [
      key
      for key in sorted(there.keys() | here.keys())
      if there.get(key) != here.get(key) and not key.startswith(FREE_FIELDS)
    ]
    if differing:
      listed = ', '.join(
        f'{key} is {there.get(key)!r} there and {here.get(key)!r} here'
        for key in differing[:4]
      )
      more = f' and {len(differing) - 4} more' if len(differing) > 4 else ''
      raise UserError(
        f'{self.path} belongs to a run with another config ({listed}{more}): '
        'choose another --workdir or repeat the command of that run'
      )

  def open(self, config: Mapping) -> None:
    """Creates the directory and records the config.

    Raises:
      UserError: as `check`, or the directory can't be written.
    """
    self.check(config)
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      write_json(self.config_file, config)
    except OSError as error:
      raise UserError(
        f'{self.path} cannot be written ({error.strerror}): choose another '
        '--workdir'
      ) from error

  def has_checkpoint(self) -> bool:
    """Whether a step was saved."""
    return self.checkpoints.is_dir() and any(
      path.name.isdigit() for path in self.checkpoints.iterdir()
    )

  def results(self) -> dict[str, Any]:
    """What results.json holds; empty if there is none yet."""
    if not self.results_file.exists():
      return {}
    return read_json(self.results_file)

  def update_results(self, **entries) -> dict[str, Any]:
    """Adds entries to results.json and returns all of it."""
    results = {**self.results(), **entries}
    write_json(self.results_file, results)
    return results
