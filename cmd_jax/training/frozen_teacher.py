"""The frozen teacher of `method=distil`: of a run, a file or a package."""

from __future__ import annotations

from cmd_jax.convert import pretrained
from cmd_jax.convert.recognise import recognise_encoder
from cmd_jax.errors import UserError
from cmd_jax.methods.distil import FrozenTeacher
from cmd_jax.rundir.saved_run import read_network
from cmd_jax.rundir.workdir import Workdir


def load_teacher(*, path: str, network: str, view_px: int) -> FrozenTeacher:
  """Reads the network that is distilled.

  Args:
    path: a file of weights as docs/weights.md lists them, the work directory of
      a run, or a name of `pretrained.WEIGHTS`.
    network: 'teacher' or 'student', where there are both.
    view_px: side to which views are resized for it; 0 for their own.

  Raises:
    UserError: nothing that can be read.
  """
  if not path:
    raise UserError(
      'config.method.teacher.path is empty: give a file of weights, the '
      f'--workdir of a run, or one of {", ".join(pretrained.WEIGHTS)}'
    )
  try:
    resolved = pretrained.resolve(path)
    workdir = Workdir(str(resolved))
    if workdir.checkpoints.is_dir():
      saved = read_network(workdir, network)
      return FrozenTeacher(saved.encoder, saved.variables, view_px)
    recognised = recognise_encoder(resolved, network=network)
  except UserError as error:
    raise UserError(f'config.method.teacher.path: {error}') from error
  return FrozenTeacher(
    recognised.encoder, recognised.imported.variables, view_px
  )
