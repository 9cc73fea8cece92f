"""Part masks on disk, with a manifest of what they were made of."""

from __future__ import annotations

import hashlib
import io
import json
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from cmd_jax.errors import UserError
from cmd_jax.files import disk_errors, safe_read
from cmd_jax.files.atomic import write_atomically
from cmd_jax.files.formats import check_format
from cmd_jax.files.safe_read import one_line

_MANIFEST = 'manifest.json'
_FORMAT = 1
_MASKS = re.compile(r'masks-[0-9a-f]{16}\.npz')
# Differences that a message has room for.
_LISTED = 12


class Manifest(NamedTuple):
  """What part masks depend on.

  Attributes:
    encoder_sha256: hash of the encoder's variables.
    settings: how the parts were found; strings, numbers and lists.
    seed: of the clustering.
    num_images: N.
    names_sha256: hash of the images' names in their order.
    mask_px: R, side of a mask.
  """

  encoder_sha256: str
  settings: Mapping[str, Any]
  seed: int
  num_images: int
  names_sha256: str
  mask_px: int

  def flat(self) -> dict[str, Any]:
    """The fields as JSON gives them back, with those of the settings."""
    fields = json.loads(json.dumps(self._asdict()))
    settings = fields.pop('settings')
    if not isinstance(settings, dict):
      raise TypeError('settings, which is no object')
    return fields | {f'settings.{key}': settings[key] for key in settings}


def hash_variables(variables: Any) -> str:
  """SHA-256 of the names, shapes, types and values of a tree of arrays."""
  digest = hashlib.sha256()
  leaves = jax.tree_util.tree_leaves_with_path(variables)
  named = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
  for name in sorted(named):
    array = np.asarray(named[name])
    digest.update(f'{name} {array.shape} {array.dtype}\n'.encode())
    digest.update(np.ascontiguousarray(array).tobytes())
  return digest.hexdigest()


def make_manifest(
  variables: Any,
  file_names: Sequence[str],
  *,
  settings: Mapping[str, Any],
  seed: int,
  mask_px: int,
) -> Manifest:
  """The manifest of masks about to be made, or expected.

  Args:
    variables: of the encoder.
    file_names: [N] names of the images.
    settings: see `Manifest`.
    seed: of the clustering.
    mask_px: R.
  """
  names = json.dumps(list(file_names)).encode()
  return Manifest(
    encoder_sha256=hash_variables(variables),
    settings=settings,
    seed=seed,
    num_images=len(file_names),
    names_sha256=hashlib.sha256(names).hexdigest(),
    mask_px=mask_px,
  )


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 20 else f'{text[:13]}...'


def _check_same(where: str, there: Mapping, expected: Manifest) -> None:
  """Raises UserError with what differs from the manifest wanted."""
  here = expected.flat()
  differing = [
    f'{one_line(key, 60)} is {_short(there.get(key))} there and '
    f'{_short(here.get(key))} here'
    for key in sorted(there.keys() | here.keys())
    if there.get(key) != here.get(key)
  ]
  if differing:
    more = ', ...' if len(differing) > _LISTED else ''
    raise UserError(
      f'{where} has part masks that do not fit this run '
      f'({", ".join(differing[:_LISTED])}{more}): discover the '
      'parts again, in another folder'
    )


def _npz(**arrays: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **arrays)
  return buffer.getvalue()


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    safe_read.check_regular(path)
    value = safe_read.parse_json(path.read_bytes())
    if not isinstance(value, dict):
      raise ValueError('not a JSON object')
    return value
  except (OSError, ValueError) as error:
    raise UserError(
      f'{path} cannot be read ({one_line(error)}): discover the parts again'
    ) from error


def save_masks(
  folder: pathlib.Path, masks: np.ndarray, manifest: Manifest
) -> None:
  """Writes masks and their manifest; what was there before stays until then.

  Args:
    folder: made if it is not there.
    masks: [N, R, R] uint8 part ids.
    manifest: of these masks.

  Raises:
    UserError: the folder can't be written.
    ValueError: masks of another number, size or type.
  """
  shape = (manifest.num_images, manifest.mask_px, manifest.mask_px)
  if masks.shape != shape or masks.dtype != np.uint8:
    raise ValueError(f'masks {masks.shape} {masks.dtype}, not {shape} uint8')
  content = _npz(masks=masks)
  sha256 = hashlib.sha256(content).hexdigest()
  name = f'masks-{sha256[:16]}.npz'
  record = {'format': _FORMAT, 'file': name, 'file_sha256': sha256}
  with disk_errors.writing(folder, 'choose another folder'):
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / name, content)
    # Only now do the new masks count.
    write_atomically(
      folder / _MANIFEST,
      json.dumps(record | manifest._asdict(), indent=2) + '\n',
    )
    for old in folder.glob('masks-*.npz'):
      if old.name != name:
        old.unlink()


def has_masks(folder: pathlib.Path) -> bool:
  """Whether `save_masks` has ended in a folder."""
  return (folder / _MANIFEST).exists()


def load_masks(folder: pathlib.Path, expected: Manifest) -> np.ndarray:
  """Reads masks if they are those expected.

  Args:
    folder: of `save_masks`.
    expected: what the masks must have been made of.

  Returns:
    [N, R, R] uint8 part ids.

  Raises:
    UserError: no masks, damaged ones, or masks of another encoder, of other
      images, of another size or with other settings, with what differs.
  """
  path = folder / _MANIFEST
  if not path.exists():
    raise UserError(f'{folder} has no part masks: discover the parts first')
  record = _read_json(path)
  check_format(record, _FORMAT, path, 'format')
  if record.get('format') != _FORMAT:
    raise UserError(
      f'{path} has format {_short(record.get("format"))}, not {_FORMAT}: '
      'discover the parts again'
    )
  try:
    there = Manifest(*(record[field] for field in Manifest._fields)).flat()
  except (KeyError, TypeError) as error:
    raise UserError(
      f'{path} lacks the field {one_line(error)}: discover the parts again'
    ) from error
  _check_same(str(folder), there, expected)
  name = record.get('file')
  if type(name) is not str or not _MASKS.fullmatch(name):
    raise UserError(
      f'{path} names {_short(name)} as its masks, which are masks-....npz in '
      f'{folder}: discover the parts again'
    )
  try:
    return _read_masks(folder / name, record.get('file_sha256'), expected)
  except (OSError, ValueError, KeyError) as error:
    raise UserError(
      f'{folder / name} cannot be read ({one_line(error)}): discover the parts '
      'again'
    ) from error


def _read_masks(
  path: pathlib.Path, sha256: Any, expected: Manifest
) -> np.ndarray:
  safe_read.check_regular(path)
  with path.open('rb') as file:
    if hashlib.file_digest(file, 'sha256').hexdigest() != sha256:
      raise ValueError('another content than its manifest says')
    masks = safe_read.read_npz(file)['masks']
  shape = (expected.num_images, expected.mask_px, expected.mask_px)
  if masks.shape != shape or masks.dtype != np.uint8:
    raise ValueError(f'masks {masks.shape} {masks.dtype}, not {shape} uint8')
  return masks


class Chunks:
  """Results for chunks of images, kept on disk so that a run can go on.

  Args:
    folder: where they are kept; None keeps them in memory.
    manifest: of the masks in the making; needed with a folder.

  Raises:
    UserError: the folder has chunks of another manifest or can't be written.
  """

  def __init__(
    self, folder: pathlib.Path | None, manifest: Manifest | None
  ) -> None:
    self._folder = folder
    self._memory: dict[str, dict[str, np.ndarray]] = {}
    if folder is None:
      return
    if manifest is None:
      raise ValueError('chunks in a folder need a manifest')
    path = folder / _MANIFEST
    if path.exists():
      _check_same(str(folder), _read_json(path), manifest)
      return
    with disk_errors.writing(folder, 'choose another folder'):
      folder.mkdir(parents=True, exist_ok=True)
      write_atomically(path, json.dumps(manifest.flat(), indent=2) + '\n')

  def get(
    self, name: str, compute: Callable[[], dict[str, np.ndarray]]
  ) -> dict[str, np.ndarray]:
    """The arrays of a chunk, computed unless they are there already."""
    if self._folder is None:
      if name not in self._memory:
        self._memory[name] = compute()
      return self._memory[name]
    path = self._folder / f'{name}.npz'
    try:
      safe_read.check_regular(path)
      with path.open('rb') as file:
        return safe_read.read_npz(file)
    except (OSError, ValueError):
      # Missing, or damaged from outside: either way it is made anew.
      arrays = compute()
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    with disk_errors.writing(path, 'make room, or choose another folder'):
      write_atomically(path, buffer.getvalue())
    return arrays

  def remove(self) -> None:
    """Deletes the chunks once the masks are safe."""
    self._memory.clear()
    if self._folder is not None:
      shutil.rmtree(self._folder, ignore_errors=True)
