"""Scores a network's frozen features and prints what training gained."""

from __future__ import annotations

import jax
import numpy as np

from cmd_jax import evaluators
from cmd_jax.data.canvas import Canvases
from cmd_jax.data.source import UNLABELLED
from cmd_jax.errors import UserError
from cmd_jax.evaluators import Features
from cmd_jax.experiment import Experiment
from cmd_jax.train_state import TrainState
from cmd_jax.workdir import Workdir


def _features(experiment: Experiment, params, canvases: Canvases) -> Features:
  evaluation = experiment.evaluation

  @jax.jit
  def embed(params, images, sizes):
    return experiment.method.embed(params, evaluation.view(images, sizes))

  vectors = evaluators.extract_features(
    lambda images, sizes: embed(params, images, sizes),
    canvases.images,
    canvases.sizes,
    batch_size=evaluation.batch_size,
  )
  return Features(
    vectors, canvases.labels, canvases.class_names, canvases.file_names
  )


def why_not_scored(experiment: Experiment) -> str | None:
  """Why the data can't be scored, None if they can."""
  for what, canvases in (
    ('training', experiment.pretrain),
    ('test', experiment.test),
  ):
    if canvases is None or np.all(canvases.labels == UNLABELLED):
      return (
        f'no labelled {what} images in {experiment.name}: the encoder is '
        'trained, not scored'
      )
  return None


def score(experiment: Experiment, state: TrainState) -> dict[str, float]:
  """Scores the encoder of a state under the configured protocols.

  Returns:
    {'<protocol>/<metric>': value in [0, 1]}; empty for unlabelled data.
  """
  if why_not_scored(experiment):
    return {}
  network = experiment.evaluation.network
  params = state.teacher_params if network == 'teacher' else state.params
  train = _features(experiment, params, experiment.pretrain)
  test = _features(experiment, params, experiment.test)
  return evaluators.evaluate(experiment.evaluation.protocols, train, test)


def results_table(init: dict[str, float], final: dict[str, float]) -> str:
  """A table of metrics in per cent: untrained, trained, gain in points."""
  width = max([len(name) for name in final] + [len('protocol/metric')])
  lines = [f'{"protocol/metric":<{width}}  untrained  trained    gain']
  for name, value in final.items():
    before = init.get(name)
    if before is None:
      lines.append(f'{name:<{width}}          -  {100 * value:7.1f}       -')
    else:
      lines.append(
        f'{name:<{width}}  {100 * before:9.1f}  {100 * value:7.1f}  '
        f'{100 * (value - before):+6.1f}'
      )
  return '\n'.join(lines)


def evaluate_run(experiment: Experiment, workdir: Workdir) -> dict:
  """Scores the untrained encoder and the newest checkpoint of a run.

  Returns:
    The entries of results.json, which it updates.

  Raises:
    UserError: no checkpoint, or data without labels.
  """
  reason = why_not_scored(experiment)
  if reason:
    raise UserError(f'{reason}; add class folders or a labels.csv')
  if not workdir.checkpoints.is_dir():
    raise UserError(
      f'no checkpoint in {workdir.checkpoints}: train first, or give the work '
      'directory of a run that has one'
    )
  checkpoints = experiment.open_checkpoints(workdir)
  try:
    state, _ = checkpoints.restore(experiment.state_like)
  finally:
    checkpoints.close()
  return workdir.update_results(
    init=score(experiment, experiment.init_state()),
    final=score(experiment, state),
    steps=int(state.step),
    protocols=list(experiment.evaluation.protocols),
  )
