"""The Dockerfile, which is built nowhere here: what can be known without."""

import configparser
import fnmatch
import pathlib
import re
import shutil
import subprocess

import pytest

_REPO = pathlib.Path(__file__).resolve().parents[1]
_TEXT = (_REPO / 'Dockerfile').read_text()


def _instructions():
  """(instruction, rest) in order, lines joined and comments dropped."""
  lines = [
    line for line in _TEXT.splitlines() if not re.match(r'\s*(#|$)', line)
  ]
  joined = re.sub(r'\\\n\s*', '', '\n'.join(lines))
  return [tuple(line.split(maxsplit=1)) for line in joined.splitlines()]


def _stages():
  """The instructions of each stage by its name."""
  stages = {}
  for name, rest in _instructions():
    if name == 'FROM':
      current = stages.setdefault(rest.split()[-1], [])
    elif stages:
      current.append((name, rest))
  return stages


def test_both_targets_run_the_program_as_nobody_special():
  stages = _stages()
  assert list(stages)[-1] == 'cpu', 'the target where none is named'
  for target in ('cpu', 'cuda'):
    found = dict(stages[target])
    assert found['ENTRYPOINT'] == '["cmd-jax"]'
    assert not found['USER'].startswith(('0', 'root'))
    (run,) = (rest for name, rest in stages[target] if name == 'RUN')
    assert '--constraint=/constraints.txt' in run
    assert '[cuda,' in run if target == 'cuda' else '[cuda' not in run


def test_extras_are_those_of_the_package():
  setup = configparser.ConfigParser()
  setup.read(_REPO / 'setup.cfg')
  (extras,) = re.findall(r'ARG EXTRAS=(\S+)', _TEXT)
  known = set(setup['options.extras_require'])
  assert {'cuda', *extras.split(',')} <= known


def test_the_python_is_the_one_of_the_constraints():
  (version,) = re.findall(r'ARG PYTHON=([\d.]+)', _TEXT)
  first = (_REPO / 'constraints.txt').read_text().splitlines()[0]
  assert f'on Python {version};' in first


def test_what_is_copied_is_there_and_not_ignored():
  kept = [
    line[1:]
    for line in (_REPO / '.dockerignore').read_text().splitlines()
    if line.startswith('!')
  ]
  copied = [
    source
    for name, rest in _instructions()
    if name == 'COPY' and '--from' not in rest
    for source in rest.split()[:-1]
  ]
  assert sorted(copied) == sorted(kept)
  for source in copied:
    assert (_REPO / source).exists(), source
  # What the wheel is made of besides its packages.
  metadata = (_REPO / 'setup.cfg').read_text()
  for file in re.findall(r'file: (\S+)|license_files = (\S+)', metadata):
    assert any(fnmatch.fnmatch(''.join(file), source) for source in copied)


def test_hadolint_has_no_complaint():
  hadolint = shutil.which('hadolint')
  if hadolint is None:
    pytest.skip('hadolint is not installed')
  done = subprocess.run(
    [hadolint, str(_REPO / 'Dockerfile')], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout
