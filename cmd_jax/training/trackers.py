"""Experiment trackers: Weights & Biases, MLflow and Trackio.

Each is served by a thread of its own: a server that cannot be reached costs a
line on the terminal, never a step. metrics.jsonl has all that they are given.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import queue
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from tqdm import tqdm

from cmd_jax.errors import UserError, missing_extra
from cmd_jax.files.safe_read import one_line
from cmd_jax.rundir.config_diff import flatten
from cmd_jax.rundir.workdir import Workdir, read_json, write_json

# Seconds that the end of a run waits for what is still under way.
_CLOSE_S = 30
# Lines of metrics that wait for a server; the oldest are kept.
_MOST_WAITING = 100_000
# The longest value that MLflow takes for a parameter.
_MLFLOW_TEXT = 500


class Run(NamedTuple):
  """What a tracker is told of a run.

  Attributes:
    project: its project there, or experiment.
    name: of the run, for people.
    folder: the work directory as text.
    config: fields by dotted name.
    id_before: what `Tracker.id` was before the run was resumed; '' for none.
  """

  project: str
  name: str
  folder: str
  config: Mapping[str, Any]
  id_before: str


class Tracker(Protocol):
  """What receives the metrics of a run; it may raise anything at any time.

  Attributes:
    id: by which a resumed run finds itself there.
  """

  id: str

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes the scalars of a step."""

  def close(self) -> None:
    """Ends the run there."""


class _Wandb:
  """Weights & Biases; `WANDB_MODE=offline` keeps it in the work directory."""

  def __init__(self, run: Run):
    import wandb

    is_online = os.environ.get('WANDB_MODE', 'online') in ('online', 'shared')
    # Else it would ask for one at the terminal, where the run shows its own.
    if is_online and not wandb.api.api_key:
      raise RuntimeError(
        'no API key: run `wandb login`, or set WANDB_MODE=offline'
      )
    self.id = run.id_before or uuid.uuid4().hex[:12]
    self._run = wandb.init(
      project=run.project,
      name=run.name,
      id=self.id,
      resume='allow',
      config=dict(run.config),
      dir=run.folder,
      settings=wandb.Settings(
        console='off',
        silent=True,
        disable_git=True,
        init_timeout=_CLOSE_S,
        finish_timeout=_CLOSE_S,
      ),
    )
    # Its own counter refuses the steps that a resumed run takes again.
    self._run.define_metric('step')
    self._run.define_metric('*', step_metric='step')

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    self._run.log({**scalars, 'step': step})

  def close(self) -> None:
    self._run.finish()


class _MLflow:
  """MLflow, at `MLFLOW_TRACKING_URI` or in a file of the work directory."""

  def __init__(self, run: Run):
    from mlflow import entities
    from mlflow.tracking import MlflowClient

    # It says every attempt to reach a server, for minutes.
    logging.getLogger('urllib3.connectionpool').setLevel(logging.ERROR)
    self._metric = entities.Metric
    uri = os.environ.get('MLFLOW_TRACKING_URI')
    self._client = MlflowClient(uri or f'sqlite:///{run.folder}/mlflow.db')
    self.id = run.id_before
    if self.id:
      self._client.set_terminated(self.id, 'RUNNING')
      return
    found = self._client.get_experiment_by_name(run.project)
    experiment = (
      found.experiment_id
      if found
      else self._client.create_experiment(run.project)
    )
    created = self._client.create_run(experiment, run_name=run.name)
    self.id = created.info.run_id
    params = [
      entities.Param(key, str(value)[:_MLFLOW_TEXT])
      for key, value in run.config.items()
    ]
    for start in range(0, len(params), 100):
      self._client.log_batch(self.id, params=params[start : start + 100])

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    now = int(time.time() * 1000)
    metrics = [self._metric(k, v, now, step) for k, v in scalars.items()]
    self._client.log_batch(self.id, metrics=metrics)

  def close(self) -> None:
    self._client.set_terminated(self.id)


class _Trackio:
  """Trackio, in its own folder (`TRACKIO_DIR`)."""

  def __init__(self, run: Run):
    import trackio

    self.id = run.id_before or f'{run.name}-{uuid.uuid4().hex[:6]}'
    self._run = trackio.init(
      project=run.project,
      name=self.id,
      config=dict(run.config),
      resume='allow',
      embed=False,
      auto_log_gpu=False,
      auto_log_cpu=False,
    )

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    self._run.log(dict(scalars), step=step)

  def close(self) -> None:
    self._run.finish()


# The extra and the package have the tracker's name.
TRACKERS: dict[str, Callable[[Run], Tracker]] = {
  'wandb': _Wandb,
  'mlflow': _MLflow,
  'trackio': _Trackio,
}


def names_in(text: str) -> tuple[str, ...]:
  """The trackers that `config.log.trackers` names, each once.

  Raises:
    UserError: one that is not known.
  """
  names = tuple(dict.fromkeys(filter(None, text.replace(' ', '').split(','))))
  for name in names:
    if name not in TRACKERS:
      raise UserError(
        f'config.log.trackers names {name!r}: choose from '
        f'{", ".join(TRACKERS)}, several separated by commas'
      )
  return names


def check_installed(text: str) -> None:
  """Refuses trackers whose package is not installed.

  Args:
    text: `config.log.trackers`.

  Raises:
    UserError: the first one, with the extra that brings it.
  """
  for name in names_in(text):
    try:
      found = importlib.util.find_spec(name)
    except ValueError:
      found = None
    if found is None:
      raise missing_extra(f'config.log.trackers={name} needs {name}', name)


class _Served:
  """A tracker in its thread."""

  def __init__(self, name: str, run: Run, remember: Callable[[str, str], None]):
    self.name, self.failure = name, ''
    self._run, self._remember = run, remember
    self._lines: queue.Queue = queue.Queue(_MOST_WAITING)
    self._thread = threading.Thread(target=self._serve, daemon=True)
    self._thread.start()

  def _serve(self) -> None:
    try:
      tracker = TRACKERS[self.name](self._run)
      self._remember(self.name, tracker.id)
      while (line := self._lines.get()) is not None:
        tracker.write(*line)
      tracker.close()
    # SystemExit too: nothing that a tracker does may end the run.
    except BaseException as error:
      self.failure = one_line(str(error), 200) or type(error).__name__

  def put(self, step: int, scalars: Mapping[str, float]) -> None:
    """Hands a line on; it is lost if too many wait."""
    if not self.failure:
      try:
        self._lines.put_nowait((step, scalars))
      except queue.Full:
        self.failure = 'it takes nothing any more'

  def end(self) -> None:
    """Tells the thread that there are no more lines."""
    if not self.failure:
      # A full queue is one of a server that is gone.
      try:
        self._lines.put_nowait(None)
      except queue.Full:
        pass

  def wait(self, seconds: float) -> None:
    """Waits for the thread, at most so long."""
    self._thread.join(max(seconds, 0.0))
    if self._thread.is_alive() and not self.failure:
      # The last one says that there are no more.
      waiting = max(self._lines.qsize() - 1, 0)
      self.failure = f'it did not end within {_CLOSE_S} s, {waiting} lines wait'


class Trackers:
  """The trackers of a run."""

  def __init__(self, workdir: Workdir):
    """Opens those of the run's config, without waiting for them.

    Args:
      workdir: opened; its trackers.json keeps by what a resumed run finds
        itself.
    """
    config = workdir.read_config()
    log = config.get('log', {})
    self._told = set()
    self._file = workdir.path / 'trackers.json'
    self._lock = threading.Lock()
    names = names_in(log.get('trackers', ''))
    self._ids = read_json(self._file) if self._file.exists() else {}
    self._served = [
      _Served(
        name,
        Run(
          project=log['project'],
          name=workdir.path.resolve().name or 'run',
          folder=str(workdir.path.resolve()),
          config=flatten(config),
          id_before=str(self._ids.get(name, '')),
        ),
        self._remember,
      )
      for name in names
    ]

  def _remember(self, name: str, run_id: str) -> None:
    with self._lock:
      if self._ids.get(name) != run_id:
        self._ids[name] = run_id
        write_json(self._file, self._ids)

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Hands the finite scalars of a step to all of them."""
    finite = {name: float(x) for name, x in scalars.items() if math.isfinite(x)}
    for served in self._served:
      served.put(step, finite)
    self._tell()

  def close(self) -> None:
    """Ends them, waiting for half a minute together at most."""
    for served in self._served:
      served.end()
    end = time.monotonic() + _CLOSE_S
    for served in self._served:
      served.wait(end - time.monotonic())
    self._tell()

  def _tell(self) -> None:
    """A line for each that failed, once."""
    for served in self._served:
      if served.failure and served.name not in self._told:
        self._told.add(served.name)
        # Above the bar while there is one.
        tqdm.write(
          f'warning: {served.name} fails and is left out, the run goes on '
          f'({served.failure}); metrics.jsonl has everything',
          file=sys.stderr,
        )
