r"""Trains and scores encoders that tell look-alikes apart.

  python main.py --config=configs/toybirds.py --workdir=runs/toybirds
  python main.py --config=configs/folder.py --workdir=runs/mine \
    --config.dataset.path=/my/photographs --config.batch_size=32

The same command again resumes where it stopped; `--mode=evaluate` scores the
newest checkpoint again, `--mode=export` writes its encoder for timm or, with
--format, as StableHLO or ONNX, and `--mode=discover` finds parts with it.
`--mode=report` shows the run as one HTML page. `--mode=prepare` makes a data
set of files fetched by hand, and `--mode=inspect` says what is in a data set
without training on it.

  python main.py --mode=search --workdir=runs/mine --input=/my/photographs \
    --query=bird.jpg

and `--mode=embed` and `cluster` likewise use a trained encoder, or a file of
--weights, on any folder.
"""

from __future__ import annotations

import os
import pathlib
import signal
import sys
from typing import TYPE_CHECKING

from absl import app, flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from cmd_jax.devices import host_memory, processes
from cmd_jax.errors import UserError
from cmd_jax.files import disk_errors
from cmd_jax.rundir.lock import Lock
from cmd_jax.rundir.workdir import Workdir

if TYPE_CHECKING:
  from cmd_jax.training.experiment import Experiment

FOLDER_MODES = ('embed', 'search', 'cluster')
MODES = (
  'train',
  'evaluate',
  'export',
  'discover',
  'prepare',
  'inspect',
  'report',
  *FOLDER_MODES,
)
# They read a run's own config where --config is not given.
CONFIG_OPTIONAL = ('report', 'export', *FOLDER_MODES)
WORKDIR_OPTIONAL = ('prepare', 'inspect', 'export', *FOLDER_MODES)
# What they use is trained already: a run, or a file of weights.
TRAINED_MODES = ('export', *FOLDER_MODES)

_CONFIG = config_flags.DEFINE_config_file(
  'config', help_string='Config file, e.g. configs/cub.py:method=dino.'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Directory of the run: checkpoints, metrics, results.'
)
_MANUAL_DIR = flags.DEFINE_string(
  'manual_dir',
  None,
  'Folder of the files fetched by hand, for --mode=prepare: docs/datasets.md.',
)
_MODE = flags.DEFINE_enum('mode', 'train', MODES, 'What to do.')
_OUTPUT = flags.DEFINE_string(
  'output', None, 'What to write: report, export, embed, search, cluster.'
)
_REPORT_IMAGES = flags.DEFINE_integer(
  'report_images', 5000, '--mode=report: photographs on the page at most.'
)
_WEIGHTS = flags.DEFINE_string(
  'weights',
  None,
  'File of weights in place of --workdir: export, embed, search, cluster.',
)
_INPUT = flags.DEFINE_string(
  'input',
  None,
  'Folder of images, or file of --mode=embed: embed, search, cluster.',
)
_FORMAT = flags.DEFINE_enum(
  'format',
  'safetensors',
  ('safetensors', 'stablehlo', 'onnx'),
  '--mode=export: kind of file.',
)
_ATTENTION = flags.DEFINE_boolean(
  'attention', False, '--mode=export: the attention too, beside the embedding.'
)
_CANVASES = flags.DEFINE_boolean(
  'canvases',
  False,
  '--mode=export --format=stablehlo: takes uint8 images and makes the views.',
)
_QUERY = flags.DEFINE_string('query', None, '--mode=search: image to look for.')
_TOP_K = flags.DEFINE_integer('top_k', 12, '--mode=search: images to find.')
_INDEX = flags.DEFINE_enum(
  'index', 'exact', ('exact', 'faiss'), '--mode=search: what searches.'
)
_NUM_CLUSTERS = flags.DEFINE_integer(
  'num_clusters', 0, '--mode=cluster: groups to make; 0 finds out.'
)
_MIN_CLUSTER_SIZE = flags.DEFINE_integer(
  'min_cluster_size', 5, '--mode=cluster: images of a group found, at least.'
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator_address',
  None,
  'host:port of process 0, where several processes meet; SLURM, Open MPI and '
  'TPU pods need no flag: docs/scaling.md.',
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'Number of processes that train together.'
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Number of this process, from 0.'
)
_MEETING_TIMEOUT_S = flags.DEFINE_integer(
  'meeting_timeout_s', 300, 'Seconds to wait for the other processes.'
)
_CACHE = flags.DEFINE_string(
  'compilation_cache',
  os.path.join(
    os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'),
    'cmd_jax',
    'compilation',
  ),
  'Directory of the persistent compilation cache; empty turns it off.',
)


def _explain_unknown_field(config: ConfigDict, argv: list[str]) -> str | None:
  """Names the first override of a field that the config lacks."""
  for argument in argv:
    if not argument.startswith('--config.'):
      continue
    path = argument.removeprefix('--config.').partition('=')[0]
    node, walked = config, 'config'
    for part in path.split('.'):
      if not isinstance(node, ConfigDict):
        return f'{walked} is a value and has no field {part!r}'
      if part not in node:
        return (
          f'{walked} has no field {part!r}: choose one of '
          f'{", ".join(sorted(node))}'
        )
      node, walked = node[part], f'{walked}.{part}'
  return None


def _load_config_alone(argv: list[str]) -> ConfigDict | None:
  for argument, following in zip(argv, [*argv[1:], '']):
    name, _, value = argument.partition('=')
    if name == '--config':
      try:
        return ConfigFileFlagParser('config').parse(value or following)
      except (ImportError, OSError, SyntaxError, TypeError, ValueError):
        return None
  return None


def parse_flags(argv: list[str]) -> None:
  """Parses the command line.

  Raises:
    UserError: anything wrong with it, on one line.
  """
  app.define_help_flags()
  try:
    unexpected = flags.FLAGS(argv)[1:]
  except flags.Error as error:
    # A config file's own ValueError arrives as a trace; its last line says it.
    reason = str(error).strip().splitlines()[-1]
    raise UserError(reason.removeprefix('ValueError: ')) from error
  except (
    AttributeError,
    ImportError,
    KeyError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
  ) as error:
    config = _load_config_alone(argv)
    reason = config and _explain_unknown_field(config, argv)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    raise UserError(reason or lines[-1].removeprefix('ValueError: ')) from error
  if unexpected:
    raise UserError(
      f'unexpected argument {unexpected[0]!r}: write flags as --name=value'
    )
  if _CONFIG.value is None and _MODE.value not in CONFIG_OPTIONAL:
    known = sorted(
      str(path)
      for path in pathlib.Path('configs').glob('*.py')
      if path.stem not in ('__init__', 'common', 'small')
    )
    raise UserError(f'--config is missing: choose e.g. {", ".join(known)}')
  if not isinstance(_CONFIG.value, ConfigDict | None):
    raise UserError('--config names a file that does not exist or cannot load')
  if _MODE.value in TRAINED_MODES and bool(_WEIGHTS.value) == bool(
    _WORKDIR.value
  ):
    raise UserError('give one of --workdir, a run, and --weights, a file')
  _check_processes()
  if _MODE.value not in WORKDIR_OPTIONAL and not _WORKDIR.value:
    raise UserError('--workdir is missing: name a directory for the run')


def _address() -> processes.Address | None:
  return processes.check_address(
    _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
  )


def _check_processes() -> None:
  several = _address() or processes.launcher_of(os.environ) in (
    'SLURM',
    'Open MPI',
  )
  if several and _MODE.value != 'train':
    raise UserError(
      f'--mode={_MODE.value} runs in one process, and several are started: '
      'start one, without --num_processes'
    )


def _use_compilation_cache() -> None:
  import jax

  if _CACHE.value:
    jax.config.update('jax_compilation_cache_dir', _CACHE.value)
    # Dozens of small programs take seconds together: all are kept.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)


def _run_on_folder() -> None:
  from cmd_jax.export import folders

  _use_compilation_cache()
  mode, workdir = _MODE.value, _WORKDIR.value
  output = pathlib.Path(_OUTPUT.value) if _OUTPUT.value else None
  request = folders.Request(
    source=_WEIGHTS.value or workdir,
    input=_INPUT.value,
    output=output or folders.default_output(mode, workdir),
    query=_QUERY.value,
    top_k=_TOP_K.value,
    index=_INDEX.value,
    num_clusters=_NUM_CLUSTERS.value,
    min_cluster_size=_MIN_CLUSTER_SIZE.value,
  )
  print(folders.run(mode, request))


def _export() -> None:
  from cmd_jax.export.model import Request, export_model

  _use_compilation_cache()
  network = ''
  if _CONFIG.value is not None:
    network = _CONFIG.value.eval.network
    if _WORKDIR.value:
      Workdir(_WORKDIR.value).check(_CONFIG.value.to_dict())
  request = Request(
    source=_WEIGHTS.value or _WORKDIR.value,
    network=network,
    output=_OUTPUT.value,
    format=_FORMAT.value,
    attention=_ATTENTION.value,
    canvases=_CANVASES.value,
  )
  print(export_model(request))


def _inspect() -> None:
  from cmd_jax.data.inspect.report_text import report_text
  from cmd_jax.training.inspection import inspect_config, write_data_report

  workdir = Workdir(_WORKDIR.value) if _WORKDIR.value else None
  if workdir:
    workdir.check(_CONFIG.value.to_dict())
  report = inspect_config(_CONFIG.value)
  if workdir:
    write_data_report(report, workdir.path)
  print(report_text(report), end='')


def _with_route_of(workdir: Workdir, config: ConfigDict) -> ConfigDict:
  """The config, its images where the run has had them if that is open."""
  route = processes.from_first(lambda: workdir.results().get('route'))
  if config.placement != 'auto' or not route:
    return config
  config = ConfigDict(config)
  config.placement = route
  return config


def _build(workdir: Workdir, lock: Lock) -> tuple[ConfigDict, Experiment]:
  # Imported late: a mistake in the flags is told without waiting for JAX.
  from cmd_jax.rundir.saved_run import read_config
  from cmd_jax.training import experiment

  _use_compilation_cache()
  config = _CONFIG.value or read_config(workdir)
  workdir.check(config.to_dict())
  if workdir.config_file.exists():
    # Where there is a run, the second of two need not wait for its data.
    _take(lock)
  # Each host may keep the images elsewhere; that they are the same ones is
  # looked at later.
  fields = {k: v for k, v in config.to_dict().items() if k != 'dataset'}
  processes.check_same('the flags', repr(fields))
  try:
    return config, experiment.build(_with_route_of(workdir, config))
  except AttributeError as error:
    if _CONFIG.value is not None:
      raise
    raise UserError(
      f'{workdir.config_file} lacks a field ({error}): the run is of another '
      'version of this program; use that version'
    ) from error


def _take(lock: Lock) -> None:
  # A report only reads, and one process writes for all.
  if _MODE.value != 'report' and processes.is_first():
    lock.take()


def _run_experiment() -> None:
  workdir = Workdir(_WORKDIR.value)
  with Lock(workdir.path) as lock:
    _run_in(workdir, lock)


def _run_in(workdir: Workdir, lock: Lock) -> None:
  config, built = _build(workdir, lock)
  if _MODE.value == 'evaluate':
    from cmd_jax.training import scoring

    if built.imported:
      # Weights of others are scored without training.
      _take(lock)
      workdir.open(config.to_dict())
    results = scoring.evaluate_run(built, workdir)
    print(scoring.results_table(results['init'], results.get('final', {})))
  elif _MODE.value == 'report':
    from cmd_jax.report.write import write_report

    path = _OUTPUT.value and pathlib.Path(_OUTPUT.value)
    print(write_report(built, workdir, path, max_images=_REPORT_IMAGES.value))
  else:
    processes.from_first(lambda: _open(built, workdir, config, lock))
    if _MODE.value == 'discover':
      from cmd_jax.training.part_rounds import discover_parts

      print(f'part masks in {discover_parts(built, workdir)}')
    else:
      _train(built, workdir)


def _open(
  built: Experiment, workdir: Workdir, config: ConfigDict, lock: Lock
) -> None:
  from cmd_jax.training import scoring

  if workdir.has_checkpoint():
    # Before anything is written: a run that is refused is left as it is.
    scoring.check_same_start(built, workdir)
  _take(lock)
  workdir.open(config.to_dict())


def _train(built: Experiment, workdir: Workdir) -> None:
  from cmd_jax.training import loop, summary

  try:
    with disk_errors.explaining(workdir.path):
      results = loop.train(built, workdir)
  except loop.Interrupted as stop:
    if processes.is_first():
      print(stop, file=sys.stderr)
    # As a shell reports a process that died of the signal.
    sys.exit(128 + stop.signal)
  if processes.is_first():
    print(summary.summary(built, workdir, results))


def _run_mode() -> None:
  if _MODE.value in FOLDER_MODES:
    _run_on_folder()
    return
  if _MODE.value == 'export':
    _export()
    return
  if _MODE.value == 'prepare':
    from cmd_jax.data.sources.prepare import prepare_config

    dataset = _CONFIG.value.dataset.to_dict()
    print(prepare_config(dataset, manual_dir=_MANUAL_DIR.value))
    return
  if _MODE.value == 'inspect':
    _inspect()
    return
  _run_experiment()


def main() -> None:
  """Runs the mode that the flags name."""
  if _MODE.value == 'train':
    processes.start(_address(), timeout_s=_MEETING_TIMEOUT_S.value)
  with processes.failing_together(), disk_errors.explaining(None):
    _run_mode()


if __name__ == '__main__':
  host_memory.restart_with_huge_pages()
  try:
    parse_flags(sys.argv)
    main()
  except UserError as error:
    # A file's name may hold what a terminal would obey.
    text = ''.join(
      c if c.isprintable() or c == '\n' else ascii(c)[1:-1] for c in str(error)
    )
    print(f'error: {text}', file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    # Before or after the steps; within them the state is saved first.
    sys.exit(128 + signal.SIGINT)
