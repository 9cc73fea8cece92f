"""Scores the network of a run and prints what training gained."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from cmd_jax.devices import sharding, stopping
from cmd_jax.errors import UserError
from cmd_jax.evaluators import (
  FrozenNetwork,
  evaluate,
  explain_protocols,
  remark_on_labels,
  why_not_scored,
)
from cmd_jax.parts.store import hash_variables
from cmd_jax.rundir.saved_run import SavedNetwork, read_network
from cmd_jax.rundir.workdir import Workdir
from cmd_jax.training.classification import classifier_of, score_classifier
from cmd_jax.training.experiment import Experiment
from cmd_jax.training.same_images import hash_of_sample
from cmd_jax.training.state import TrainState


def _freeze(
  experiment: Experiment,
  workdir: Workdir,
  variables: Mapping[str, Any],
  mil_params: Mapping[str, Any],
) -> FrozenNetwork:
  """A network that sees what config.eval says, its features kept by the run."""
  evaluation = experiment.evaluation
  settings = evaluation.settings
  network = FrozenNetwork(
    experiment.encoder,
    variables,
    view_px=settings['view_px'],
    crop_fraction=settings['crop_fraction'] or None,
    batch_size=settings['batch_size'],
    mil=evaluation.mil,
    mil_params=mil_params,
    mesh=experiment.mesh,
    statistics=experiment.data.statistics,
  )
  network.keep_features(workdir.features, experiment.data.sha256)
  return network


def variables_of(
  experiment: Experiment, state: TrainState
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
  """What the scored network of a state is applied to, whole on the devices.

  Args:
    experiment: the run's.
    state: whose teacher or student, as config.eval.network says.

  Returns:
    The variables of the encoder, and the parameters of the multi-instance
    attention, if it has any.
  """
  network = experiment.evaluation.network
  params = state.teacher_params if network == 'teacher' else state.params
  stats = state.method_state.get(f'{network}_stats', {})
  params, stats = sharding.gather((params, stats), experiment.mesh)
  variables = experiment.method.encoder_variables(params, stats)
  return variables, params.get('mil', {})


def network_of(
  experiment: Experiment, state: TrainState, workdir: Workdir
) -> FrozenNetwork:
  """The network of a state that is scored, see `variables_of`.

  Args:
    experiment: the run's.
    state: whose network.
    workdir: where its features are kept.
  """
  return _freeze(experiment, workdir, *variables_of(experiment, state))


def read_trained(
  experiment: Experiment, workdir: Workdir, *, newest: bool = False
) -> tuple[FrozenNetwork, SavedNetwork]:
  """The network of the checkpoint that is scored, and what was read of it.

  Args:
    experiment: the run's.
    workdir: of the run.
    newest: whether it is the newest though the run has kept a better one.

  Raises:
    UserError: no checkpoint, or one that does not fit.
  """
  saved = read_network(workdir, experiment.evaluation.network, newest=newest)
  if saved.choice.best is not None:
    print(describe_choice(saved.choice.best), file=sys.stderr)
  network = _freeze(experiment, workdir, saved.variables, saved.mil_params)
  return network, saved


def describe_choice(best: Mapping[str, Any]) -> str:
  """One line: why a checkpoint is used that need not be the newest."""
  start = '' if best['step'] else ', the start itself'
  return (
    f'step {best["step"]} is used{start}, the best by {best["score"]} '
    f'({best["value"]:.4g}); cmd-jax evaluate --newest scores the newest'
  )


def score(experiment: Experiment, network: FrozenNetwork) -> dict[str, float]:
  """Scores a network under the configured protocols.

  Returns:
    {'<protocol>/<metric>': value in [0, 1]}; of unlabelled data, what needs no
    labels.
  """
  return evaluate(experiment.evaluation.evaluators, network, experiment.splits)


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


def explained_table(init: dict[str, float], final: dict[str, float]) -> str:
  """`results_table`, and below it a line on what each protocol scores."""
  words = explain_protocols(final or init)
  lines = [f'{name}: {text}' for name, text in words.items()]
  return '\n'.join(
    [results_table(init, final), *([''] if lines else []), *lines]
  )


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


def note_start(experiment: Experiment, workdir: Workdir) -> None:
  """Records what is trained, and drops a start that was scored otherwise."""
  start = {
    'data_sha256': experiment.data.sha256,
    'eval': experiment.evaluation.settings,
    'init_from': describe_start(experiment),
  }
  if experiment.method.constants:
    start['distilled_sha256'] = hash_variables(experiment.method.constants)
  if experiment.data.pretrain.images.shape[-1] != 3:
    # Without the images nothing else would tell.
    statistics = experiment.data.statistics._asdict()
    start['image_statistics'] = {k: list(v) for k, v in statistics.items()}
  before = workdir.results()
  if any(before.get(key) != value for key, value in start.items()):
    workdir.update_results(
      dataset=experiment.data.name,
      method=experiment.method_name,
      protocols=list(experiment.evaluation.protocols),
      route=experiment.data.route,
      sample_sha256=hash_of_sample(experiment.data),
      **start,
      # A gain needs one protocol.
      init={},
    )


def check_same_start(experiment: Experiment, workdir: Workdir) -> None:
  """Refuses a run of other images, initial weights or frozen teacher.

  Args:
    experiment: built now.
    workdir: of a run that has a checkpoint.

  Raises:
    UserError: what differs.
  """
  before = workdir.results()
  if not before:
    return
  if before.get('data_sha256') != experiment.data.sha256:
    raise UserError(
      f'{workdir.path} was trained on other images than '
      f'{experiment.data.name} has now (files or labels were added, removed '
      'or changed, or some cannot be read and config.placement was another): '
      'restore them or choose another --workdir'
    )
  weights = (before.get('init_from') or {}).get('sha256')
  if experiment.imported and weights != experiment.imported.sha256:
    raise UserError(
      f'{workdir.path} started from other weights than '
      f'{experiment.imported.path} holds now: restore that file or choose '
      'another --workdir'
    )
  distilled = before.get('distilled_sha256')
  if distilled and distilled != hash_variables(experiment.method.constants):
    raise UserError(
      f'{workdir.path} was distilled from another teacher than '
      'config.method.teacher.path holds now: restore that or choose another '
      '--workdir'
    )


def explain_lost_start(experiment: Experiment) -> None:
  """Says on stderr why the initial encoder is not scored."""
  print(
    f'{experiment.imported.path} is not there any more, so that the initial '
    'encoder is not scored: restore the file and run cmd-jax evaluate to see '
    'the gain',
    file=sys.stderr,
  )


def _score_init(experiment: Experiment, workdir: Workdir) -> dict[str, float]:
  """Scores the initial encoder; where it is lost, what was scored before."""
  if not experiment.start_is_lost:
    # Not named: what it remembers of the images is let go.
    return score(
      experiment, network_of(experiment, experiment.init_state(), workdir)
    )
  before = workdir.results()
  init = before.get('init') or {}
  if init and before.get('eval') == experiment.evaluation.settings:
    return init
  explain_lost_start(experiment)
  return {}


def evaluate_run(
  experiment: Experiment, workdir: Workdir, *, newest: bool = False
) -> dict:
  """Scores the initial encoder and the checkpoint of a run that is used.

  That is the best one where config.checkpoint.keep_best has kept it, and else,
  or if `newest` asks for it, the newest.

  Where the initial encoder comes from a file and nothing was trained, it is
  scored alone. Features are kept in the run's folder `features`.

  Returns:
    The entries of results.json, which it updates.

  Raises:
    UserError: neither checkpoint nor weights, a run of other images or other
      initial weights, or nothing that can be scored.
  """
  with stopping.during('scoring'):
    return _evaluate_run(experiment, workdir, newest)


def _evaluate_run(
  experiment: Experiment, workdir: Workdir, newest: bool
) -> dict:
  evaluation = experiment.evaluation
  reason = why_not_scored(experiment.splits)
  label_free = [x.name for x in evaluation.evaluators if not x.needs_labels]
  if reason and not label_free:
    raise UserError(f'{reason}; add class folders or a labels.csv')
  if reason:
    print(f'{reason}, but for {", ".join(label_free)}', file=sys.stderr)
  if remark := remark_on_labels(experiment.splits):
    print(f'warning: {remark}', file=sys.stderr)
  trained = classifier = None
  if workdir.has_checkpoint() or not experiment.imported:
    trained, saved = read_trained(experiment, workdir, newest=newest)
    classifier = classifier_of(experiment, saved.classifier)
    check_same_start(experiment, workdir)
  entries = dict(
    init=_score_init(experiment, workdir),
    protocols=list(evaluation.protocols),
    eval=evaluation.settings,
  )
  if trained is None:
    return workdir.update_results(
      **entries,
      dataset=experiment.data.name,
      data_sha256=experiment.data.sha256,
      sample_sha256=hash_of_sample(experiment.data),
      init_from=describe_start(experiment),
    )
  return workdir.update_results(
    **entries,
    **score_classifier(experiment, trained, classifier, saved.step),
    final=score(experiment, trained),
    scored_step=saved.step,
    steps=saved.choice.newest_step,
  )
