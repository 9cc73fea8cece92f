"""Scores a network's frozen features and prints what training gained."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

import jax
import numpy as np

from cmd_jax import evaluators
from cmd_jax.data.canvas import Canvases
from cmd_jax.data.source import UNLABELLED
from cmd_jax.errors import UserError
from cmd_jax.evaluators import Features
from cmd_jax.evaluators.part_segmentation import (
  PROTOCOL,
  PartMaps,
  extract_maps,
)
from cmd_jax.experiment import Experiment
from cmd_jax.models.feature_maps import feature_map
from cmd_jax.pictures import save_neighbours
from cmd_jax.train_state import TrainState
from cmd_jax.workdir import Workdir

# Rows of the picture of neighbours.
_NUM_QUERIES = 10


class Encoded(NamedTuple):
  """The frozen features of a network on both splits.

  Attributes:
    pretrain: of the images trained on.
    test: of the test images; None if there are none.
    part_maps: feature maps and part masks of both; None if they are not asked
      for.
  """

  pretrain: Features
  test: Features | None
  part_maps: tuple[PartMaps, PartMaps] | None = None


def network_variables(experiment: Experiment, state: TrainState):
  """Parameters and batch statistics of the network that is scored."""
  network = experiment.evaluation.network
  params = state.teacher_params if network == 'teacher' else state.params
  return params, state.method_state.get(f'{network}_stats', {})


def encode(experiment: Experiment, state: TrainState) -> Encoded:
  """Computes the features of all images."""
  variables = network_variables(experiment, state)
  evaluation = experiment.evaluation

  @jax.jit
  def embed(variables, images, sizes):
    view = evaluation.view(images, sizes)
    return experiment.method.embed(*variables, view)

  def features(canvases: Canvases | None) -> Features | None:
    if canvases is None:
      return None
    vectors = evaluators.extract_features(
      lambda images, sizes: embed(variables, images, sizes),
      canvases.images,
      canvases.sizes,
      batch_size=evaluation.batch_size,
    )
    return Features(
      vectors, canvases.labels, canvases.class_names, canvases.file_names
    )

  return Encoded(
    features(experiment.pretrain),
    features(experiment.test),
    _encode_parts(experiment, variables),
  )


def _encode_parts(
  experiment: Experiment, variables: tuple
) -> tuple[PartMaps, PartMaps] | None:
  """The feature maps in which parts are segmented, of both splits."""
  segmentation = experiment.evaluation.segmentation
  if segmentation is None:
    return None
  encoder_variables = experiment.method.encoder_variables(*variables)

  @jax.jit
  def encode(variables, images, sizes):
    view = segmentation.view(images, sizes)
    return feature_map(experiment.encoder, variables, view)

  def maps(canvases: Canvases) -> PartMaps:
    return PartMaps(
      extract_maps(
        lambda images, sizes: encode(encoder_variables, images, sizes),
        canvases.images,
        canvases.sizes,
      ),
      canvases.part_ids,
    )

  return maps(experiment.pretrain), maps(experiment.test)


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


def score(experiment: Experiment, encoded: Encoded) -> dict[str, float]:
  """Scores frozen features under the configured protocols.

  Returns:
    {'<protocol>/<metric>': value in [0, 1]}; empty for unlabelled data.
  """
  if why_not_scored(experiment):
    return {}
  evaluation = experiment.evaluation
  protocols = [name for name in evaluation.protocols if name != PROTOCOL]
  scores = evaluators.evaluate(protocols, encoded.pretrain, encoded.test)
  if evaluation.segmentation is not None:
    values = evaluation.segmentation.evaluate(*encoded.part_maps)
    scores |= {f'{PROTOCOL}/{name}': value for name, value in values.items()}
  return scores


def draw_neighbours(
  experiment: Experiment,
  state: TrainState,
  encoded: Encoded,
  path: pathlib.Path,
) -> None:
  """Draws a few test images, where the network looks, and their neighbours.

  Without test images, a few of the training images query the others.
  """
  canvases = experiment.test or experiment.pretrain
  features = encoded.test or encoded.pretrain
  order = np.random.default_rng(0).permutation(len(canvases.images))
  chosen = np.sort(order[:_NUM_QUERIES])
  gallery = np.arange(len(experiment.pretrain.images))
  if experiment.test is None:
    gallery = np.setdiff1d(gallery, chosen)
  if not len(gallery):
    return

  @jax.jit
  def attend(variables, images, sizes):
    view = experiment.evaluation.view(images, sizes)
    return experiment.method.attend(*variables, view)

  save_neighbours(
    path,
    queries=canvases.images[chosen],
    query_features=features.take(chosen),
    gallery=experiment.pretrain.images[gallery],
    gallery_features=encoded.pretrain.take(gallery),
    attention=np.asarray(
      attend(
        network_variables(experiment, state),
        canvases.images[chosen],
        canvases.sizes[chosen],
      )
    ),
  )


def results_table(init: dict[str, float], final: dict[str, float]) -> str:
  """A table of metrics in per cent: initial, trained, gain in points."""
  width = max([len(name) for name in final] + [len('protocol/metric')])
  lines = [f'{"protocol/metric":<{width}}    initial  trained    gain']
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


def restore(experiment: Experiment, workdir: Workdir) -> TrainState:
  """The newest checkpoint of a run.

  Raises:
    UserError: there is none, or it does not fit.
  """
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
  return state


def evaluate_run(experiment: Experiment, workdir: Workdir) -> dict:
  """Scores the initial encoder and the newest checkpoint of a run.

  Returns:
    The entries of results.json, which it updates.

  Raises:
    UserError: no checkpoint, or data without labels.
  """
  reason = why_not_scored(experiment)
  if reason:
    raise UserError(f'{reason}; add class folders or a labels.csv')
  state = restore(experiment, workdir)
  return workdir.update_results(
    init=score(experiment, encode(experiment, experiment.init_state())),
    final=score(experiment, encode(experiment, state)),
    steps=int(state.step),
    protocols=list(experiment.evaluation.protocols),
    eval=experiment.evaluation.settings,
  )
