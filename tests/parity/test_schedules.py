"""Schedules against the released cosine_scheduler and temperatures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.optim import schedules
from tests.parity import golden

_STORED = golden.read_json('schedules.json')
_ARGUMENTS = _STORED['args']


def _values(schedule, count):
  return jax.vmap(schedule)(jnp.arange(count))


@pytest.mark.parametrize('name', sorted(set(_ARGUMENTS) - {'teacher_temp'}))
def test_cosine(name):
  given = _ARGUMENTS[name]
  steps = given['niter_per_ep']
  schedule = schedules.cosine_schedule(
    given['base_value'],
    given['final_value'],
    given['epochs'] * steps,
    warmup_steps=given['warmup_epochs'] * steps,
    warmup_start=given['start_warmup_value'],
  )
  expected = np.array(_STORED[name])
  np.testing.assert_allclose(
    _values(schedule, len(expected)), expected, rtol=1e-5, atol=1e-9
  )


def test_teacher_temperature():
  given = _ARGUMENTS['teacher_temp']
  schedule = schedules.stepwise_schedule(
    given['warmup_teacher_temp'],
    given['teacher_temp'],
    given['warmup_teacher_temp_epochs'],
    1,
  )
  expected = _STORED['teacher_temp']
  assert len(expected) == given['nepochs']
  np.testing.assert_allclose(
    _values(schedule, len(expected)), expected, rtol=1e-6
  )
