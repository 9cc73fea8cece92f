"""Writes the report of a run."""

from __future__ import annotations

import pathlib

from cmd_jax.errors import UserError
from cmd_jax.files import disk_errors
from cmd_jax.files.atomic import write_atomically
from cmd_jax.report import content, page
from cmd_jax.rundir.workdir import Workdir
from cmd_jax.training.experiment import Experiment


def write_report(
  experiment: Experiment,
  workdir: Workdir,
  path: pathlib.Path | None = None,
  *,
  max_images: int = 5000,
  newest: bool = False,
) -> pathlib.Path:
  """Writes one HTML page about a run's best checkpoint, or its newest.

  Args:
    experiment: the run's.
    workdir: of the run.
    path: of the file; None for report.html in the work directory.
    max_images: photographs at most; a sample where there are more.
    newest: whether it is the newest though the run has kept a better one.

  Returns:
    The path.

  Raises:
    UserError: no checkpoint, one that does not fit, or a file that cannot be
      written.
  """
  path = path or workdir.path / 'report.html'
  if max_images < 2:
    raise UserError(f'--report_images is {max_images}: give at least 2')
  # Told before minutes are spent.
  if path.is_dir() or not path.parent.is_dir():
    raise UserError(
      f'{path} cannot be written: give --output the name of a file in a folder '
      'that exists'
    )
  data = content.collect(
    experiment, workdir, max_images=max_images, newest=newest
  )
  try:
    html = page.render(data)
  except ValueError as error:
    raise UserError(
      f'{workdir.path} holds results that are not finite ({error}): '
      'cmd-jax evaluate scores the run anew'
    ) from error
  with disk_errors.writing(path):
    write_atomically(path, html)
  return path
