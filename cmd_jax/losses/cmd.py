"""Cross-level distillation inside one network (CMD, Bi et al. 2025).

The two levels are the image and the bag of its regions. The paper's text beyond
its abstract was not available and the released expression is undefined at the
published initialisation, so `cross_level_kl` is the
definition of this project; `released_kl` is the released expression where it
is defined.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Smallest normal float32: keeps the logarithm of an underflowed probability
# finite without moving any other.
_TINY = jnp.finfo(jnp.float32).tiny

POOLINGS = ('gated_attention', 'attention', 'strength', 'mean', 'max')
KL_DIRECTIONS = ('image_to_bag', 'bag_to_image')


def cross_level_kl(
  image_probs: jax.Array, bag_probs: jax.Array, *, direction: str
) -> jax.Array:
  """KL between the image's distribution and its bag's.

  'image_to_bag': KL( stopgrad P^I || P^bag )
  'bag_to_image': KL( P^bag || stopgrad P^I )

  P^bag = sum_i a_i P^R_i with attention (uniform attention is mean pooling).
  The mean over the views is L_S with the student's distributions and L_T with
  the teacher's; in the latter the attention is all that has a gradient, which
  teaches it which patches explain the image. The sums over blocks of prototypes
  add up.

  Args:
    image_probs: [..., K].
    bag_probs: [..., K].
    direction: one of `KL_DIRECTIONS`.

  Returns:
    [...] nats.
  """
  image_probs = jax.lax.stop_gradient(image_probs)
  log_image = jnp.log(jnp.maximum(image_probs, _TINY))
  log_bag = jnp.log(jnp.maximum(bag_probs, _TINY))
  if direction == 'image_to_bag':
    divergence = image_probs * (log_image - log_bag)
  else:
    divergence = bag_probs * (log_bag - log_image)
  return divergence.sum(-1)


def normalised_kl(
  divergence: jax.Array, mass: jax.Array, *, direction: str
) -> jax.Array:
  """`cross_level_kl` of a bag divided by its sum, from those of the bag itself.

  The maximum over the regions, m_k = max_i P^R_ik, is no distribution before:

    KL( P || m / Z ) = sum_k P_k (log P_k - log m_k) + log Z
    KL( m / Z || P ) = sum_k m_k (log m_k - log P_k) / Z - log Z

  Args:
    divergence: [...], `cross_level_kl` with m.
    mass: [...], Z = sum_k m_k.
    direction: one of `KL_DIRECTIONS`.
  """
  if direction == 'image_to_bag':
    return divergence + jnp.log(mass)
  return divergence / mass - jnp.log(mass)


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
