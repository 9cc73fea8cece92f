"""Folders whose pictures are nobody's photographs."""

from __future__ import annotations

import os
from collections.abc import Sequence

from cmd_jax.files import safe_read

# What storage systems and archivers put beside the photographs: thumbnails,
# deleted files, snapshots of earlier states. Hidden folders are none anyway.
_OF_SYSTEMS = frozenset(
  (
    *('@eadir', '@tmp', '@recycle', '@recently-snapshot', '@sharebin'),
    *('#recycle', '#snapshot', '$recycle.bin', '__macosx', 'lost+found'),
    'system volume information',
  )
)
_CONFIG_FILE = 'config.json'
# Of `rundir.workdir`: what a run has from its first step on.
_CHECKPOINTS = 'checkpoints'
# A config of this program has them, before its first step already.
_OF_CONFIGS = {'format_version', 'dataset', 'method', 'model', 'eval'}
_NAMED = 3


def is_of_system(name: str) -> bool:
  """Whether a folder of this name is a storage system's own.

  Args:
    name: of the folder, without what is before it.
  """
  return name.lower() in _OF_SYSTEMS


def is_workdir(path: str | os.PathLike[str]) -> bool:
  """Whether a folder is the work directory of a run.

  Args:
    path: of the folder.
  """
  config_file = os.path.join(path, _CONFIG_FILE)
  if not os.path.isfile(config_file):
    return False
  if os.path.isdir(os.path.join(path, _CHECKPOINTS)):
    return True
  try:
    with open(config_file, 'rb') as file:
      config = safe_read.parse_json(file.read())
  except (OSError, ValueError):
    return False
  return isinstance(config, dict) and config.keys() >= _OF_CONFIGS


def note_on(what: str, folders: Sequence[str]) -> list[str]:
  """A sentence about folders that are not looked into; none for no folders.

  Args:
    what: what they are, in the plural.
    folders: their paths relative to the folder of photographs.
  """
  if not folders:
    return []
  names = ', '.join(
    safe_read.one_line(name, 80) for name in sorted(folders)[:_NAMED]
  )
  more = ', ...' if len(folders) > _NAMED else ''
  return [
    f'{len(folders):,} folders are not looked into for photographs, they are '
    f'{what}: {names}{more}'
  ]


WORKDIRS = 'work directories of runs'
OF_SYSTEMS = 'thumbnails or deleted files of the storage system'
