import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cmd_jax.devices import chunking


@pytest.mark.parametrize(
  'batch, each, limit, expected',
  [
    (8, 10, 100, 8),
    (8, 10, 50, 4),
    (6, 10, 49, 3),
    (7, 10, 60, 1),
    (4, 9, 1, 1),
  ],
)
def test_a_block_is_the_largest_divisor_within_the_limit(
  batch, each, limit, expected
):
  assert chunking.examples_in_a_block(batch, each, limit) == expected


def test_joining_undoes_splitting():
  tree = {'a': jnp.arange(12).reshape(6, 2), 'b': jnp.zeros((6, 0, 3))}
  split = chunking.split(tree, 2)
  assert split['a'].shape == (3, 2, 2)
  jax.tree.map(np.testing.assert_array_equal, chunking.join(split), tree)
