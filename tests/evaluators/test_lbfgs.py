import jax
import jax.numpy as jnp
import numpy as np

from cmd_jax.evaluators import lbfgs


def _minimise(hessian, target, diagonal):
  """Of 1/2 (x - t)' H (x - t) + 1, columns apart, from 0."""

  def objective(x):
    grad = hessian @ (x - target)
    return 0.5 * jnp.sum((x - target) * grad) + 1, grad

  return lbfgs.minimise(
    objective,
    jnp.zeros_like(target),
    diagonal,
    tolerance=1e-9,
    max_evals=200,
  )


def test_problems_of_any_condition_are_solved_side_by_side():
  rng = np.random.default_rng(0)
  mix = rng.normal(size=(3, 6, 6))
  scales = np.float32([1, 5, 25])[:, None, None]
  hessians = np.einsum('pij,pkj->pik', mix, mix) * scales + np.eye(6)
  targets = rng.normal(size=(3, 6, 2)).astype(np.float32)
  diagonals = np.einsum('pii->pi', hessians)[..., None]
  solve = jax.jit(jax.vmap(_minimise))
  found = solve(*map(jnp.float32, (hessians, targets, diagonals)))
  np.testing.assert_allclose(found, targets, atol=2e-2)
  alone = _minimise(
    *(jnp.float32(x[1]) for x in (hessians, targets, diagonals))
  )
  np.testing.assert_allclose(found[1], alone, atol=1e-3)


def test_the_evaluations_are_limited():
  evaluations = []

  def objective(x):
    jax.debug.callback(lambda: evaluations.append(1))
    return jnp.sum(jnp.cosh(x - 3)), jnp.sinh(x - 3)

  x = jnp.zeros((2, 1))
  lbfgs.minimise(objective, x, x + 1, tolerance=1e-9, max_evals=4)
  jax.effects_barrier()
  # One more at 0, which says what a large decrease is.
  assert len(evaluations) == 5
