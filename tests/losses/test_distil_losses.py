import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.losses.distil import cosine_distance, similarity_kl


def _draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_the_cosine_distance_is_half_the_squared_distance():
  student, teacher = _unit(_draw(4, 3, 6)), _unit(_draw(4, 3, 6, seed=1))
  np.testing.assert_allclose(
    cosine_distance(student, teacher),
    np.sum((student - teacher) ** 2, -1) / 2,
    rtol=1e-5,
  )
  np.testing.assert_allclose(cosine_distance(student, student), 0, atol=1e-6)
  np.testing.assert_allclose(cosine_distance(student, -student), 2, rtol=1e-6)


@pytest.mark.parametrize('temperature', [0.07, 1.0])
def test_the_kl_is_that_of_both_distributions(temperature):
  student, teacher = _draw(2, 5), _draw(2, 5, seed=1)
  values = similarity_kl(student, teacher, temperature=temperature)
  for value, s, t in zip(values, np.float64(student), np.float64(teacher)):
    p, q = (np.exp(x / temperature) for x in (t, s))
    p, q = p / p.sum(), q / q.sum()
    np.testing.assert_allclose(value, np.sum(p * np.log(p / q)), rtol=1e-4)
  same = similarity_kl(teacher, teacher, temperature=temperature)
  np.testing.assert_allclose(same, 0, atol=1e-6)


def test_the_gradient_of_the_kl_is_the_difference_over_the_temperature():
  student, teacher, temperature = _draw(5), _draw(5, seed=1), 0.3
  gradient = jax.grad(
    lambda x: similarity_kl(x, teacher, temperature=temperature)
  )(jnp.asarray(student))
  p, q = (np.exp(np.float64(x) / temperature) for x in (teacher, student))
  expected = (q / q.sum() - p / p.sum()) / temperature
  np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)
