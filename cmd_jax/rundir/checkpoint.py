"""Orbax checkpoints: whole or not there, verified, the last few kept.

Orbax notices damage to its own indices, but not to the arrays: a flipped bit
comes back as another number. So each checkpoint has a manifest with a digest of
every file, made before Orbax gives the folder its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import pathlib
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from cmd_jax.devices import processes
from cmd_jax.errors import UserError
from cmd_jax.files import disk_errors
from cmd_jax.files.atomic import write_atomically
from cmd_jax.files.formats import VERSION_FIELD, check_format
from cmd_jax.training.state import TrainState

MANIFEST = 'manifest.json'
_FORMAT_VERSION = 1
# Written after the manifest; they hold times, and nothing is read from them.
_WITHOUT_DIGEST = (MANIFEST, '_CHECKPOINT_METADATA', 'commit_success.txt')


def saved_steps(directory: pathlib.Path) -> list[int]:
  """Steps of the complete checkpoints in a folder, the newest first."""
  if not directory.is_dir():
    return []
  names = [path.name for path in directory.iterdir() if path.is_dir()]
  return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def _digests(path: pathlib.Path) -> dict[str, list]:
  """{name of a file below `path`: [bytes, SHA-256]}."""
  found = {}
  for file in sorted(path.rglob('*')):
    name = file.relative_to(path).as_posix()
    if file.is_file() and name not in _WITHOUT_DIGEST:
      with open(file, 'rb') as content:
        digest = hashlib.file_digest(content, 'sha256').hexdigest()
      found[name] = [file.stat().st_size, digest]
  return found


def write_manifest(path: pathlib.Path) -> None:
  """Writes a digest of every file of a checkpoint beside them."""
  content = {VERSION_FIELD: _FORMAT_VERSION, 'files': _digests(path)}
  write_atomically(path / MANIFEST, json.dumps(content, indent=1) + '\n')


def damage(path: pathlib.Path) -> str | None:
  """What is wrong with a checkpoint; None if nothing is, as far as is known.

  Args:
    path: folder of the checkpoint. One without a manifest is from before there
      were any, and taken as it is.

  Raises:
    UserError: a later version of this program has saved it.
  """
  if not (path / MANIFEST).exists():
    return None
  try:
    manifest = json.loads((path / MANIFEST).read_bytes())
    there, here = dict(manifest['files']), _digests(path)
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    return f'{MANIFEST} or a file of it cannot be read ({error})'
  check_format(manifest, _FORMAT_VERSION, path / MANIFEST)
  for name in sorted(there.keys() | here.keys()):
    if name not in here:
      return f'{name} is missing'
    if name not in there:
      return f'{name} does not belong to it'
    if there[name] != here[name]:
      return f'{name} is not what was written ({here[name][0]} bytes)'
  return None


def newest_good_step(directory: pathlib.Path) -> tuple[int, list[int]]:
  """The newest checkpoint whose files are as they were written.

  Args:
    directory: with the checkpoints of a run. Nothing in it is changed; what is
      wrong with newer ones is said on stderr.

  Returns:
    Its step, and the steps of the newer ones, which are damaged.

  Raises:
    UserError: there is none.
  """
  damaged = []
  for step in saved_steps(directory):
    reason = damage(directory / str(step))
    if reason is None:
      return step, damaged
    print(
      f'checkpoint {directory / str(step)} is damaged: {reason}',
      file=sys.stderr,
    )
    damaged.append(step)
  if damaged:
    raise UserError(
      f'all checkpoints in {directory} are damaged ({damaged[0]}: '
      f'{damage(directory / str(damaged[0]))}): restore them from a copy, or '
      'choose another --workdir to begin again'
    )
  raise UserError(
    f'no checkpoint in {directory}: train first, or give the work directory of '
    'a run that has one'
  )


def _set_aside(directory: pathlib.Path, step: int) -> None:
  """Gives a damaged checkpoint another name, so that its step can be saved."""
  number, target = 1, directory / f'damaged_{step}'
  while target.exists():
    number += 1
    target = directory / f'damaged_{step}_{number}'
  (directory / str(step)).rename(target)
  print(f'it is kept as {target}', file=sys.stderr)


def _arrays(tree: Any) -> dict[str, str]:
  flat = ocp.tree.to_flat_dict(tree, keep_empty_nodes=False)
  return {
    '.'.join(map(str, path)): f'{tuple(x.shape)} {np.dtype(x.dtype).name}'
    for path, x in flat.items()
  }


def _check_same_arrays(path: pathlib.Path, like: TrainState) -> None:
  there = _arrays(ocp.PyTreeCheckpointHandler().metadata(path / 'state').tree)
  here = _arrays(like)
  differing = [
    f'{name} is {there.get(name, "missing")} there and '
    f'{here.get(name, "missing")} here'
    for name in sorted(there.keys() | here.keys())
    if there.get(name) != here.get(name)
  ]
  if differing:
    raise UserError(
      f'checkpoint {path} is of another model, optimiser or program: '
      f'{len(differing)} arrays differ ({"; ".join(differing[:3])}): give the '
      'config that the run was started with, and the version of cmd_jax'
    )


def _read(
  directory: pathlib.Path, step: int, like: TrainState
) -> tuple[TrainState, dict[str, Any]]:
  path = (directory / str(step)).absolute()
  abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
  handler = ocp.CompositeCheckpointHandler('state', 'meta')
  try:
    _check_same_arrays(path, like)
    with ocp.Checkpointer(handler) as checkpointer:
      restored = checkpointer.restore(
        path,
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(abstract),
          meta=ocp.args.JsonRestore(),
        ),
      )
  except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    raise UserError(
      f'checkpoint {path} cannot be read ({lines[0]}): it has no digests that '
      'would tell whether it is damaged; move that folder elsewhere to use the '
      'checkpoint before it'
      if not (path / MANIFEST).exists()
      else f'checkpoint {path} cannot be read ({lines[0]}), though its files '
      'are as they were written: look at the disk, and use the version of '
      'cmd_jax that has saved it'
    ) from error
  return restored.state, restored.meta


def restore_newest(
  directory: pathlib.Path, like: TrainState
) -> tuple[TrainState, dict[str, Any]]:
  """The newest good checkpoint; the folder is only read.

  Args:
    directory: with the checkpoints of a run.
    like: a state, or the shapes and shardings of one.

  Returns:
    The state in the structure and sharding of `like`, and what was saved
    with it.

  Raises:
    UserError: no good checkpoint, or one that does not fit.
  """
  step = processes.broadcast_from_main(lambda: newest_good_step(directory)[0])
  return _read(directory, step, like)


def restore_step(
  directory: pathlib.Path, step: int, like: TrainState
) -> TrainState:
  """The state of one checkpoint; the folder is only read.

  Args:
    directory: with the checkpoints of a run.
    step: which of them.
    like: a state, or the shapes and shardings of one.

  Raises:
    UserError: it is damaged, or does not fit.
  """
  path = directory / str(step)
  reason = processes.broadcast_from_main(lambda: damage(path))
  if reason is not None:
    raise UserError(
      f'checkpoint {path}, the best one, is damaged: {reason}; cmd-jax '
      'evaluate --newest scores the newest'
    )
  return _read(directory, step, like)[0]


class _SaysMore(logging.Filter):
  """Leaves out the tasks that failed with a disk whose failure is told."""

  def filter(self, record: logging.LogRecord) -> bool:
    error = record.exc_info and record.exc_info[1]
    return not error or disk_errors.explain(error, _ANYWHERE) is None


_ANYWHERE = pathlib.Path('/')
_SAYS_MORE = _SaysMore()


@contextlib.contextmanager
def _without_traces() -> Iterator[None]:
  """Keeps Orbax from printing the traces of errors that it raises as well."""
  logger, previous = logging.getLogger('absl'), sys.unraisablehook

  def has_none(record):
    return record.exc_info is None

  def show(unraisable):
    # From TensorStore's threads, when the first of many writes has failed.
    if str(unraisable.exc_value) != 'Event loop is closed':
      previous(unraisable)

  logger.addFilter(has_none)
  # Those of the writes that failed after the first, at any later time: when
  # their tasks are collected, which may be as the program ends.
  logging.getLogger('asyncio').addFilter(_SAYS_MORE)
  sys.unraisablehook = show
  try:
    yield
    # After a failure these too may come as late as that.
    sys.unraisablehook = previous
    logging.getLogger('asyncio').removeFilter(_SAYS_MORE)
  finally:
    logger.removeFilter(has_none)


class _NewestAndBest:
  """Which checkpoints Orbax leaves there: the newest few, and the best."""

  def __init__(self, keep: int):
    self._keep, self.best = keep, None

  def should_preserve(
    self, checkpoints: Sequence[Any], *, context: Any
  ) -> list[bool]:
    """Whether each of the checkpoints, the oldest first, is to stay."""
    del context
    first = len(checkpoints) - self._keep
    return [
      i >= first or x.step == self.best for i, x in enumerate(checkpoints)
    ]


class Checkpoints:
  """The checkpoints of a run that saves more of them, and alone."""

  def __init__(self, directory: pathlib.Path, *, keep: int):
    """Opens or creates the directory and keeps the last `keep` checkpoints."""
    self._directory, self._saving = directory, None
    self._kept = _NewestAndBest(keep)
    # An object store has digests of its own, and no empty directories.
    self._is_local = '://' not in str(directory)
    with disk_errors.explaining(directory.parent):
      self._manager = ocp.CheckpointManager(
        directory.absolute(),
        options=ocp.CheckpointManagerOptions(
          preservation_policy=self._kept,
          # What a save that was cut short has left.
          cleanup_tmp_directories=True,
          lightweight_initialize=True,
          async_options=ocp.AsyncOptions(
            # After the last file and before the folder has its name.
            post_finalization_callback=self._write_manifest,
            # Else a directory that can't be made is waited for, for minutes.
            create_directories_asynchronously=False,
          ),
        ),
        item_names=('state', 'meta'),
      )

  def _unfinished(self) -> list[pathlib.Path]:
    if not self._is_local:
      return []
    return list(self._directory.glob(f'{self._saving}.orbax-checkpoint-tmp*'))

  def _write_manifest(self) -> None:
    for path in self._unfinished():
      write_manifest(path)

  def latest_step(self) -> int | None:
    """Step of the newest complete checkpoint, None if there is none."""
    # Elsewhere a shared directory may look as it did a moment ago.
    return processes.broadcast_from_main(self._manager.latest_step)

  def steps(self) -> list[int]:
    """Steps of the complete checkpoints, the newest first."""
    return processes.broadcast_from_main(lambda: saved_steps(self._directory))

  def save(
    self,
    state: TrainState,
    meta: Mapping[str, Any],
    *,
    best: int | None = None,
  ) -> None:
    """Saves, and returns when it is on the disk.

    So a run never has more steps to lose than lie between two saves. A step
    that is saved already is left alone.

    Args:
      state: to save.
      meta: saved with it; JSON can represent it.
      best: step of the checkpoint that is kept however old it is. Older ones
        are removed when this one is whole.

    Raises:
      UserError: the disk fails; earlier checkpoints are as they were.
    """
    step = int(state.step)
    if step == self.latest_step():
      return
    if self._is_local and not self._directory.is_dir():
      raise UserError(
        f'{self._directory} has gone while the program ran: bring it back and '
        'repeat the command'
      )
    self._saving, self._kept.best = step, best
    try:
      with disk_errors.explaining(self._directory), _without_traces():
        self._manager.save(
          step,
          args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            meta=ocp.args.JsonSave(dict(meta)),
          ),
        )
        self._manager.wait_until_finished()
    except BaseException:
      if processes.is_main_process():
        # On a full disk what is unfinished is in the way.
        for path in self._unfinished():
          shutil.rmtree(path, ignore_errors=True)
      raise

  def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The newest good checkpoint; newer ones are set aside as damaged.

    Args:
      like: a state, or the shapes and shardings of one.

    Returns:
      The state in the structure and sharding of `like`, and what was saved
      with it.

    Raises:
      UserError: no good checkpoint, or one that does not fit.
    """
    step, damaged = processes.broadcast_from_main(
      lambda: newest_good_step(self._directory)
    )
    found = _read(self._directory, step, like)

    def set_aside():
      for number in damaged:
        _set_aside(self._directory, number)

    processes.broadcast_from_main(set_aside)
    self._manager.reload()
    return found

  def close(self) -> None:
    """Releases the directory."""
    self._manager.close()
