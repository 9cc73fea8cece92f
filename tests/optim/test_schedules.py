import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.optim import schedules


def _published_cosine(base, final, total, warmup, start=0.0):
  steps = np.arange(total - warmup)
  cosine = final + 0.5 * (base - final) * (
    1 + np.cos(np.pi * steps / len(steps))
  )
  return np.concatenate([np.linspace(start, base, warmup), cosine])


@pytest.mark.parametrize('warmup', [0, 1, 7])
def test_cosine_is_the_published_one_at_every_step(warmup):
  schedule = schedules.cosine_schedule(5e-4, 1e-6, 40, warmup_steps=warmup)
  ours = [float(schedule(jnp.int32(step))) for step in range(40)]
  np.testing.assert_allclose(
    ours, _published_cosine(5e-4, 1e-6, 40, warmup), rtol=1e-5, atol=1e-10
  )


def test_cosine_keeps_its_last_value_after_the_end():
  schedule = schedules.cosine_schedule(1.0, 0.0, 10)
  assert float(schedule(jnp.int32(25))) == float(schedule(jnp.int32(9)))


def test_cosine_that_rises_starts_at_its_base():
  schedule = schedules.cosine_schedule(0.04, 0.4, 100)
  assert float(schedule(jnp.int32(0))) == pytest.approx(0.04)
  assert 0.39 < float(schedule(jnp.int32(99))) < 0.4


def test_warmup_rises_from_nothing_and_stays():
  schedule = schedules.linear_warmup(4)
  ours = [float(schedule(jnp.int32(step))) for step in range(7)]
  np.testing.assert_allclose(ours, [0, 0.25, 0.5, 0.75, 1, 1, 1])


def test_temperature_rises_once_an_epoch_and_stays():
  schedule = schedules.stepwise_schedule(0.04, 0.07, 4, 3)
  ours = [float(schedule(jnp.int32(step))) for step in range(18)]
  per_epoch = np.concatenate([np.linspace(0.04, 0.07, 4), [0.07, 0.07]])
  np.testing.assert_allclose(ours, np.repeat(per_epoch, 3), rtol=1e-6)


@pytest.mark.parametrize('warmup_epochs', [0, 1])
def test_temperature_without_a_rise(warmup_epochs):
  schedule = schedules.stepwise_schedule(0.04, 0.07, warmup_epochs, 3)
  first = 0.04 if warmup_epochs else 0.07
  assert float(schedule(jnp.int32(0))) == pytest.approx(first)
  assert float(schedule(jnp.int32(3))) == pytest.approx(0.07)
