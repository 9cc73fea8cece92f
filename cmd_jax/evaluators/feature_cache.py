"""Frozen features that are computed once and kept in the work directory."""

from __future__ import annotations

import hashlib
import io
import json
import pathlib
import sys
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cmd_jax.data.canvas import Canvases
from cmd_jax.files import disk_errors, safe_read
from cmd_jax.files.atomic import write_atomically

# Of a split that is streamed, canvases whose pixels are part of the key.
_NUM_HASHED = 16


def hash_canvases(canvases: Canvases) -> str:
  """SHA-256 of a split's names, canvases and sizes.

  Of canvases that are decoded as they are looked at, a few spread over the
  split stand for all.
  """
  digest = hashlib.sha256(json.dumps(list(canvases.file_names)).encode())
  count = len(canvases.file_names)
  rows = np.arange(count)
  if not isinstance(canvases.images, np.ndarray):
    rows = np.linspace(0, count - 1, min(count, _NUM_HASHED)).astype(int)
  for row in np.unique(rows):
    digest.update(np.ascontiguousarray(canvases.images[row]).tobytes())
    digest.update(np.asarray(canvases.sizes[row], np.int32).tobytes())
  return digest.hexdigest()


class FeatureCache:
  """Arrays under a key that says what they depend on."""

  def __init__(self, folder: pathlib.Path, key: Mapping[str, Any]):
    """Names the folder, which is created when something is kept.

    Args:
      folder: of the files.
      key: what all arrays depend on, as JSON can represent it.
    """
    self._folder, self._key = folder, dict(key)

  def get(
    self, name: str, compute: Callable[[], dict[str, np.ndarray]], **key: Any
  ) -> dict[str, np.ndarray]:
    """Arrays, computed unless they are there.

    Args:
      name: of the arrays, part of the file's name.
      compute: () -> the arrays.
      **key: what these arrays depend on besides.

    Returns:
      The arrays; damaged ones, or ones of another key, are computed again.

    Raises:
      UserError: the folder cannot be written.
    """
    text = json.dumps(self._key | {'name': name} | key, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    path = self._folder / f'{digest[:16]}_{name}.npz'
    try:
      with path.open('rb') as file:
        arrays = safe_read.read_npz(file)
      if str(arrays.pop('key')) != text:
        raise ValueError('it is of something else')
      names = arrays.pop('names').tolist()
      if sorted(arrays) != names:
        raise ValueError('it is incomplete')
      return arrays
    except FileNotFoundError:
      pass
    except (
      EOFError,
      KeyError,
      OSError,
      RuntimeError,
      ValueError,
      zipfile.BadZipFile,
    ) as error:
      print(
        f'{path} cannot be used ({error}): computing the features again',
        file=sys.stderr,
      )
    arrays = compute()
    buffer = io.BytesIO()
    names = np.array(sorted(arrays))
    np.savez(buffer, key=np.array(text), names=names, **arrays)
    with disk_errors.writing(path, 'make room, or choose another --workdir'):
      self._folder.mkdir(parents=True, exist_ok=True)
      write_atomically(path, buffer.getvalue())
    return arrays
