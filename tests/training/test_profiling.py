"""Traces of steps."""

import types

import jax
import jax.numpy as jnp
import pytest

from cmd_jax.errors import UserError
from cmd_jax.rundir.workdir import Workdir
from cmd_jax.training.profiling import Profiler
from cmd_jax.training.timetable import parse_profile_steps


def test_a_range_of_steps_is_read():
  assert parse_profile_steps('') is None
  assert parse_profile_steps('10:15') == (10, 15)
  assert parse_profile_steps(' 3:3 ', total=3) == (3, 3)


@pytest.mark.parametrize('text', ['10', '0:4', '5:3', 'a:b', '-1:3', '1:2:3'])
def test_other_texts_are_refused(text):
  with pytest.raises(UserError, match='--profile_steps=10:15'):
    parse_profile_steps(text)


def test_steps_beyond_the_run_are_refused():
  with pytest.raises(UserError, match='the run has 8 steps: choose earlier'):
    parse_profile_steps('9:9', total=8)


def _profiler(path, profile, step=0):
  notes = []
  experiment = types.SimpleNamespace(
    steps=types.SimpleNamespace(profile=profile)
  )
  progress = types.SimpleNamespace(note=notes.append)
  return Profiler(experiment, Workdir(str(path)), progress, step), notes


@pytest.fixture(name='calls')
def _calls(monkeypatch):
  """What is asked of JAX's profiler."""
  calls = []
  monkeypatch.setattr(
    jax.profiler, 'start_trace', lambda *_, **__: calls.append('start')
  )
  monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: calls.append('stop'))
  return calls


@pytest.mark.parametrize(
  'profile, per_call, expected',
  [
    ((2, 3), 1, ['call 1', 'start', 'call 2', 'call 3', 'stop', 'call 4']),
    # A call that takes several steps is traced as a whole.
    ((2, 3), 2, ['start', 'call 1', 'call 3', 'stop']),
    ((4, 9), 1, ['call 1', 'call 2', 'call 3', 'start', 'call 4', 'stop']),
    (None, 1, ['call 1', 'call 2', 'call 3', 'call 4']),
  ],
)
def test_the_calls_with_the_steps_are_traced(
  tmp_path, calls, profile, per_call, expected
):
  profiler, _ = _profiler(tmp_path, profile)
  for step in range(1, 5, per_call):
    profiler.before(step, per_call)
    calls.append(f'call {step}')
    profiler.after(step + per_call - 1, jnp.zeros(1))
  # What is not finished is written too.
  profiler.close()
  assert calls == expected


def test_steps_taken_before_are_not_traced(tmp_path, calls):
  profiler, notes = _profiler(tmp_path, (2, 3), step=5)
  assert notes == ['steps 2 to 3 are not traced: 5 are taken already']
  profiler.before(6, 1)
  profiler.close()
  assert not calls


def test_the_files_of_both_viewers_are_there(tmp_path):
  profiler, notes = _profiler(tmp_path, (1, 1))
  profiler.before(1, 1)
  profiler.after(1, jax.jit(lambda x: x + 1)(jnp.zeros(3)))
  assert 'tensorboard --logdir' in notes[0]
  names = {path.name for path in tmp_path.rglob('*') if path.is_file()}
  assert 'perfetto_trace.json.gz' in names
  assert any(name.endswith('.xplane.pb') for name in names)
