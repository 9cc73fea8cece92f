"""Losses over prototypes that look at a few examples and prototypes at a time.

Logits over K prototypes of every patch of a batch do not fit into memory. A
loss is a mean over the examples, so that its cotangent is known when the
gradient is taken: `mean_over_examples` takes it block of examples by block.
Within a block the loss passes over tiles of prototypes, whose size goes by what
their logits may take.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from cmd_jax.devices import chunking, sharding

# Prototypes of 256 numbers of which so many stay in a core's cache.
_CACHED_PROTOTYPES = 1024


class Budget(NamedTuple):
  """What logits may take.

  Attributes:
    tile_bytes: the logits of a tile of prototypes: on a CPU they should stay
      in its cache; elsewhere they should keep matrix units busy.
    kept_bytes: logits that are kept for the later passes.
    kernels: see `prototype_tiles.Settings`.
  """

  tile_bytes: int
  kept_bytes: int
  kernels: str = ''


class Plan(NamedTuple):
  """How a batch is taken apart.

  Attributes:
    examples: of a block.
    prototypes: of a tile.
    keeps: whether logits are kept for the later passes.
    kernels: see `prototype_tiles.Settings`.
  """

  examples: int
  prototypes: int
  keeps: bool
  kernels: str = ''


def budget_for(platform: str, kernels: str = 'auto') -> Budget:
  """What logits may take on the devices of a platform.

  Args:
    platform: as JAX names it.
    kernels: 'pallas', 'xla', or 'auto' for what is faster there.
  """
  if platform == 'cpu':
    return Budget(8 * 2**20, 320 * 2**20)
  if kernels == 'auto':
    kernels = 'pallas' if platform == 'tpu' else 'xla'
  # Products are cheap there and memory is not: logits are computed anew.
  return Budget(256 * 2**20, 0, platform if kernels == 'pallas' else '')


def make_plan(
  budget: Budget, *, batch_size: int, num_rows: int, num_prototypes: int
) -> Plan:
  """The largest blocks within a budget.

  Args:
    budget: what logits may take, in float32.
    batch_size: B.
    num_rows: of features of an example, of both networks.
    num_prototypes: K.
  """
  a_prototype = 4 * num_rows
  # Tiles that are much longer than wide would read the features more often
  # than the prototypes.
  width = min(num_prototypes, _CACHED_PROTOTYPES)
  most_examples = budget.tile_bytes // (width * a_prototype)
  an_example = a_prototype * num_prototypes
  keeps = an_example <= budget.kept_bytes
  if keeps:
    most_examples = min(most_examples, budget.kept_bytes // an_example)
  examples = chunking.largest_divisor(batch_size, most_examples)
  most = budget.tile_bytes // (examples * a_prototype)
  prototypes = chunking.largest_divisor(num_prototypes, most)
  # A number without a fitting divisor is not worth thousands of tiny tiles.
  if 16 * prototypes < min(most, num_prototypes):
    prototypes = num_prototypes
  return Plan(examples, prototypes, keeps, budget.kernels)


def cut_block(tree: Any, number: jax.Array, size: int) -> Any:
  """A block of the prototypes, the last axis of every array."""
  return jax.tree.map(
    lambda x: lax.dynamic_slice_in_dim(x, number * size, size, axis=-1), tree
  )


def add_to_block(total: Any, block: Any, number: jax.Array) -> Any:
  """Adds to a block of the prototypes."""

  def add(total, block):
    size = block.shape[-1]
    block += lax.dynamic_slice_in_dim(total, number * size, size, axis=-1)
    return lax.dynamic_update_slice_in_dim(total, block, number * size, axis=-1)

  return jax.tree.map(add, total, block)


def number_of(prototypes: Any) -> int:
  """K, of arrays [..., K]."""
  return jax.tree.leaves(prototypes)[0].shape[-1]


def over_prototypes(fn: Callable[[Any], jax.Array], prototypes: Any):
  """What a function returns for all prototypes, computed block by block.

  Args:
    fn: [..., k] arrays -> [..., k].
    prototypes: [..., K] arrays.

  Returns:
    [..., K].
  """
  num_prototypes = number_of(prototypes)
  size = chunking.largest_divisor(num_prototypes, _CACHED_PROTOTYPES)
  if size * 16 < min(num_prototypes, _CACHED_PROTOTYPES):
    return fn(prototypes)
  values = lax.map(
    lambda number: fn(cut_block(prototypes, number, size)),
    jnp.arange(num_prototypes // size),
  )
  values = jnp.moveaxis(values, 0, -2)
  return values.reshape(*values.shape[:-2], num_prototypes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sum_over_prototypes(
  fn: Callable[[Any, Any], jax.Array],
  size: int,
  prototypes: Any,
  examples: Any,
) -> jax.Array:
  """Adds up what a function returns for tiles of the prototypes.

  The backward pass calls the function anew for each tile.

  Args:
    fn: ([..., k] arrays, examples) -> an array.
    size: k, a divisor of K.
    prototypes: [..., K] arrays, with gradient.
    examples: arrays, with gradient.
  """

  def step(total, number):
    return total + fn(cut_block(prototypes, number, size), examples), None

  like = jax.eval_shape(fn, cut_block(prototypes, 0, size), examples)
  numbers = jnp.arange(number_of(prototypes) // size)
  return lax.scan(step, jnp.zeros(like.shape, like.dtype), numbers)[0]


def _sum_over_prototypes_fwd(fn, size, prototypes, examples):
  total = sum_over_prototypes(fn, size, prototypes, examples)
  return total, (prototypes, examples)


def _sum_over_prototypes_bwd(fn, size, inputs, cotangent):
  prototypes, examples = inputs

  def step(carry, number):
    of_prototypes, of_examples = carry
    tile = cut_block(prototypes, number, size)
    _, pull_back = jax.vjp(fn, tile, examples)
    of_tile, more = pull_back(cotangent)
    return (
      add_to_block(of_prototypes, of_tile, number),
      jax.tree.map(jnp.add, of_examples, more),
    ), None

  zeros = jax.tree.map(jnp.zeros_like, inputs)
  numbers = jnp.arange(number_of(prototypes) // size)
  return lax.scan(step, zeros, numbers)[0]


sum_over_prototypes.defvjp(_sum_over_prototypes_fwd, _sum_over_prototypes_bwd)


def _sum_with_gradients(loss, plan, prototypes, constants, examples, targets):
  """Sum of the losses, what to report, and the gradients of the sum."""

  def of_block(so_far, examples, targets):
    def total(prototypes, so_far, examples):
      losses, values = loss(
        plan, prototypes, so_far, constants, examples, targets
      )
      return losses.sum(), values

    result, (of_prototypes, of_all, of_examples) = jax.value_and_grad(
      total, argnums=(0, 1, 2), has_aux=True
    )(prototypes, so_far, examples)
    if so_far is not None:
      of_prototypes = jax.tree.map(jnp.add, of_prototypes, of_all)
    return *result, (of_prototypes, of_examples)

  if plan.examples == len(jax.tree.leaves(examples)[0]):
    return of_block(None, examples, targets)

  def step(carry, block):
    total, so_far = carry
    more, values, (so_far, of_examples) = of_block(so_far, *block)
    return (total + more, so_far), (values, of_examples)

  split = chunking.split((examples, targets), plan.examples)
  start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, prototypes))
  (total, of_prototypes), (values, of_examples) = lax.scan(step, start, split)
  return (
    total,
    chunking.join(values),
    (of_prototypes, chunking.join(of_examples)),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum(loss, plan, prototypes, constants, examples, targets):
  inputs = (prototypes, constants, examples, targets)
  total, values, _ = _sum_with_gradients(loss, plan, *inputs)
  return total, values


def _sum_fwd(loss, plan, prototypes, constants, examples, targets):
  inputs = (prototypes, constants, examples, targets)
  total, values, gradients = _sum_with_gradients(loss, plan, *inputs)
  return (total, values), gradients


def _sum_bwd(loss, plan, gradients, cotangents):
  of_prototypes, of_examples = jax.tree.map(
    lambda x: (cotangents[0] * x).astype(x.dtype), gradients
  )
  return of_prototypes, None, of_examples, None


_sum.defvjp(_sum_fwd, _sum_bwd)


def mean_over_examples(
  loss: Callable[..., tuple[jax.Array, Any]],
  make_plan: Callable[[int], Plan],
  prototypes: Any,
  constants: Any,
  examples: Any,
  targets: Any,
  *,
  mesh: Mesh | None = None,
) -> tuple[jax.Array, Any]:
  """Mean of a loss over the examples of a batch.

  Args:
    loss: (plan, prototypes, so_far, constants, examples, targets) -> (loss [b],
      what to report, [b] each), for b of the examples; `so_far` is for
      `prototype_attention.attend`.
    make_plan: number of a device's examples -> how they are taken apart.
    prototypes: float arrays [..., K], with gradient.
    constants: arrays without gradient that all examples share.
    examples: float arrays [B, ...], with gradient.
    targets: arrays [B, ...], without gradient.
    mesh: the devices over which the examples are spread; None where the arrays
      are one device's share already.

  Returns:
    The mean loss (of this device's share without a mesh), and [B] of each
    thing to report, without gradient.
  """

  def of_device(shared, share, _):
    plan = make_plan(len(jax.tree.leaves(share)[0]))
    total, values = _sum(loss, plan, *shared, *share)
    return (), (total[None], values)

  _, (totals, values) = sharding.on_each_device(of_device, mesh)(
    (prototypes, constants), (examples, targets)
  )
  batch_size = len(jax.tree.leaves(examples)[0])
  return totals.sum() / batch_size, lax.stop_gradient(values)
