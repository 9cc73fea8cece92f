"""Orbax checkpoints: asynchronous, atomic, the last few kept."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from cmd_jax.errors import UserError
from cmd_jax.train_state import TrainState


class Checkpoints:
  """The checkpoints of a work directory."""

  def __init__(self, directory: pathlib.Path, *, keep: int):
    """Opens or creates the directory and keeps the last `keep` checkpoints."""
    self._directory = directory
    self._manager = ocp.CheckpointManager(
      directory.absolute(),
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=True
      ),
      item_names=('state', 'meta'),
    )

  def latest_step(self) -> int | None:
    """Step of the newest complete checkpoint, None if there is none."""
    return self._manager.latest_step()

  def save(self, state: TrainState, meta: dict[str, Any]) -> None:
    """Saves in the background; a step that is saved already is left alone."""
    step = int(state.step)
    if step != self.latest_step():
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
        ),
      )

  def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The newest checkpoint, in the structure and sharding of `like`.

    Args:
      like: a state, or the shapes and shardings of one.

    Raises:
      UserError: no checkpoint, or one that does not fit.
    """
    step = self.latest_step()
    if step is None:
      raise UserError(
        f'no checkpoint in {self._directory}: train first, or give the work '
        'directory of a run that has one'
      )
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(abstract),
          meta=ocp.args.JsonRestore(),
        ),
      )
    except (ValueError, KeyError, OSError) as error:
      lines = str(error).strip().splitlines() or [type(error).__name__]
      raise UserError(
        f'checkpoint {step} in {self._directory} cannot be restored '
        f'({lines[0]}): delete that folder to go on from the one before it'
      ) from error
    return restored.state, restored.meta

  def close(self) -> None:
    """Waits for the last save and releases the directory."""
    self._manager.wait_until_finished()
    self._manager.close()
