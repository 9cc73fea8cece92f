"""What is done in a work directory: trained, scored, its parts found."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from cmd_jax.convert import pretrained
from cmd_jax.devices import processes, stopping
from cmd_jax.errors import UserError
from cmd_jax.files import disk_errors
from cmd_jax.rundir.config_diff import PLACES
from cmd_jax.rundir.lock import Lock
from cmd_jax.rundir.saved_run import read_config
from cmd_jax.rundir.workdir import Workdir
from cmd_jax.training import experiment, loop, scoring
from cmd_jax.training.experiment import Experiment
from cmd_jax.training.part_rounds import discover_parts
from cmd_jax.training.same_images import check_same_images
from cmd_jax.training.timetable import parse_profile_steps
from cmd_jax.training.trackers import check_installed


class Run(NamedTuple):
  """A config made real in a work directory.

  Attributes:
    config: of the run.
    experiment: what it is made of.
    workdir: where it is written.
    lock: of the directory; not taken yet where there is no run.
  """

  config: ConfigDict
  experiment: Experiment
  workdir: Workdir
  lock: Lock

  def take(self) -> None:
    """Takes the lock: one process writes for all."""
    if processes.is_main_process():
      self.lock.take()

  def begin(self) -> None:
    """Takes the directory for a run that trains.

    Raises:
      UserError: the run that is there began elsewhere, or another uses it.
    """
    processes.broadcast_from_main(self._begin_first)

  def _begin_first(self) -> None:
    if self.workdir.has_checkpoint():
      # Before anything is written: a run that is refused is left as it is.
      scoring.check_same_start(self.experiment, self.workdir)
    self.take()
    self.workdir.open(self.config.to_dict())


def _check_apart(config: ConfigDict, workdir: Workdir) -> None:
  """Refuses the folder of photographs as work directory.

  Below it a work directory is known as such and never read as photographs.

  Raises:
    UserError: they are one folder.
  """
  path = config.to_dict().get('dataset', {}).get('path')
  if not path or workdir.is_remote:
    return
  if os.path.realpath(os.path.expanduser(path)) == os.path.realpath(
    workdir.path
  ):
    raise UserError(
      f'{workdir.path} is the folder of photographs, which the pictures of a '
      f'run must not mix with: choose another --workdir, such as '
      f'{workdir.path / "runs" / "1"}'
    )


def _lost_start(workdir: Workdir, config: ConfigDict) -> dict[str, Any] | None:
  """What a run started from if that is gone and a checkpoint has the rest."""
  path = config.init.path
  if not path or not workdir.has_checkpoint():
    return None
  try:
    if pretrained.resolve(path).exists():
      return None
  except UserError:
    # The package of published weights is gone.
    pass
  start = workdir.results().get('init_from')
  return start if start and start.get('path') else None


@contextlib.contextmanager
def opened(
  config: ConfigDict | None,
  workdir: str | os.PathLike[str],
  *,
  reads_only: bool = False,
) -> Iterator[Run]:
  """Builds the experiment of a config in a work directory.

  Args:
    config: of the run; None reads the one that the directory has.
    workdir: the directory, which need not exist yet.
    reads_only: whether others may write there meanwhile.

  Raises:
    UserError: anything in the config that cannot be, or a directory of another
      run or in use.
  """
  workdir = Workdir(os.fspath(workdir))
  if config is not None:
    _check_apart(config, workdir)
  with (
    Lock(workdir.path) as lock,
    stopping.giving_back(lock.release),
  ):
    is_given = config is not None
    config = config if is_given else read_config(workdir)
    differing = workdir.check(config.to_dict())
    if workdir.config_file.exists() and not reads_only:
      # Where there is a run, the second of two need not wait for its data.
      if processes.is_main_process():
        lock.take()
    # Each host may keep the images elsewhere; that they are the same ones is
    # looked at later.
    fields = {k: v for k, v in config.to_dict().items() if k != 'dataset'}
    processes.assert_same_on_all('the flags', repr(fields))
    try:
      built = experiment.build(
        config,
        route_before=processes.broadcast_from_main(
          lambda: workdir.results().get('route')
        ),
        lost_start=processes.broadcast_from_main(
          lambda: _lost_start(workdir, config)
        ),
      )
    except AttributeError as error:
      if is_given:
        raise
      raise UserError(
        f'{workdir.config_file} lacks a field ({error}): the run is of another '
        'version of this program; use that version'
      ) from error
    if any(x.field in PLACES for x in differing):
      processes.broadcast_from_main(
        lambda: check_same_images(built.data, workdir, differing)
      )
    yield Run(config, built, workdir, lock)


def check_logging(config: ConfigDict) -> None:
  """Refuses a config that asks for logs which cannot be, before any data.

  Raises:
    UserError: an unknown tracker, one that is not installed, or no steps.
  """
  log = config.get('log', {})
  check_installed(log.get('trackers', ''))
  parse_profile_steps(log.get('profile_steps', ''))


def train_in(run: Run) -> dict[str, Any]:
  """Trains an opened run to its end, or on from where it stopped.

  Returns:
    What results.json holds.

  Raises:
    UserError: something that the user can mend.
    loop.Interrupted: SIGINT or SIGTERM came; the state is saved.
  """
  run.begin()
  with disk_errors.explaining(run.workdir.path):
    return loop.train(run.experiment, run.workdir)


def train(
  config: ConfigDict, workdir: str | os.PathLike[str]
) -> dict[str, Any]:
  """Trains an encoder, or goes on where the run in the directory stopped.

  The same as `cmd-jax train`, from Python: `cmd_jax.train`.

  Args:
    config: e.g. of `cmd_jax.config.builtin.folder()`.
    workdir: directory of the run: checkpoints, metrics, results.

  Returns:
    What results.json holds: scores before and after, images per second.

  Raises:
    UserError: anything in the config or the data that the user can mend.
    loop.Interrupted: SIGINT or SIGTERM came; the state is saved.
  """
  check_logging(config)
  with opened(config, workdir) as run:
    return train_in(run)


def evaluate(
  config: ConfigDict | None,
  workdir: str | os.PathLike[str],
  *,
  newest: bool = False,
) -> dict[str, Any]:
  """Scores a checkpoint of a run, or the weights of its config.

  Args:
    config: of the run; None reads the one that the directory has.
    workdir: directory of the run.
    newest: whether it is the newest though the run has kept a better one.

  Returns:
    What results.json holds.

  Raises:
    UserError: there is nothing to score, or no images to score it on.
  """
  with opened(config, workdir) as run:
    if run.experiment.imported:
      # Weights of others are scored without training.
      run.take()
      run.workdir.open(run.config.to_dict())
    return scoring.evaluate_run(run.experiment, run.workdir, newest=newest)


def discover(
  config: ConfigDict | None, workdir: str | os.PathLike[str]
) -> pathlib.Path:
  """Finds the parts of a run's images with its newest encoder.

  Args:
    config: of the run; None reads the one that the directory has.
    workdir: directory of the run.

  Returns:
    The folder of the part masks.

  Raises:
    UserError: the method has no parts, or they cannot be found.
  """
  with opened(config, workdir) as run:
    run.begin()
    return discover_parts(run.experiment, run.workdir)
