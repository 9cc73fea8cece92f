"""The commands of the program.

What a command needs is imported when it runs: a mistake in the flags is told
without waiting for JAX.
"""

from __future__ import annotations

import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

from absl import flags
from ml_collections import ConfigDict

from cmd_jax.cli import on_photographs
from cmd_jax.cli.compilation_cache import use_compilation_cache
from cmd_jax.devices import processes
from cmd_jax.errors import UserError


class Command(NamedTuple):
  """A command.

  Attributes:
    help: what it does, in a line.
    run: (values of the flags) -> exit status; None for 0. Where there are
      actions it is given one as `action` too.
    options: the flags that it has, beside `--config`.
    config: 'required' or 'optional', in which case a run's own is read; None
      where there is none.
    workdir: 'required' or 'optional'.
    needs_trained: whether either a run or a file of weights is used.
    is_distributed: whether several processes may run it together.
    words: (workdir or None, weights or None) -> words by key that `--config`
      gets where it has none of that key; None for no words.
    actions: what it does one of, named behind the command; empty for one
      thing alone.
    config_of_run: file of the package whose `get_config` makes a config of a
      work directory, where fields are given without `--config`.
  """

  help: str
  run: Callable[..., int | None]
  options: tuple[str, ...]
  config: str | None = 'required'
  workdir: str = 'required'
  needs_trained: bool = False
  is_distributed: bool = False
  words: Callable[[str | None, str | None], Mapping[str, str]] | None = None
  actions: tuple[str, ...] = ()
  config_of_run: str = 'rundir/saved_run.py'


def _command_line(command: str, workdir: str) -> str:
  """A command on a work directory, as this program was itself started."""
  start = ['cmd-jax', command]
  if os.path.basename(sys.argv[0]) == 'main.py':
    # The environment need not be activated.
    start = [sys.orig_argv[0], sys.argv[0], f'--mode={command}']
  return shlex.join([*start, f'--workdir={workdir}'])


def _train(values: flags.FlagValues) -> int:
  use_compilation_cache(values)
  if values.profile_steps:
    values.config.log.profile_steps = values.profile_steps
  return _train_in(values.config, values.workdir)


def _train_in(config: ConfigDict, workdir: str | os.PathLike[str]) -> int:
  from cmd_jax.training import loop, run, summary

  run.check_logging(config)
  with run.opened(config, workdir) as opened:
    try:
      results = run.train_in(opened)
    except loop.Interrupted as stop:
      if processes.is_main_process():
        print(stop, file=sys.stderr)
      # As a shell reports a process that died of the signal.
      return 128 + stop.signal
    if processes.is_main_process():
      print(summary.summary(opened.experiment, opened.workdir, results))
      print(f'next         {_command_line("report", str(opened.workdir.path))}')
  return 0


def _finetune(values: flags.FlagValues) -> int:
  from cmd_jax.training import finetune

  use_compilation_cache(values)
  start = finetune.read_start(values.workdir, values.weights)
  config = values.config
  if config is None:
    if not values.workdir:
      raise UserError(
        '--config is missing: name the labelled images, such as '
        '--config=folder --config.dataset.path=FOLDER'
      )
    config = finetune.config_of_images(values.workdir, start)
  output = values.output or finetune.default_output(values.workdir)
  return _train_in(finetune.start_from(config, start), output)


def _words_of_finetune(
  workdir: str | None, weights: str | None
) -> Mapping[str, str]:
  from cmd_jax.training import finetune

  try:
    return finetune.words_for(finetune.read_start(workdir, weights))
  except UserError:
    # The command says so, after what can be wrong with the flags.
    return {'method': finetune.METHOD}


def _evaluate(values: flags.FlagValues) -> None:
  from cmd_jax.training import run, scoring

  use_compilation_cache(values)
  results = run.evaluate(values.config, values.workdir, newest=values.newest)
  print(scoring.explained_table(results['init'], results.get('final', {})))


def _report(values: flags.FlagValues) -> None:
  from cmd_jax.report.write import write_report
  from cmd_jax.training import run

  use_compilation_cache(values)
  output = values.output and pathlib.Path(values.output)
  with run.opened(values.config, values.workdir, reads_only=True) as opened:
    print(
      write_report(
        opened.experiment,
        opened.workdir,
        output,
        max_images=values.report_images,
        newest=values.newest,
      )
    )


def _discover(values: flags.FlagValues) -> None:
  from cmd_jax.training import run

  use_compilation_cache(values)
  print(f'part masks in {run.discover(values.config, values.workdir)}')


def _export(values: flags.FlagValues) -> None:
  from cmd_jax.export.model import Request, export_model
  from cmd_jax.rundir.workdir import Workdir

  use_compilation_cache(values)
  network = ''
  if values.config is not None:
    network = values.config.eval.network
    if values.workdir:
      Workdir(values.workdir).check(values.config.to_dict())
  request = Request(
    source=values.weights or values.workdir,
    network=network,
    output=values.output,
    format=values.format,
    dtype=values.dtype,
    attention=values.attention,
    canvases=values.canvases,
    newest=values.newest,
  )
  print(export_model(request))


def _on_folder(command: str) -> Callable[[flags.FlagValues], None]:
  """A command that uses a trained encoder on a folder of images."""

  def run(values: flags.FlagValues) -> None:
    from cmd_jax.export import folders

    use_compilation_cache(values)
    request = folders.Request(
      source=('weights' in values and values.weights) or values.workdir,
      input=values.input,
      output=pathlib.Path(values.output)
      if values.output
      else folders.default_output(command, values.workdir),
      **{
        name: values[name].value
        for name in COMMANDS[command].options
        if name in folders.Request._fields and name not in ('input', 'output')
      },
    )
    print(folders.run(command, request))

  return run


def _compile(values: flags.FlagValues) -> None:
  from cmd_jax.compile_ahead import run

  request = run.Request(
    config=values.config,
    topology=values.topology,
    find_batch=values.find_batch,
    num_images=values.num_images,
    cache=values.compilation_cache,
  )
  print(run.compile_ahead(request, values.output))


def _weights(values: flags.FlagValues) -> None:
  from cmd_jax.convert import pretrained

  del values
  print(pretrained.describe())


def _prepare(values: flags.FlagValues) -> None:
  from cmd_jax.data.sources.prepare import prepare_config

  dataset = values.config.dataset.to_dict()
  print(
    prepare_config(
      dataset, manual_dir=values.manual_dir, download=values.download
    )
  )


def _inspect(values: flags.FlagValues) -> None:
  from cmd_jax.data.inspect.report_text import report_text
  from cmd_jax.rundir.workdir import Workdir
  from cmd_jax.training.inspection import inspect_config, write_data_report

  workdir = Workdir(values.workdir) if values.workdir else None
  report = inspect_config(values.config, workdir)
  if workdir:
    write_data_report(report, workdir.path)
  print(report_text(report), end='')


_CACHE = ('compilation_cache',)
_PROCESSES = (
  'coordinator_address',
  'num_processes',
  'process_id',
  'meeting_timeout_s',
)
_TRAINED = ('workdir', 'newest', 'weights')
_FOLDER = (*_TRAINED, 'input', 'output', *_CACHE)
_SEARCHED = (*_FOLDER, 'view_px', 'pooling')

COMMANDS = {
  'train': Command(
    'Trains an encoder; the same command again goes on where it stopped.',
    _train,
    ('workdir', 'profile_steps', *_PROCESSES, *_CACHE),
    is_distributed=True,
  ),
  'evaluate': Command(
    'Scores a run again: its best checkpoint if it keeps it, or its newest.',
    _evaluate,
    ('workdir', 'newest', *_CACHE),
    config='optional',
  ),
  'finetune': Command(
    'Fine-tunes an encoder with labels; the same command again goes on.',
    _finetune,
    ('workdir', 'weights', 'output', *_CACHE),
    config='optional',
    workdir='optional',
    needs_trained=True,
    words=_words_of_finetune,
    config_of_run='training/finetune.py',
  ),
  'predict': Command(
    'Names the images of a folder by a fine-tuned run.',
    _on_folder('predict'),
    ('workdir', 'newest', 'input', 'output', *_CACHE),
    config='optional',
  ),
  'report': Command(
    'Shows a run as one HTML page.',
    _report,
    ('workdir', 'newest', 'output', 'report_images', *_CACHE),
    config='optional',
  ),
  'export': Command(
    'Writes an encoder for timm or transformers, as StableHLO or as ONNX.',
    _export,
    (*_TRAINED, 'output', 'format', 'dtype', 'attention', 'canvases', *_CACHE),
    config='optional',
    workdir='optional',
    needs_trained=True,
  ),
  'embed': Command(
    'Writes the embeddings of a folder of images.',
    _on_folder('embed'),
    _SEARCHED,
    config='optional',
    workdir='optional',
    needs_trained=True,
  ),
  'search': Command(
    'Finds the images of a folder that are most like one.',
    _on_folder('search'),
    (*_SEARCHED, 'query', 'top_k', 'index'),
    config='optional',
    workdir='optional',
    needs_trained=True,
  ),
  'cluster': Command(
    'Sorts a folder of images into groups that look alike.',
    _on_folder('cluster'),
    (*_SEARCHED, 'num_clusters', 'min_cluster_size'),
    config='optional',
    workdir='optional',
    needs_trained=True,
  ),
  'curate': Command(
    'Shows duplicates, outliers, suspicious labels and what to label first.',
    on_photographs.curate,
    (*_FOLDER, 'select', 'alike_from', 'report_images'),
    config='optional',
    workdir='optional',
    needs_trained=True,
  ),
  'index': Command(
    'Builds an index of images, adds to it and searches it for many.',
    on_photographs.index,
    (*_SEARCHED, 'index_dir', 'query', 'query_class', 'top_k'),
    config='optional',
    workdir='optional',
    actions=('build', 'add', 'search'),
  ),
  'compile': Command(
    'Says what the train step costs on TPUs or GPUs that are not here.',
    _compile,
    ('topology', 'find_batch', 'num_images', 'output', *_CACHE),
    workdir='optional',
  ),
  'weights': Command(
    'Lists published weights that can be used by name.',
    _weights,
    (),
    config=None,
    workdir='optional',
  ),
  'prepare': Command(
    'Makes a data set of published files; --download fetches them.',
    _prepare,
    ('manual_dir', 'download'),
    workdir='optional',
  ),
  'inspect': Command(
    'Says what is in a data set, without training on it.',
    _inspect,
    ('workdir',),
    workdir='optional',
  ),
  'discover': Command(
    "Finds the parts of a run's images with its newest encoder.",
    _discover,
    ('workdir', *_CACHE),
    config='optional',
  ),
}
