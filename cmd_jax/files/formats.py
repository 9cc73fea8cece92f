"""Versions of the files that a run leaves behind."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from cmd_jax.errors import UserError

VERSION_FIELD = 'format_version'


def check_format(
  record: Mapping[str, Any],
  newest: int,
  path: pathlib.Path,
  field: str = VERSION_FIELD,
) -> None:
  """Refuses what a newer program wrote.

  Args:
    record: what the file holds; one without a version is older than versions.
    newest: the newest version that this program reads.
    path: of the file, for the message.
    field: of the record that holds the version.

  Raises:
    UserError: a newer version, or none that can be.
  """
  version = record.get(field, 0)
  if not isinstance(version, int) or version < 0:
    raise UserError(
      f'{path} has {field} {version!r}, which is no version: restore '
      'it from a copy'
    )
  if version > newest:
    raise UserError(
      f'{path} was made by a newer cmd_jax (format {version}, this program '
      f'reads up to {newest}): pip install -U cmd_jax'
    )
