"""Cross-level distillation inside one network (CMD, Bi et al. 2025).

The two levels are the image and the bag of its regions. The paper's text beyond
its abstract was not available and the released expression is undefined at the
published initialisation, so `bag_distribution` and `cross_level_kl` are the
definitions of this project; `released_kl` is the released expression where it
is defined.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Smallest normal float32: keeps the logarithm of an underflowed probability
# finite without moving any other.
_TINY = jnp.finfo(jnp.float32).tiny

POOLINGS = ('gated_attention', 'attention', 'mean', 'max')
KL_DIRECTIONS = ('image_to_bag', 'bag_to_image')


def bag_distribution(
  region_probs: jax.Array, attention: jax.Array | None
) -> jax.Array:
  """Pools the distributions of a bag's regions into one.

  P^bag = sum_i a_i P^R_i with attention (uniform attention is mean pooling);
  without, the maximum over the regions, normalised.

  Args:
    region_probs: [..., N, K].
    attention: [..., N] that adds up to 1 over N; None pools by the maximum.

  Returns:
    [..., K] that adds up to 1.
  """
  if attention is not None:
    return jnp.einsum('...n,...nk->...k', attention, region_probs)
  peak = region_probs.max(-2)
  return peak / peak.sum(-1, keepdims=True)


def cross_level_kl(
  image_probs: jax.Array, bag_probs: jax.Array, *, direction: str
) -> jax.Array:
  """KL between the image's distribution and its bag's, mean over the views.

  'image_to_bag': KL( stopgrad P^I || P^bag )
  'bag_to_image': KL( P^bag || stopgrad P^I )

  L_S with the student's distributions and L_T with the teacher's; in the
  latter the attention is all that has a gradient, which teaches it which
  patches explain the image.

  Args:
    image_probs: [B, V, K].
    bag_probs: [B, V, K].
    direction: one of `KL_DIRECTIONS`.

  Returns:
    [B] nats.
  """
  image_probs = jax.lax.stop_gradient(image_probs)
  log_image = jnp.log(jnp.maximum(image_probs, _TINY))
  log_bag = jnp.log(jnp.maximum(bag_probs, _TINY))
  if direction == 'image_to_bag':
    divergence = image_probs * (log_image - log_bag)
  else:
    divergence = bag_probs * (log_bag - log_image)
  return divergence.sum(-1).mean(-1)


def released_kl(image: jax.Array, region_sum: jax.Array) -> jax.Array:
  """The cross-level expression of the released program, over prototypes.

  sum_k r_k (log r_k - p_k), elements with r_k <= 0 contributing neither value
  nor gradient (main_esvit.py `DDINOLoss.forward`: `kl_div` with its arguments
  as they are there, before its division by K). The program itself takes the
  logarithm of negative r: its loss is NaN.

  In the teacher p are the image's probabilities and r the sum over the regions
  of theirs. In the student both are logits / tau_s, so that this is no
  divergence and has no lower bound.

  Args:
    image: [..., K], p.
    region_sum: [..., K], r.

  Returns:
    [...].
  """
  defined = region_sum > 0
  r = jnp.where(defined, region_sum, 1.0)
  return jnp.where(defined, r * (jnp.log(r) - image), 0.0).sum(-1)
