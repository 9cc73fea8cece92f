"""Scores a network's frozen features and prints what training gained."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from cmd_jax import evaluators
from cmd_jax.data.canvas import Canvases
from cmd_jax.data.sources.base import UNLABELLED
from cmd_jax.errors import UserError
from cmd_jax.evaluators import Features, attention_hit, parts_hit
from cmd_jax.evaluators.part_segmentation import PartMaps, extract_maps
from cmd_jax.evaluators.pictures import save_neighbours
from cmd_jax.models.feature_maps import feature_map
from cmd_jax.rundir.checkpoint import restore_newest
from cmd_jax.rundir.workdir import Workdir
from cmd_jax.training.experiment import Experiment
from cmd_jax.training.frozen_network import FrozenNetwork, network_variables
from cmd_jax.training.state import TrainState

# Protocols that look at no label.
LABEL_FREE = (attention_hit.PROTOCOL,)

# Rows of the picture of neighbours.
_NUM_QUERIES = 10


class Encoded(NamedTuple):
  """The frozen features of a network on both splits.

  Attributes:
    pretrain: of the images trained on.
    test: of the test images; None if there are none.
    part_maps: feature maps and part masks of both; None if they are not asked
      for.
    last_blocks: features of the last blocks of both; likewise.
    attention: [N, h * w] by what attends, see `FrozenNetwork.attention`, of the
      test images, or of the others where there are none; likewise.
  """

  pretrain: Features
  test: Features | None
  part_maps: tuple[PartMaps, PartMaps] | None = None
  last_blocks: tuple[Features, Features | None] | None = None
  attention: dict[str, np.ndarray] | None = None


def encode(
  experiment: Experiment,
  state: TrainState,
  cache_folder: pathlib.Path | None = None,
) -> Encoded:
  """Computes what the configured protocols need of all images.

  Args:
    experiment: the run's.
    state: whose network.
    cache_folder: where features are kept and found again; None keeps none.
  """
  network = FrozenNetwork(experiment, state, cache_folder)
  protocols = experiment.evaluation.protocols
  splits = (experiment.pretrain, 'pretrain'), (experiment.test, 'test')
  last_blocks = attention = None
  if set(protocols) & set(evaluators.OF_LAST_BLOCKS):
    last_blocks = tuple(network.last_blocks(*split) for split in splits)
  if attention_hit.PROTOCOL in protocols:
    attention = network.attention(experiment.test or experiment.pretrain)
  return Encoded(
    *(network.embed(*split) for split in splits),
    _encode_parts(experiment, network_variables(experiment, state)),
    last_blocks,
    attention,
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
    return feature_map(experiment.encoder, variables, view, segmentation.facet)

  def maps(canvases: Canvases) -> PartMaps:
    return PartMaps(
      extract_maps(
        lambda images, sizes: encode(encoder_variables, images, sizes),
        canvases.images,
        canvases.sizes,
      ),
      np.asarray(canvases.part_ids),
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


def _score_attention(
  experiment: Experiment, encoded: Encoded
) -> dict[str, float]:
  """parts/hit of the test images, or of the others where there are none."""
  canvases = experiment.test or experiment.pretrain
  fields = experiment.evaluation.settings['parts_hit']
  keypoints = None
  if fields['keypoints']:
    keypoints = parts_hit.read_keypoints(
      fields['keypoints'], canvases.file_names, np.asarray(canvases.sizes)
    )
  if not encoded.attention:
    raise UserError(
      f'{attention_hit.PROTOCOL}: neither the method nor the encoder has '
      'attention: leave the protocol out'
    )
  side = round(next(iter(encoded.attention.values())).shape[1] ** 0.5)
  annotated = attention_hit.annotated_shares(
    canvases,
    (side, side),
    part_ids=fields['part_ids'],
    keypoints=keypoints,
  )
  return attention_hit.attention_hit(encoded.attention, annotated)


def _score_one(
  experiment: Experiment, encoded: Encoded, protocol: str
) -> dict[str, float]:
  if protocol not in evaluators.OF_MAPS:
    of_blocks = protocol in evaluators.OF_LAST_BLOCKS
    train, test = encoded.last_blocks if of_blocks else encoded[:2]
    return evaluators.evaluate([protocol], train, test)
  if protocol == attention_hit.PROTOCOL:
    scores = _score_attention(experiment, encoded)
  else:
    scores = experiment.evaluation.segmentation.evaluate(*encoded.part_maps)
  return {f'{protocol}/{name}': value for name, value in scores.items()}


def score(experiment: Experiment, encoded: Encoded) -> dict[str, float]:
  """Scores frozen features under the configured protocols.

  Returns:
    {'<protocol>/<metric>': value in [0, 1]}; of unlabelled data, what needs no
    labels.
  """
  scores, unlabelled = {}, why_not_scored(experiment)
  for protocol in experiment.evaluation.protocols:
    if not unlabelled or protocol in LABEL_FREE:
      scores |= _score_one(experiment, encoded, protocol)
  return scores


def make_attend(experiment: Experiment, variables: tuple) -> Callable:
  """(canvases, sizes) -> what each patch counts, [B, N], to a network.

  Args:
    experiment: the run's.
    variables: from `network_variables`.
  """

  @jax.jit
  def attend(variables, images, sizes):
    view = experiment.evaluation.view(images, sizes)
    return experiment.method.encode(*variables, view).attention

  return lambda images, sizes: attend(variables, images, sizes)


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

  attend = make_attend(experiment, network_variables(experiment, state))
  save_neighbours(
    path,
    queries=canvases.images[chosen],
    query_features=features.take(chosen),
    gallery=experiment.pretrain.images[gallery],
    gallery_features=encoded.pretrain.take(gallery),
    attention=np.asarray(
      attend(canvases.images[chosen], canvases.sizes[chosen])
    ),
  )


def results_table(init: dict[str, float], final: dict[str, float]) -> str:
  """A table of metrics in per cent: initial, trained, gain in points.

  Without `final`, of what was not trained, the initial ones alone.
  """
  names = final or init
  width = max([len(name) for name in names] + [len('protocol/metric')])
  lines = [f'{"protocol/metric":<{width}}    initial']
  lines[0] += '  trained    gain' if final else ''
  for name in names:
    before, after = init.get(name), final.get(name)
    line = f'{name:<{width}}  '
    line += f'{"-":>9}' if before is None else f'{100 * before:9.1f}'
    if after is not None:
      line += f'  {100 * after:7.1f}'
      line += (
        f'{"-":>8}' if before is None else f'  {100 * (after - before):+6.1f}'
      )
    lines.append(line)
  return '\n'.join(lines)


def describe_start(experiment: Experiment) -> dict | None:
  """Where the weights come from, for results.json."""
  report = experiment.imported
  if report is None:
    return None
  return {
    'path': report.path,
    'sha256': report.sha256,
    'family': report.family,
    'resized': list(report.resized),
  }


def check_same_start(experiment: Experiment, workdir: Workdir) -> None:
  """Refuses a run of other images or of other initial weights.

  Args:
    experiment: built now.
    workdir: of a run that has a checkpoint.

  Raises:
    UserError: what differs.
  """
  before = workdir.results()
  if not before:
    return
  if before.get('data_sha256') != experiment.data_sha256:
    raise UserError(
      f'{workdir.path} was trained on other images than {experiment.name} has '
      'now (files or labels were added, removed or changed, or some cannot be '
      'read and config.placement was another): restore them or choose another '
      '--workdir'
    )
  weights = (before.get('init_from') or {}).get('sha256')
  if experiment.imported and weights != experiment.imported.sha256:
    raise UserError(
      f'{workdir.path} started from other weights than '
      f'{experiment.imported.path} holds now: restore that file or choose '
      'another --workdir'
    )


def restore(experiment: Experiment, workdir: Workdir) -> TrainState:
  """The newest checkpoint of a run.

  Raises:
    UserError: there is none, or it does not fit.
  """
  return restore_newest(workdir.checkpoints, experiment.state_like)[0]


def evaluate_run(experiment: Experiment, workdir: Workdir) -> dict:
  """Scores the initial encoder and the newest checkpoint of a run.

  Where the initial encoder comes from a file and nothing was trained, it is
  scored alone. Features are kept in the run's folder `features`.

  Returns:
    The entries of results.json, which it updates.

  Raises:
    UserError: neither checkpoint nor weights, a run of other images or other
      initial weights, or nothing that can be scored.
  """
  reason = why_not_scored(experiment)
  protocols = experiment.evaluation.protocols
  if reason and not set(protocols) & set(LABEL_FREE):
    raise UserError(f'{reason}; add class folders or a labels.csv')
  if reason:
    print(f'{reason}, but for {", ".join(LABEL_FREE)}', file=sys.stderr)
  state = None
  if workdir.has_checkpoint() or not experiment.imported:
    state = restore(experiment, workdir)
    check_same_start(experiment, workdir)

  def scores(state: TrainState) -> dict[str, float]:
    folder = workdir.features
    return score(experiment, encode(experiment, state, folder))

  entries = dict(
    init=scores(experiment.init_state()),
    protocols=list(protocols),
    eval=experiment.evaluation.settings,
  )
  if state is None:
    return workdir.update_results(
      **entries,
      dataset=experiment.name,
      init_from=describe_start(experiment),
    )
  return workdir.update_results(
    **entries, final=scores(state), steps=int(state.step)
  )
