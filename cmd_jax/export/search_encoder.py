"""The encoder whose vectors a folder is searched by."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import cmd_jax
from cmd_jax.api import Encoder
from cmd_jax.convert import pretrained
from cmd_jax.rundir.saved_run import read_config
from cmd_jax.rundir.workdir import Workdir


def _usual(source: str) -> Mapping[str, Any]:
  """The fields of config.eval.search that were chosen for an encoder."""
  # A file of that name goes first.
  if source in pretrained.WEIGHTS and not os.path.exists(source):
    return pretrained.WEIGHTS[source].search
  workdir = Workdir(os.path.expanduser(source))
  if workdir.config_file.is_file() and workdir.checkpoints.is_dir():
    return read_config(workdir).eval.search.to_dict()
  return {'view_px': 0, 'pooling': 'encoder'}


def load_for_search(
  source: str, *, newest: bool = False, view_px: int = 0, pooling: str = ''
) -> Encoder:
  """Loads an encoder such that its vectors tell most of likeness.

  Args:
    source: see `cmd_jax.load`.
    newest: whether the newest checkpoint of a run is taken, not the best.
    view_px: side of the views; 0 for the one chosen for the encoder.
    pooling: one of `models.pooling.POOLINGS`; empty for the one chosen.

  Raises:
    UserError: see `cmd_jax.load`.
  """
  usual = _usual(source)
  return cmd_jax.load(
    source,
    newest=newest,
    view_px=view_px or usual['view_px'],
    pooling=pooling or usual['pooling'],
  )
