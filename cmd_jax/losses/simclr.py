"""NT-Xent, the contrast of whole images (SimCLR, Chen et al. 2020)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cmd_jax.devices import sharding


def nt_xent(
  embeddings: jax.Array, *, temperature: float, axis_name: str | None
) -> jax.Array:
  """Equation 1 of Chen et al., mean over an example's two views.

  l(i, j) = -log exp(z_i z_j / tau) / sum_{k != i} exp(z_i z_k / tau)

  with j the other view of the same image and k over both views of all images
  of all devices.

  Args:
    embeddings: [B, 2, D] of length 1.
    temperature: tau.
    axis_name: axis over which the batch is spread, None if it is global.

  Returns:
    [B] nats.
  """
  batch = len(embeddings)
  others = sharding.all_gather(embeddings, axis_name)
  logits = jnp.einsum('bvd,cwd->bvcw', embeddings, others) / temperature
  # This device's examples among those of all.
  own = jnp.arange(batch) + batch * sharding.axis_index(axis_name)
  is_same_image = own[:, None] == jnp.arange(len(others))
  is_itself = is_same_image[:, None, :, None] & jnp.eye(2, dtype=bool)[:, None]
  logits = jnp.where(is_itself, -jnp.inf, logits)
  normaliser = jax.nn.logsumexp(logits, axis=(2, 3))
  positive = jnp.sum(embeddings[:, 0] * embeddings[:, 1], -1) / temperature
  return (normaliser - positive[:, None]).mean(1)
