"""The program as a user meets it: what `python main.py` is given and says.

A process is started where it is signalled or where its start is what matters;
everything else runs in this one.
"""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import warnings
from typing import NamedTuple

import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from cmd_jax.cli.program import run_mode
from tests.tfds_builders import layouts

_REPO = pathlib.Path(__file__).resolve().parents[1]
_PROTOCOLS = ('knn/20', 'linear/logreg', 'retrieval/test-vs-train')
_STEPS = 24
_SMALL = (
  '--config.model.depth=1',
  '--config.batch_size=8',
  '--config.log.every_steps=1',
  '--config.checkpoint.every_steps=4',
  '--config.parallel.num_devices=1',
)
_RUN_TIMEOUT_S = 400


class _Result(NamedTuple):
  returncode: int
  stdout: str
  stderr: str


class _Program:
  """Runs main.py with the arguments that all runs share."""

  def __init__(self, root):
    # The cache of the tests is used in place of the user's.
    self._cache = '--compilation_cache='
    self._data_dir = root / 'tfds'

  def command(self, *arguments):
    return [self._cache, *arguments]

  def toybirds(self, workdir, *arguments, method='cmd', config='toybirds'):
    return self.command(
      f'--config=configs/{config}.py:method={method},quicktest',
      f'--workdir={workdir}',
      '--config.dataset.builder_config=quicktest',
      f'--config.dataset.data_dir={self._data_dir}',
      '--config.total_epochs=2',
      '--config.augment.num_local=1',
      *_SMALL,
      *arguments,
    )

  def folder(self, workdir, path, *arguments):
    return self.command(
      '--config=configs/folder.py:method=dino,quicktest',
      f'--workdir={workdir}',
      f'--config.dataset.path={path}',
      '--config.total_epochs=1',
      '--config.augment.num_local=0',
      *_SMALL,
      *arguments,
    )

  def start(self, command, stdout=subprocess.DEVNULL):
    return subprocess.Popen(
      [sys.executable, 'main.py', *command],
      cwd=_REPO,
      env=dict(os.environ, JAX_PLATFORMS='cpu'),
      stdout=stdout,
      stderr=subprocess.PIPE,
      text=True,
    )

  def run_process(self, command):
    process = self.start(command, subprocess.PIPE)
    stdout, stderr = process.communicate(timeout=_RUN_TIMEOUT_S)
    return _Result(process.returncode, stdout, stderr)

  def run(self, command):
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
      contextlib.chdir(_REPO),
      contextlib.redirect_stdout(stdout),
      contextlib.redirect_stderr(stderr),
    ):
      code = run_mode(command)
    return _Result(code, stdout.getvalue(), stderr.getvalue())


@pytest.fixture(scope='session')
def program(tmp_path_factory):
  return _Program(tmp_path_factory.mktemp('program'))


@pytest.fixture(scope='session')
def finished(program, tmp_path_factory):
  """Work directory of an undisturbed run, and what the run printed."""
  workdir = tmp_path_factory.mktemp('finished') / 'run'
  result = program.run_process(program.toybirds(workdir))
  assert result.returncode == 0, result.stderr
  return workdir, result


def _read_results(workdir):
  return json.loads((workdir / 'results.json').read_text())


def _logged_steps(workdir):
  path = workdir / 'metrics.jsonl'
  if not path.exists():
    return []
  lines = path.read_text().split('\n')
  return [json.loads(line)['step'] for line in lines[:-1]]


def _checkpoint_steps(workdir):
  directory = workdir / 'checkpoints'
  if not directory.exists():
    return []
  return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def _last_state(workdir):
  """Every array of the last checkpoint by path, read without cmd_jax."""
  last = workdir / 'checkpoints' / str(_checkpoint_steps(workdir)[-1])
  with warnings.catch_warnings():
    # Orbax advises to name shardings, which do not matter here.
    warnings.simplefilter('ignore')
    tree = ocp.PyTreeCheckpointer().restore(last / 'state')
  return dict(_leaves(tree))


def _leaves(tree, path=''):
  if isinstance(tree, dict):
    for key, value in tree.items():
      yield from _leaves(value, f'{path}/{key}')
  elif isinstance(tree, list | tuple):
    for key, value in enumerate(tree):
      yield from _leaves(value, f'{path}/{key}')
  elif tree is not None:
    yield path, np.asarray(tree)


def _assert_same_state(workdir, other):
  state, other_state = _last_state(workdir), _last_state(other)
  assert len(state) > 50
  assert state.keys() == other_state.keys()
  for path, value in state.items():
    np.testing.assert_array_equal(other_state[path], value, err_msg=path)


def _assert_refused(result, *words):
  """Exit code 2, one line that begins with 'error: ', no traceback."""
  assert result.returncode == 2, result.stderr
  errors = [x for x in result.stderr.splitlines() if 'error: ' in x]
  assert len(errors) == 1, result.stderr
  assert result.stderr.splitlines()[-1] == errors[0]
  assert errors[0].startswith('error: ')
  assert 'Traceback' not in result.stderr
  for word in words:
    assert word in errors[0]


def test_quicktest_leaves_results_metrics_events_and_config(finished):
  workdir, result = finished
  # As the program was started itself: no environment need be activated.
  assert f'main.py --mode=report --workdir={workdir}\n' in result.stdout
  assert 'the loss may rise over the first' in result.stderr
  results = _read_results(workdir)
  assert results['method'] == 'cmd'
  assert results['steps'] == _STEPS
  assert results['images_per_second'] > 0
  for when in ('init', 'final'):
    assert {x.rpartition('/')[0] for x in results[when]} == set(_PROTOCOLS)
    assert all(0 <= value <= 1 for value in results[when].values())
  assert results['init'].keys() == results['final'].keys()
  assert 'knn/20/top1' in results['final']
  assert results['init'] != results['final']

  assert _logged_steps(workdir) == list(range(1, _STEPS + 1))
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  terms = {'image', 'region', 'student_bag', 'teacher_bag'}
  for line in map(json.loads, lines):
    assert {f'loss/{term}' for term in terms} <= line.keys()
    assert all(np.isfinite(value) for value in line.values())
  config = json.loads((workdir / 'config.json').read_text())
  assert config['model']['depth'] == 1
  assert list((workdir / 'tensorboard').glob('events.*'))
  assert _checkpoint_steps(workdir)[-1] == _STEPS
  for name in _PROTOCOLS:
    assert name in result.stdout
  assert result.stdout.endswith(
    f'{sys.executable} main.py --mode=report --workdir={workdir}\n'
  )
  assert 'Traceback' not in result.stderr


def _start_and_signal(program, command, workdir, number, *, after):
  """Sends the signal once step `after` is logged and a checkpoint exists."""
  process = program.start(command)
  deadline = time.monotonic() + _RUN_TIMEOUT_S
  while process.poll() is None and time.monotonic() < deadline:
    if _checkpoint_steps(workdir) and max(_logged_steps(workdir)) >= after:
      process.send_signal(number)
      break
    time.sleep(0.01)
  _, messages = process.communicate(timeout=_RUN_TIMEOUT_S)
  return process.returncode, messages


@pytest.mark.parametrize(
  'stops',
  [
    ((signal.SIGTERM, 8),),
    pytest.param(
      ((signal.SIGKILL, 4), (signal.SIGTERM, 10), (signal.SIGINT, 16)),
      marks=pytest.mark.slow,
    ),
  ],
)
def test_a_run_that_is_stopped_ends_as_if_undisturbed(
  program, finished, tmp_path, stops
):
  workdir = tmp_path / 'run'
  # Neither the evaluation nor where the images are is part of what must be
  # repeated exactly.
  command = program.toybirds(
    workdir,
    "--config.eval.protocols=('knn/20',)",
    '--config.placement=stream',
    '--config.stream.num_workers=2',
  )
  saved = 0
  for number, after in stops:
    code, messages = _start_and_signal(
      program, command, workdir, number, after=after
    )
    assert not saved or f'resumed after step {saved}\n' in messages
    if number == signal.SIGKILL:
      assert code == -number, messages
      saved = _checkpoint_steps(workdir)[-1]
      assert saved < _STEPS
      continue
    assert code == 128 + number, messages
    assert 'Traceback' not in messages
    saved = _checkpoint_steps(workdir)[-1]
    assert after <= saved < _STEPS
    assert f'stopped by {number.name} after step {saved};' in messages
    assert _logged_steps(workdir) == list(range(1, saved + 1))
    assert 'final' not in _read_results(workdir)

  # To the bit only in a process with as many devices.
  result = program.run_process(command)
  assert result.returncode == 0, result.stderr
  assert f'resumed after step {saved}\n' in result.stderr
  assert _logged_steps(workdir) == list(range(1, _STEPS + 1))
  undisturbed, _ = finished
  _assert_same_state(undisturbed, workdir)
  final = _read_results(undisturbed)['final']
  for name, value in _read_results(workdir)['final'].items():
    assert final[name] == value


def test_a_finished_run_is_left_as_it_is_and_can_be_evaluated(
  program, finished
):
  workdir, _ = finished
  before, steps = _read_results(workdir), _logged_steps(workdir)
  again = program.run(program.toybirds(workdir))
  assert again.returncode == 0, again.stderr
  assert _read_results(workdir)['final'] == before['final']
  assert _read_results(workdir)['steps'] == _STEPS
  assert _logged_steps(workdir) == steps

  # The config is that of the directory.
  scored = program.run(
    program.command('--mode=evaluate', f'--workdir={workdir}')
  )
  assert scored.returncode == 0, scored.stderr
  assert _read_results(workdir)['init'] == before['init']
  assert _read_results(workdir)['final'] == before['final']
  assert 'knn/20/top1' in scored.stdout
  other = program.run(
    program.command(
      '--mode=evaluate', f'--workdir={workdir}', '--config.seed=1'
    )
  )
  _assert_refused(other, 'seed is 0 there and 1 here')


def test_a_data_set_is_inspected_without_training(program, finished, tmp_path):
  command = program.toybirds('', '--mode=inspect')
  result = program.run([x for x in command if x != '--workdir='])
  assert result.returncode == 0, result.stderr
  assert 'images: 96 in = 96 used + 0 skipped' in result.stdout
  # What training found before its first step, but for the free memory.
  workdir, _ = finished
  found = (workdir / 'data_report.txt').read_text().partition('placement')
  assert result.stdout.partition('placement')[:2] == found[:2]

  # However few they are, and with a copy in another class.
  _write_images(tmp_path / 'photos' / 'robin', 4)
  _write_images(tmp_path / 'photos' / 'wren', 1)
  run = tmp_path / 'run'
  photos = tmp_path / 'photos'
  few = program.run(program.folder(run, photos, '--mode=inspect'))
  assert few.returncode == 0, few.stderr
  assert '2 images have a twin with another label' in few.stdout
  assert (run / 'data_report.txt').read_text() == few.stdout
  report = json.loads((run / 'data_report.json').read_text())
  splits = report['splits'].values()
  assert sum(split['images_in'] for split in splits) == 5
  assert len(list(run.iterdir())) == 2


def test_weights_go_out_and_in_again(program, finished, tmp_path):
  workdir, _ = finished
  exported = program.run(program.toybirds(workdir, '--mode=export'))
  assert exported.returncode == 0, exported.stderr
  weights = workdir / 'encoder.safetensors'
  assert str(weights) in exported.stdout
  assert 'VisionTransformer(img_size=24' in exported.stdout

  start = f'--config.init.path={weights}'
  other = tmp_path / 'run'
  once = '--config.total_epochs=1'
  result = program.run(program.toybirds(other, start, once))
  assert result.returncode == 0, result.stderr
  assert 'missing: 0' in result.stderr
  results = _read_results(other)
  # The new run starts where the old one ended.
  assert results['init'] == _read_results(workdir)['final']
  sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
  assert results['init_from']['sha256'] == sha256
  assert sha256 in result.stderr
  # What training has to beat is shown before it.
  assert 'the encoder that training starts from' in result.stdout
  assert f'the encoder starts from {weights}' in result.stderr

  # The checkpoint has all that a longer run needs.
  kept = weights.rename(tmp_path / 'kept')
  longer = program.run(
    program.toybirds(other, start, '--config.total_epochs=2')
  )
  assert longer.returncode == 0, longer.stderr
  assert f'{weights} is not there any more' in longer.stderr
  assert 'resumed after step' in longer.stderr
  after = _read_results(other)
  assert after['steps'] == 2 * results['steps']
  for name in ('init', 'init_from'):
    assert after[name] == results[name]
  evaluated = program.run(
    program.toybirds(other, start, '--config.total_epochs=2', '--mode=evaluate')
  )
  assert evaluated.returncode == 0, evaluated.stderr
  assert _read_results(other)['init'] == results['init']
  new = program.run(program.toybirds(tmp_path / 'new', start))
  _assert_refused(new, f'{weights} does not exist')
  kept.rename(weights)

  deeper = program.run(
    program.toybirds(tmp_path / 'deeper', start, '--config.model.depth=2')
  )
  _assert_refused(deeper, 'lacks 12 parameters', '--config.model.depth=1')
  assert not (tmp_path / 'deeper').exists()


def _particle_command(program, workdir, *arguments):
  return program.toybirds(
    workdir,
    '--config.total_epochs=2',
    '--config.parts.view_px=32',
    '--config.parts.settings.max_clusters=4',
    '--config.parts.settings.num_sampled=2000',
    '--config.eval.segmentation.labelled_images=40',
    '--config.eval.segmentation.num_steps=10',
    '--config.eval.segmentation.view_px=32',
    *arguments,
    config='particle_toybirds',
    method='particle',
  )


# Rounds are looked at in tests/training/test_part_rounds.py.
@pytest.mark.slow
def test_parts_are_found_contrasted_and_found_again(program, tmp_path):
  workdir = tmp_path / 'run'
  command = _particle_command(program, workdir)
  result = program.run(command)
  assert result.returncode == 0, result.stderr
  results = _read_results(workdir)
  for when in ('init', 'final'):
    for name in ('linear/logreg/top1', 'seg/pascub5/miou'):
      assert 0 <= results[when][name] <= 1
  manifests = [
    json.loads((workdir / 'parts' / name / 'manifest.json').read_text())
    for name in ('round_1', 'round_2')
  ]
  assert len({manifest['encoder_sha256'] for manifest in manifests}) == 2
  for name in ('round_1', 'round_2'):
    with Image.open(workdir / 'parts' / f'{name}.png') as sheet:
      assert sheet.size[0] > 100


@pytest.mark.slow
def test_rounds_that_are_stopped_end_as_if_undisturbed(program, tmp_path):
  quick = "--config.eval.protocols=('linear/logreg',)"
  workdir, undisturbed = tmp_path / 'run', tmp_path / 'undisturbed'
  command = _particle_command(program, workdir, quick)
  # Stopped in the first round, and in the second, whose masks are there then.
  for number, after in ((signal.SIGKILL, 5), (signal.SIGTERM, 16)):
    code, messages = _start_and_signal(
      program, command, workdir, number, after=after
    )
    assert code == (-number if number == signal.SIGKILL else 128 + number)
  result = program.run_process(command)
  assert result.returncode == 0, result.stderr
  assert 'resumed after' in result.stderr
  result = program.run_process(_particle_command(program, undisturbed, quick))
  assert result.returncode == 0, result.stderr
  _assert_same_state(undisturbed, workdir)
  for name in ('round_1', 'round_2'):
    for file in sorted((undisturbed / 'parts' / name).iterdir()):
      same = workdir / 'parts' / name / file.name
      assert file.read_bytes() == same.read_bytes(), file.name


@pytest.mark.parametrize(
  'name, make',
  [
    ('cub', layouts.make_cub),
    pytest.param('cars', layouts.make_cars, marks=pytest.mark.slow),
    pytest.param('aircraft', layouts.make_aircraft, marks=pytest.mark.slow),
  ],
)
def test_a_published_set_is_prepared_and_trained_on(
  program, tmp_path, name, make
):
  make(tmp_path / 'manual', 12)
  shared = (
    f'--config=configs/{name}.py:quicktest',
    '--config.dataset.builder_config=quicktest',
    f'--config.dataset.data_dir={tmp_path / "data"}',
  )
  prepared = program.run(
    program.command(
      *shared, '--mode=prepare', f'--manual_dir={tmp_path / "manual"}'
    )
  )
  assert prepared.returncode == 0, prepared.stderr
  workdir = tmp_path / 'run'
  trained = program.run(
    program.command(
      *shared,
      f'--workdir={workdir}',
      '--config.total_epochs=1',
      '--config.augment.num_local=1',
      *_SMALL,
    )
  )
  assert trained.returncode == 0, trained.stderr
  results = _read_results(workdir)
  assert results['steps'] >= 1
  assert 'knn/20/top1' in results['final']


def test_a_report_needs_nothing_but_the_work_directory(program, finished):
  workdir, _ = finished
  result = program.run(program.command('--mode=report', f'--workdir={workdir}'))
  assert result.returncode == 0, result.stderr
  assert result.stdout.strip() == str(workdir / 'report.html')
  assert 'knn/20/top1' in (workdir / 'report.html').read_text()


def test_a_report_without_a_run_is_refused(program, tmp_path):
  command = program.command('--mode=report', f'--workdir={tmp_path}')
  result = program.run(command)
  _assert_refused(result, 'is no work directory of a run')


_TOYBIRDS = '--config=configs/toybirds.py:quicktest'


@pytest.mark.parametrize(
  'arguments, words',
  [
    ([_TOYBIRDS, '--config.sede=1'], ["no field 'sede'", 'seed', 'optim']),
    (
      ['--config', 'configs/toybirds.py', '--config.optim.rate=1'],
      ["config.optim has no field 'rate'", 'base_learning_rate'],
    ),
    ([_TOYBIRDS, '--config.seed.x=1'], ['config.seed is a value']),
    ([_TOYBIRDS, '--config.batch_size=many'], ['batch_size', 'many']),
    ([_TOYBIRDS, '--config.optim=3'], ['config.optim', '3']),
    (
      ['--config=configs/toybirds.py:method=byol'],
      ['byol', 'method=cmd', 'method=esvit', 'method=dino', 'quicktest'],
    ),
    ([], ['--config is missing', 'configs/toybirds.py']),
    (['--config=configs/none.py'], ['--config', 'does not exist']),
    (['--config=setup.cfg'], ['invalid syntax', 'setup.cfg']),
    ([_TOYBIRDS, '--nope=1'], ['nope']),
    ([_TOYBIRDS, '--mode=fly'], ['--mode=fly', 'train|evaluate']),
    ([_TOYBIRDS, 'stray'], ["unexpected argument 'stray'", '--name=value']),
  ],
)
def test_wrong_flags_are_told_in_one_line(program, tmp_path, arguments, words):
  workdir = tmp_path / 'run'
  command = program.command(f'--workdir={workdir}', *arguments)
  result = program.run(command)
  _assert_refused(result, *words)
  assert not workdir.exists()


def test_workdir_must_be_named(program):
  result = program.run_process(program.command(_TOYBIRDS))
  _assert_refused(result, '--workdir is missing')


def test_help_names_the_flags(program):
  result = program.run_process(program.command('--help'))
  assert result.returncode == 0
  assert not result.stderr
  for flag in ('--config', '--workdir', '--mode', '--compilation_cache'):
    assert flag in result.stdout


def _write_images(folder, count, *, seed=0):
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(seed)
  for number in range(count):
    coarse = rng.integers(0, 256, (5, 4, 3), np.uint8)
    Image.fromarray(coarse).resize((40, 50)).save(folder / f'{number:02d}.png')


@pytest.mark.parametrize(
  'make, words',
  [
    (lambda root: root / 'none', ['does not exist', '--config.dataset.path']),
    (lambda root: '', ['no folder', '--config.dataset.path']),
    (lambda root: root / 'empty', ['has no images', '.jpg']),
    (lambda root: root / 'corrupt', ['none of the 3 images', '0.jpg']),
    (lambda root: root / 'few', ['few/pretrain has 4', 'batch_size 8']),
  ],
)
def test_unusable_folders_are_refused(program, tmp_path, make, words):
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'corrupt').mkdir()
  for number in range(3):
    (tmp_path / 'corrupt' / f'{number}.jpg').write_bytes(b'\xff\xd8\xff junk')
  _write_images(tmp_path / 'few', 4)
  workdir = tmp_path / 'run'
  result = program.run(program.folder(workdir, make(tmp_path)))
  _assert_refused(result, *words)
  assert not workdir.exists()


@pytest.mark.parametrize(
  'argument, words',
  [
    (
      "--config.eval.protocols=('knn/20','knn/nine')",
      ['knn/nine', 'linear/logreg'],
    ),
    ('--config.parallel.num_devices=64', ['num_devices is 64', '8 cpu']),
    (
      '--config.parallel.num_devices=8 --config.batch_size=12',
      ['batch_size is 12', '8 devices', '8 or 16'],
    ),
    ('--config.parallel.mode=ddp', ["'ddp'", 'jit, pmap']),
  ],
)
def test_impossible_configs_are_refused_before_training(
  program, tmp_path, argument, words
):
  _write_images(tmp_path / 'photos', 16)
  workdir = tmp_path / 'run'
  result = program.run(
    program.folder(workdir, tmp_path / 'photos', *argument.split())
  )
  _assert_refused(result, *words)
  assert not workdir.exists()


def test_workdir_of_another_config_is_refused_and_left_alone(program, tmp_path):
  workdir = tmp_path / 'run'
  workdir.mkdir()
  there = '{"seed": 7}'
  (workdir / 'config.json').write_text(there)
  result = program.run(program.toybirds(workdir))
  _assert_refused(result, str(workdir), 'another config', '--workdir')
  assert (workdir / 'config.json').read_text() == there
  assert [p.name for p in workdir.iterdir()] == ['config.json']


def test_evaluating_without_a_checkpoint_is_refused(program, tmp_path):
  workdir = tmp_path / 'run'
  result = program.run(program.toybirds(workdir, '--mode=evaluate'))
  _assert_refused(result, 'no checkpoint', 'train first')
  assert not workdir.exists()


def test_folder_with_classes_is_scored_and_a_corrupt_image_reported(
  program, tmp_path
):
  for seed, name in enumerate(('robin', 'wren')):
    _write_images(tmp_path / 'photos' / name, 10, seed=seed)
  (tmp_path / 'photos' / 'wren' / 'torn.jpg').write_bytes(b'\xff\xd8\xff junk')
  workdir = tmp_path / 'run'
  result = program.run(program.folder(workdir, tmp_path / 'photos'))
  assert result.returncode == 0, result.stderr
  final = _read_results(workdir)['final']
  assert {name.rpartition('/')[0] for name in final} == set(_PROTOCOLS)
  report = (workdir / 'skipped_images.txt').read_text()
  assert 'wren/torn.jpg: ' in report
  assert ', 1 skipped' in report
  assert '1 unreadable image(s) skipped' in result.stderr


def test_a_run_on_other_images_is_refused_and_left_as_it_is(program, tmp_path):
  _write_images(tmp_path / 'photos', 17)
  workdir = tmp_path / 'run'
  command = program.folder(
    workdir, tmp_path / 'photos', '--config.placement=stream'
  )
  assert program.run(command).returncode == 0
  assert _read_results(workdir)['route'] == 'stream'
  kept = {
    name: (workdir / name).read_bytes()
    for name in ('config.json', 'data_report.txt', 'results.json')
  }
  _write_images(tmp_path / 'photos' / 'more', 3)
  # auto would take the device now.
  result = program.run(program.folder(workdir, tmp_path / 'photos'))
  _assert_refused(result, 'trained on other images', '--workdir')
  for name, content in kept.items():
    assert (workdir / name).read_bytes() == content, name


def test_photographs_may_move(program, tmp_path):
  photos, moved = tmp_path / 'photos', tmp_path / 'moved'
  workdir = tmp_path / 'run'
  for name in 'ab':
    _write_images(photos / name, 5)
  assert program.run(program.folder(workdir, f'{photos}')).returncode == 0
  before = _read_results(workdir)
  photos.rename(moved)
  (tmp_path / 'link').symlink_to(moved)
  relative = os.path.relpath(moved, _REPO)
  # As moved, with a slash, by a link, relative.
  for mode, path in (
    ('evaluate', moved),
    ('evaluate', f'{tmp_path}/link/'),
    ('report', relative),
    ('train', f'{moved}/'),
  ):
    command = [f'--mode={mode}', *program.folder(workdir, path)]
    result = program.run(command)
    assert result.returncode == 0, (mode, path, result.stderr)
  after = _read_results(workdir)
  assert after['data_sha256'] == before['data_sha256']
  assert after['final'] == before['final']
  # The run knows where they are now.
  config = json.loads((workdir / 'config.json').read_text())
  assert config['dataset']['path'] == f'{moved}/'
  (moved / 'a').rename(moved / 'c')
  kept = (workdir / 'config.json').read_bytes()
  for mode in ('evaluate', 'report', 'train', 'inspect'):
    command = [f'--mode={mode}', *program.folder(workdir, moved)]
    _assert_refused(program.run(command), 'other images', 'other names')
  assert (workdir / 'config.json').read_bytes() == kept


def test_a_run_inside_its_photographs_goes_on(program, tmp_path):
  photos = tmp_path / 'photos'
  for name in 'ab':
    _write_images(photos / name, 5)
  command = program.folder(photos / 'runs' / '1', photos)
  assert program.run(command).returncode == 0
  pictures = list((photos / 'runs').rglob('*.png'))
  result = program.run(command)
  assert result.returncode == 0 and pictures, result.stderr
  assert 'work directories of runs: runs/1' in result.stderr
  # In the folder itself nothing would tell the pictures apart.
  _assert_refused(
    program.run(program.folder(f'{photos}/', photos)),
    'is the folder of photographs',
    'another --workdir',
  )
  assert not (photos / 'config.json').exists()


def test_flat_folder_is_trained_but_not_scored(program, tmp_path):
  _write_images(tmp_path / 'photos', 17)
  workdir = tmp_path / 'run'
  result = program.run(program.folder(workdir, tmp_path / 'photos'))
  assert result.returncode == 0, result.stderr
  results = _read_results(workdir)
  assert results['init'] == results['final'] == {}
  assert results['steps'] == 2
  assert 'no labelled training images' in result.stdout
  assert not (workdir / 'skipped_images.txt').exists()
