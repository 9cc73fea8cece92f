"""What a run leaves behind: config, metrics, results, reports."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from cmd_jax.config.defaults import complete
from cmd_jax.errors import UserError
from cmd_jax.files import disk_errors, safe_read
from cmd_jax.files.atomic import write_atomically
from cmd_jax.files.formats import VERSION_FIELD, check_format
from cmd_jax.rundir.config_diff import (
  EPOCHS,
  Difference,
  differences,
  short,
  table,
)

# Of config.json, which stands for all of the directory, and of results.json.
FORMAT_VERSION = 1


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes readable JSON atomically."""
  write_atomically(path, json.dumps(value, indent=2) + '\n')


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    UserError: the file can't be read or parsed, or holds no object.
  """
  try:
    value = safe_read.parse_json(path.read_bytes())
    if not isinstance(value, dict):
      raise ValueError('not a JSON object')
    return value
  except (OSError, ValueError) as error:
    raise UserError(
      f'{path} cannot be read ({error}): delete it or restore it from a copy'
    ) from error


def _read_versioned(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object without its version, which is looked at."""
  record = read_json(path)
  check_format(record, FORMAT_VERSION, path)
  record.pop(VERSION_FIELD, None)
  return record


def _write_versioned(path: pathlib.Path, record: Mapping[str, Any]) -> None:
  write_json(path, {VERSION_FIELD: FORMAT_VERSION, **record})


class Workdir:
  """A work directory that belongs to one config."""

  def __init__(self, path: str):
    """Names the directory; nothing is touched yet.

    Args:
      path: of a file system, or a URL that etils.epath knows, such as gs://.
    """
    self.is_remote = '://' in path
    self.path = pathlib.Path(path).expanduser()
    if self.is_remote:
      # Imported late: most directories are local.
      from etils import epath

      self.path = epath.Path(path)
    self.config_file = self.path / 'config.json'
    self.metrics_file = self.path / 'metrics.jsonl'
    self.results_file = self.path / 'results.json'
    self.neighbours_file = self.path / 'neighbours.png'
    self.neighbour_rows = self.path / 'neighbours.npz'
    self.skipped_file = self.path / 'skipped_images.txt'
    self.non_finite_file = self.path / 'non_finite.json'
    self.checkpoints = self.path / 'checkpoints'
    self.tensorboard = self.path / 'tensorboard'
    self.parts = self.path / 'parts'
    self.features = self.path / 'features'

  def read_config(self) -> dict[str, Any]:
    """The config of the run, with defaults for fields that are newer.

    Raises:
      UserError: config.json can't be read or is of a newer program.
    """
    return complete(_read_versioned(self.config_file))

  def check(self, config: Mapping) -> list[Difference]:
    """Refuses a directory that belongs to another config, touching nothing.

    A table on stderr lists the fields that differ where it is refused.

    Args:
      config: nested dict that JSON can represent.

    Returns:
      What differs and may.

    Raises:
      UserError: another config, with the fields that differ, or no directory.
    """
    if self.path.exists() and not self.path.is_dir():
      raise UserError(f'{self.path} is a file: give --workdir a directory')
    if not self.config_file.exists():
      return []
    found = differences(_read_versioned(self.config_file), config)
    differing = [x for x in found if not x.may_change]
    if differing:
      print(table(found), file=sys.stderr)
      listed = ', '.join(
        f'{x.field} is {short(x.there)} there and {short(x.here)} here'
        for x in differing[:4]
      )
      more = f' and {len(differing) - 4} more' if len(differing) > 4 else ''
      raise UserError(
        f'{self.path} belongs to a run with another config ({listed}{more}): '
        'choose another --workdir or repeat the command of that run'
      )
    return found

  def open(self, config: Mapping) -> None:
    """Creates the directory and records the config.

    Raises:
      UserError: as `check`, or the directory can't be written.
    """
    for x in self.check(config):
      if x.field == EPOCHS:
        print(f'{x.field} {x.there} -> {x.here}: {x.why}', file=sys.stderr)
    with disk_errors.writing(self.path, 'choose another --workdir'):
      self.path.mkdir(parents=True, exist_ok=True)
      _write_versioned(self.config_file, config)

  def has_checkpoint(self) -> bool:
    """Whether a step was saved."""
    return self.checkpoints.is_dir() and any(
      path.name.isdigit() for path in self.checkpoints.iterdir()
    )

  def results(self) -> dict[str, Any]:
    """What results.json holds; empty if there is none yet."""
    if not self.results_file.exists():
      return {}
    return _read_versioned(self.results_file)

  def update_results(self, **entries) -> dict[str, Any]:
    """Adds entries to results.json and returns all of it."""
    results = {**self.results(), **entries}
    _write_versioned(self.results_file, results)
    return results
