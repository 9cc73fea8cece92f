"""Losses block by block, so that no array of prototypes is as long as a batch.

Logits over K prototypes of every patch of a batch do not fit into memory, and
pass through it many times where they do. Here the part of the loss that needs
them is computed for a few examples at a time, with its gradient, before the
next are looked at. No logit is computed twice: the loss is a mean over the
examples, so that its cotangent is known when the gradient is taken.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cmd_jax import blocks, parallel

# What the logits of a block may take: enough to keep matrix products busy.
LOGIT_BYTES = 64 * 2**20

# (shared, examples, constants) -> (loss [b], values [b] to report).
Compare = Callable[[Any, Any, Any], tuple[jax.Array, Any]]


def _sum_with_gradients(compare, size, shared, examples, constants):
  """Sum of the losses, the values, and the gradients of the sum."""

  def total(shared, block):
    loss, values = compare(shared, block, constants)
    return loss.sum(), values

  def of_block(block):
    return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(
      shared, block
    )

  if len(jax.tree.leaves(examples)[0]) == size:
    (loss, values), gradients = of_block(examples)
    return loss, values, gradients

  def step(carry, block):
    (loss, values), (of_shared, of_examples) = of_block(block)
    carry = jax.tree.map(jnp.add, carry, (loss, of_shared))
    return carry, (values, of_examples)

  start = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, shared))
  (loss, of_shared), (values, of_examples) = jax.lax.scan(
    step, start, blocks.split(examples, size)
  )
  return loss, blocks.join(values), (of_shared, blocks.join(of_examples))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum(compare, size, shared, examples, constants):
  loss, values, _ = _sum_with_gradients(
    compare, size, shared, examples, constants
  )
  return loss, values


def _sum_fwd(compare, size, shared, examples, constants):
  loss, values, gradients = _sum_with_gradients(
    compare, size, shared, examples, constants
  )
  return (loss, values), (gradients, constants)


def _sum_bwd(compare, size, residuals, cotangents):
  gradients, constants = residuals
  scaled = jax.tree.map(
    lambda x: (cotangents[0] * x).astype(x.dtype), gradients
  )
  return (*scaled, jax.tree.map(jnp.zeros_like, constants))


_sum.defvjp(_sum_fwd, _sum_bwd)


def mean_over_examples(
  compare: Compare,
  shared: Any,
  examples: Any,
  constants: Any,
  *,
  bytes_an_example: int,
  mesh: Mesh | None = None,
) -> tuple[jax.Array, Any]:
  """Mean of a loss over the examples of a batch, computed in blocks.

  Args:
    compare: (shared, examples [b, ...], constants) -> the losses [b] and what
      to report of each, [b] each and without gradient.
    shared: float arrays, with gradient.
    examples: float arrays [B, ...], with gradient.
    constants: float arrays, without gradient.
    bytes_an_example: of the logits of an example, which decide on the blocks;
      0 if all examples have to be compared at once, on all devices.
    mesh: the devices over which the examples are spread; None where the arrays
      are one device's share already.

  Returns:
    The mean loss (of this device's share without a mesh), and [B] of each
    thing to report.
  """
  batch_size = len(jax.tree.leaves(examples)[0])
  if not bytes_an_example:
    losses, values = compare(shared, examples, constants)
    return losses.mean(), jax.lax.stop_gradient(values)

  def of_device(inputs, examples, _):
    shared, constants = inputs
    share = len(jax.tree.leaves(examples)[0])
    size = blocks.examples_in_a_block(share, bytes_an_example, LOGIT_BYTES)
    loss, values = _sum(compare, size, shared, examples, constants)
    return (), (loss[None], values)

  _, (losses, values) = parallel.on_each_device(of_device, mesh)(
    (shared, constants), examples
  )
  return losses.sum() / batch_size, jax.lax.stop_gradient(values)
