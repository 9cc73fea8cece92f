"""Which kernels the attention over prototypes has on a platform."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cmd_jax.losses import (
  prototype_blocks,
  prototype_kernels,
  prototype_triton,
)
from cmd_jax.losses.prototype_tiles import Inputs, Settings


class Functions(NamedTuple):
  """The kernels of a platform; see `prototype_kernels`.

  Attributes:
    make_shape: (N, G, K) -> how rows are cut, which the others are given; it
      has N as `tokens` and the views of a block as `views`.
    normalise: of that name.
    compare: of that name.
    pull_back: of that name.
    pull_back_expected: of that name.
  """

  make_shape: Callable
  normalise: Callable
  compare: Callable
  pull_back: Callable
  pull_back_expected: Callable


_MODULES = {
  'tpu': (prototype_blocks, prototype_kernels),
  'gpu': (prototype_triton, prototype_triton),
}
PLATFORMS = tuple(_MODULES)


def functions_of(settings: Settings) -> Functions:
  """The kernels that `Settings.kernels` names."""
  of_shape, module = _MODULES[settings.kernels]
  return Functions(
    of_shape.make_shape,
    *(
      functools.partial(getattr(module, name), interpret=settings.interpret)
      for name in Functions._fields[1:]
    ),
  )


def serves(settings: Settings, inputs: Inputs) -> bool:
  """Whether the kernels take these inputs.

  They want regions, prototypes in whole registers, and sums over bags; those
  of a GPU also features whose numbers are a power of two.
  """
  bags = [x for x in (settings.student_bag, settings.teacher_bag) if x]
  rows = inputs.student.regions
  if not rows or any(x.by_maximum for x in bags):
    return False
  num_prototypes = jax.tree.leaves(inputs.prototypes)[0].shape[-1]
  dim = rows[0].shape[-1]
  if settings.kernels == 'gpu' and not prototype_triton.serves(dim):
    return False
  return (
    num_prototypes % prototype_blocks.LANES == 0
    and dim % prototype_blocks.LANES == 0
    and rows[0].dtype in (jnp.float32, jnp.bfloat16)
  )
