"""Part contrast against the released DetConBLoss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.losses import detcon
from tests.parity import golden


@golden.fixtures('detcon_loss')
@pytest.mark.parametrize('local_negatives', [True, False])
@pytest.mark.parametrize(
  'case', ['repeating', 'unique', 'identical', 'disjoint']
)
def test_value_and_gradients(fixture, case, local_negatives):
  def both(prefix):
    return jnp.stack([fixture[f'{prefix}{view}'] for view in (1, 2)], axis=1)

  @jax.value_and_grad
  def loss(predictions):
    return detcon.part_contrast(
      predictions,
      both('in/target'),
      both(f'{case}/pind'),
      both(f'{case}/tind'),
      temperature=0.1,
      local_negatives=local_negatives,
      axis_name=None,
    ).mean()

  expected = fixture.under(
    f'{case}/local_negatives_{str(local_negatives).lower()}/'
  )
  value, gradient = jax.jit(loss)(both('in/pred'))
  np.testing.assert_allclose(value, expected['loss'], rtol=3e-6)
  for view in (1, 2):
    theirs = expected[f'grad_pred{view}']
    np.testing.assert_allclose(
      gradient[:, view - 1], theirs, rtol=0, atol=1e-5 * np.abs(theirs).max()
    )
