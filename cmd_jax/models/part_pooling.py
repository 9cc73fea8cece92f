"""Mean features of an image's parts, as PARTICLE's and DetCon's MaskPooling."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cmd_jax.errors import UserError

# Weight of a part that is not in the view when parts are drawn.
_ABSENT_WEIGHT = 1e-11


def token_grid(image_px: tuple[int, int], num_tokens: int) -> tuple[int, int]:
  """Rows and columns of an encoder's tokens, in the shape of the image.

  Args:
    image_px: height and width.
    num_tokens: number of tokens.

  Raises:
    UserError: the tokens are no grid of that shape, or it does not divide the
      image evenly.
  """
  height, width = image_px
  rows = round((num_tokens * height / width) ** 0.5)
  columns = num_tokens // max(rows, 1)
  if rows * columns != num_tokens or height % rows or width % columns:
    raise UserError(
      f'{num_tokens} tokens cannot share out a view of {height} x {width} '
      'pixels evenly, as pooling over parts needs: set '
      "config.augment.global_px to a multiple of the step of the encoder's "
      'tokens'
    )
  return rows, columns


def part_of_each_token(
  part_ids: jax.Array, *, num_parts: int, grid: tuple[int, int]
) -> jax.Array:
  """The part that covers most of each token's cell.

  argmax_p area(p); the first one on ties, and part 0 for a cell without any
  (MaskPooling.pool_masks).

  Args:
    part_ids: [..., H, W] unsigned integers; ids from `num_parts` on, such as
      255, are no part.
    num_parts: P.
    grid: rows and columns of the tokens.

  Returns:
    [..., N] int32.
  """
  *leading, height, width = part_ids.shape
  rows, columns = grid
  cells = part_ids.reshape(
    *leading, rows, height // rows, columns, width // columns
  )
  is_part = cells[..., None] == jnp.arange(num_parts)
  areas = is_part.sum((-4, -2), dtype=jnp.int32)  # [..., rows, columns, P]
  return areas.argmax(-1).reshape(*leading, -1).astype(jnp.int32)


def present_parts(token_parts: jax.Array, num_parts: int) -> jax.Array:
  """[..., N] parts of the tokens -> [..., P] bool, which of them there are."""
  return (token_parts[..., None] == jnp.arange(num_parts)).any(-2)


def sample_parts(
  keys: jax.Array, present: jax.Array, num_samples: int
) -> jax.Array:
  """Draws parts without replacement, those that are present first.

  A present part has weight 1, an absent one 1e-11 (MaskPooling.sample_masks):
  where fewer are present than wanted, absent ones fill up. The largest S of
  log(weight) + Gumbel noise are such a draw (Kool et al. 2019).

  Args:
    keys: [B] random keys, one an example.
    present: [B, V, P] bool.
    num_samples: S, at most P.

  Returns:
    [B, V, S] int32, distinct along the last axis.
  """
  log_weight = jnp.where(present, 0.0, jnp.log(_ABSENT_WEIGHT))
  noise = jax.vmap(lambda key: jax.random.gumbel(key, present.shape[1:]))(keys)
  _, ids = jax.lax.top_k(log_weight + noise, num_samples)
  return ids


def part_masks(token_parts: jax.Array, ids: jax.Array) -> jax.Array:
  """Weights of the tokens in the mean over each part.

  m / max(area, 1) (MaskPooling.forward); 0 everywhere for an empty part.

  Args:
    token_parts: [..., N] int32.
    ids: [..., S] int32.

  Returns:
    [..., S, N] that add up to 1, or to 0 for an empty part.
  """
  masks = (token_parts[..., None, :] == ids[..., None]).astype(float)
  return masks / jnp.maximum(masks.sum(-1, keepdims=True), 1)


def pool_parts(
  features: jax.Array, token_parts: jax.Array, ids: jax.Array
) -> jax.Array:
  """Mean features of parts, 0 for an empty one.

  Args:
    features: [..., N, D].
    token_parts: [..., N] int32.
    ids: [..., S] int32.

  Returns:
    [..., S, D].
  """
  return part_masks(token_parts, ids) @ features
