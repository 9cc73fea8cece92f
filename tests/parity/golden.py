"""Numbers that the released programs computed; tests/golden/README.md.

`CMD_JAX_GOLDEN_DIR` names the folder; without it the first of _FOLDERS that
exists is taken. Every `<fixture>_s<seed>.npz` in it is tested.
"""

import json
import os
import pathlib

import numpy as np
import pytest

_TESTS = pathlib.Path(__file__).resolve().parents[1]
_SELECTION = _TESTS / 'golden'
_FOLDERS = (_TESTS.parents[1] / 'shared' / 'golden', _SELECTION)


def folder():
  """The folder of the fixtures; fails where there is none."""
  named = os.environ.get('CMD_JAX_GOLDEN_DIR')
  folders = [pathlib.Path(named)] if named else _FOLDERS
  for path in folders:
    if path.is_dir():
      return path
  raise FileNotFoundError(
    f'no golden fixtures in {", ".join(map(str, folders))}: set '
    'CMD_JAX_GOLDEN_DIR to the folder that has them'
  )


class Fixture:
  """The arrays of one file by name."""

  def __init__(self, path):
    self.path = path
    with np.load(path) as arrays:
      self._arrays = dict(arrays)

  def __getitem__(self, name):
    return self._arrays[name]

  def __contains__(self, name):
    return name in self._arrays

  def under(self, prefix):
    """The arrays below a prefix, which is taken off their names."""
    return {
      name.removeprefix(prefix): value
      for name, value in self._arrays.items()
      if name.startswith(prefix)
    }


def require(pattern):
  """The files of a fixture, or why there are none, for `pytest.mark`.

  Raises:
    FileNotFoundError: the folder has no fixture at all.
  """
  paths = sorted(folder().glob(pattern))
  if paths:
    return [pytest.param(path, id=path.stem) for path in paths]
  if not any(folder().glob('*_s[0-9]*.npz')):
    raise FileNotFoundError(
      f'{folder()} has no golden fixtures: set CMD_JAX_GOLDEN_DIR to a folder '
      'that has them'
    )
  reason = f'no {pattern} in {folder()}: set CMD_JAX_GOLDEN_DIR to have it'
  return [pytest.param(None, id=pattern, marks=pytest.mark.skip(reason))]


def read_json(name):
  """A fixture without seed; the selection has all of these."""
  path = folder() / name
  return json.loads((path if path.exists() else _SELECTION / name).read_text())


def fixtures(name):
  """Parametrizes `golden_file` by every seed of a fixture.

  The tests of one that the folder lacks, as tests/golden lacks the large ones,
  are skipped with the reason.
  """
  return pytest.mark.parametrize('golden_file', require(f'{name}_s[0-9]*.npz'))


def images(array):
  """torch's [..., C, H, W] as [..., H, W, C]."""
  return np.moveaxis(array, -3, -1)
