"""Multi-crop views, made from canvases inside the compiled step.

The recipe is that of DINO and EsViT (facebookresearch/dino, main_dino.py
`DataAugmentationDINO`, torchvision semantics). It departs from it in three
places: the order of the colour jitter is drawn per step and view group, not per
view (see `photometric.color_jitter`); the blur is a true Gaussian whose sigma
follows the size of the global views (see `make_augment`); and nothing is
rounded to 8 bits between the operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cmd_jax.data import channels
from cmd_jax.data.augment import geometry, photometric
from cmd_jax.data.batch import Views
from cmd_jax.devices import chunking, sharding
from cmd_jax.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = channels.IMAGENET

# On a CPU, what is made of a block of examples stays near its cores.
_CACHE_BYTES = 9 * 2**20
# The size of global view for which `blur_sigma` is given.
_BLUR_REFERENCE_PX = 224

Augment = Callable[..., Views]


class _Group(NamedTuple):
  """What the views of one size have in common; one probability per view."""

  view_px: int
  scale: tuple[float, float]
  blur_probs: tuple[float, ...]
  solarize_probs: tuple[float, ...]

  def halves(self) -> tuple[_Group, _Group]:
    """The first half of the views, the larger one, and the second."""
    middle = -(-len(self.blur_probs) // 2)
    return (
      self._replace(
        blur_probs=self.blur_probs[:middle],
        solarize_probs=self.solarize_probs[:middle],
      ),
      self._replace(
        blur_probs=self.blur_probs[middle:],
        solarize_probs=self.solarize_probs[middle:],
      ),
    )


class _Recipe(NamedTuple):
  """What all views have in common; see `make_augment`."""

  ratio: tuple[float, float]
  flip_prob: float
  jitter_prob: float
  brightness: float
  contrast: float
  saturation: float
  hue: float
  gray_prob: float
  blur_sigma: tuple[float, float]
  blur_scale: float
  mean: tuple[float, ...]
  std: tuple[float, ...]


class _Appearance(NamedTuple):
  """The drawn photometric parameters of a group, [B, V] each."""

  jitter: photometric.JitterFactors
  gray: jax.Array
  sigma: jax.Array
  solarize: jax.Array


def _to_planes(canvases: jax.Array) -> jax.Array:
  """[B, R, R, C] uint8 or uint16 -> [B, C, R, R] float32 in 0..1."""
  white = float(jnp.iinfo(canvases.dtype).max)
  return jnp.moveaxis(canvases.astype(jnp.float32) / white, -1, 1)


def _normalise(
  views: jax.Array,
  mean: tuple[float, ...],
  std: tuple[float, ...],
) -> jax.Array:
  """[..., 3, H, W] in 0..1 -> [..., H, W, 3] in standard deviations."""
  views = jnp.moveaxis(views, -3, -1)
  return (views - jnp.array(mean)) / jnp.array(std)


def _draw_appearance(
  keys: jax.Array, group: _Group, recipe: _Recipe
) -> _Appearance:
  """Draws what `photometric` needs; an operation left out draws neutral."""
  num_views = len(group.blur_probs)
  draws = jax.vmap(lambda key: jax.random.uniform(key, (9, num_views)))(keys)
  jitter_draw, *factor_draws = jnp.moveaxis(draws, 1, 0)  # [B, V] each
  *factor_draws, gray_draw, blur_draw, sigma_draw, solarize_draw = factor_draws
  jittered = jitter_draw < recipe.jitter_prob

  def factor(draw: jax.Array, reach: float) -> jax.Array:
    low = max(0.0, 1.0 - reach)
    return jnp.where(jittered, low + (1.0 + reach - low) * draw, 1.0)

  low, high = (sigma * recipe.blur_scale for sigma in recipe.blur_sigma)
  return _Appearance(
    jitter=photometric.JitterFactors(
      brightness=factor(factor_draws[0], recipe.brightness),
      contrast=factor(factor_draws[1], recipe.contrast),
      saturation=factor(factor_draws[2], recipe.saturation),
      hue=jnp.where(jittered, recipe.hue * (2.0 * factor_draws[3] - 1.0), 0.0),
    ),
    gray=gray_draw < recipe.gray_prob,
    sigma=jnp.where(
      blur_draw < jnp.array(group.blur_probs),
      low + (high - low) * sigma_draw,
      0.0,
    ),
    solarize=solarize_draw < jnp.array(group.solarize_probs),
  )


def _make_views(
  images: jax.Array,
  sizes: jax.Array,
  keys: jax.Array,
  step_key: jax.Array,
  group: _Group,
  recipe: _Recipe,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Views of one size: [B, V, G, G, 3], boxes [B, V, 4] and flips [B, V]."""
  num_views = len(group.blur_probs)
  crop_keys, flip_keys, look_keys = jnp.moveaxis(
    jax.vmap(lambda key: jax.random.split(key, 3))(keys), 1, 0
  )
  boxes = geometry.sample_crop_boxes(
    crop_keys,
    sizes,
    num_views=num_views,
    scale=group.scale,
    ratio=recipe.ratio,
  )
  boxes = geometry.as_fractions(boxes, sizes)
  flips = jax.vmap(
    lambda key: jax.random.bernoulli(key, recipe.flip_prob, (num_views,))
  )(flip_keys)
  look = _draw_appearance(look_keys, group, recipe)
  order = jax.random.permutation(step_key, 4)

  views = geometry.crop_and_resize(images, boxes, flips, group.view_px)
  views = photometric.color_jitter(views, look.jitter, order)
  if photometric.has_colours(views):
    gray = jnp.where(look.gray, 0.0, 1.0)
    views = photometric.adjust_saturation(views, gray)
  views = photometric.gaussian_blur(
    views,
    look.sigma,
    max_sigma=recipe.blur_sigma[1] * recipe.blur_scale,
  )
  if any(group.solarize_probs):
    views = photometric.solarize(views, look.solarize)
  return _normalise(views, recipe.mean, recipe.std), boxes, flips


def _make_group(
  images: tuple[jax.Array, jax.Array],
  partners: tuple[jax.Array, jax.Array] | None,
  keys: jax.Array,
  step_key: jax.Array,
  group: _Group,
  recipe: _Recipe,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """As `_make_views`, of images and sizes; half of their partners."""
  first, second = group.halves()
  if partners is None or not second.blur_probs:
    return _make_views(*images, keys, step_key, group, recipe)
  of_images = _make_views(*images, keys, step_key, first, recipe)
  keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
  of_partners = _make_views(*partners, keys, step_key, second, recipe)
  return jax.tree.map(
    lambda *x: jnp.concatenate(x, axis=1), of_images, of_partners
  )


def make_augment(
  *,
  global_px: int = 224,
  local_px: int = 96,
  num_local: int = 8,
  global_scale: tuple[float, float] = (0.4, 1.0),
  local_scale: tuple[float, float] = (0.05, 0.4),
  ratio: tuple[float, float] = (3 / 4, 4 / 3),
  flip_prob: float = 0.5,
  jitter_prob: float = 0.8,
  brightness: float = 0.4,
  contrast: float = 0.4,
  saturation: float = 0.2,
  hue: float = 0.1,
  gray_prob: float = 0.2,
  blur_probs: tuple[float, float, float] = (1.0, 0.1, 0.5),
  blur_sigma: tuple[float, float] = (0.1, 2.0),
  solarize_prob: float = 0.2,
  mean: tuple[float, ...] = IMAGENET_MEAN,
  std: tuple[float, ...] = IMAGENET_STD,
  mesh: Mesh | None = None,
) -> Augment:
  """Makes the function that turns canvases into multi-crop views.

  In this order: random resized crop and flip, colour jitter, grayscale, blur,
  solarise, normalise. The defaults are the published ones. Of images with other
  than three channels saturation, hue and grayscale are left out.

  Args:
    global_px: side G of the two global views.
    local_px: side g of the local views.
    num_local: L, number of local views; may be 0.
    global_scale: area of a global crop as a fraction of the original's.
    local_scale: area of a local crop.
    ratio: aspect ratio (width / height) of a crop in the original.
    flip_prob: probability of the horizontal flip.
    jitter_prob: probability of the colour jitter.
    brightness: factor drawn from 1 - brightness .. 1 + brightness.
    contrast: likewise.
    saturation: likewise.
    hue: shift drawn from -hue .. hue, in turns.
    gray_prob: probability of grayscale.
    blur_probs: probability of the blur for the first global, the second global
      and each local view.
    blur_sigma: range of its sigma in pixels where global views have 224; with
      others it grows or shrinks in proportion, for local views alike.
    solarize_prob: probability of solarising the second global view.
    mean: mean of the channels, in 0..1.
    std: their standard deviation.
    mesh: the devices over which a global batch is spread; None for arrays of
      one device.

  Returns:
    (canvases [B, R, R, 3] uint8, sizes [B, 2] int32, keys [B], step_key,
    part_ids [B, R, R] uint8 or None, partners or None) -> `Views`, pure and
    jittable. `sizes` are the heights and widths in pixels of the originals that
    were squashed into the canvases. Partners, canvases and sizes of as many
    other images, give the second global view and the second half of the local
    ones in place of the example itself. Everything is drawn from
    the example's own key, but the order of the colour jitter from `step_key`,
    one for the global and one for the local views. An example's views therefore
    do not depend on the rest of its batch, if the keys' generator is threefry
    (JAX's default) and not rbg, whose batched draws are not those of its keys.

  Raises:
    UserError: an argument is out of its range.
  """
  recipe = _Recipe(
    ratio=ratio,
    flip_prob=flip_prob,
    jitter_prob=jitter_prob,
    brightness=brightness,
    contrast=contrast,
    saturation=saturation,
    hue=hue,
    gray_prob=gray_prob,
    blur_sigma=blur_sigma,
    blur_scale=global_px / _BLUR_REFERENCE_PX,
    mean=mean,
    std=std,
  )
  _check_recipe(recipe)
  if len(blur_probs) != 3:
    raise UserError(
      f'config.augment.blur_probs is {blur_probs}: give three probabilities, '
      'for the first global, the second global and the local views'
    )
  if num_local < 0:
    raise UserError(f'config.augment.num_local is {num_local}: give 0 or more')
  first_blur, second_blur, local_blur = blur_probs
  global_group = _Group(
    global_px, global_scale, (first_blur, second_blur), (0.0, solarize_prob)
  )
  local_group = _Group(
    local_px, local_scale, (local_blur,) * num_local, (0.0,) * num_local
  )
  for prob in blur_probs:
    _check_probability('blur_probs', prob)
  _check_probability('solarize_prob', solarize_prob)
  _check_group('global', global_group)
  _check_group('local', local_group)

  def augment(
    canvases: jax.Array,
    sizes: jax.Array,
    keys: jax.Array,
    step_key: jax.Array,
    part_ids: jax.Array | None = None,
    partners: tuple[jax.Array, jax.Array] | None = None,
  ) -> Views:
    examples = canvases, sizes, keys, part_ids, partners
    _, views = spread(step_key, examples)
    return views

  def augment_share(step_key, examples, _):
    if sharding.platform_of(mesh) != 'cpu':
      return (), augment_together(step_key, *examples)
    canvases, *_, partners = examples
    floats = math.prod(canvases.shape[1:]) * (1 if partners is None else 2)
    floats += canvases.shape[-1] * (2 * global_px**2 + num_local * local_px**2)
    size = chunking.examples_in_a_block(len(canvases), 4 * floats, _CACHE_BYTES)
    views = jax.lax.map(
      lambda block: augment_together(step_key, *block),
      chunking.split(examples, size),
    )
    return (), chunking.join(views)

  def augment_together(step_key, canvases, sizes, keys, part_ids, partners):
    images = _to_planes(canvases), sizes
    if partners is not None:
      partners = _to_planes(partners[0]), partners[1]
    group_keys = jax.vmap(lambda key: jax.random.split(key, 2))(keys)
    order_keys = jax.random.split(step_key, 2)
    global_views, global_boxes, global_flips = _make_group(
      images, partners, group_keys[:, 0], order_keys[0], global_group, recipe
    )
    local_views, local_boxes, local_flips = _make_group(
      images, partners, group_keys[:, 1], order_keys[1], local_group, recipe
    )
    global_part_ids = None
    if part_ids is not None:
      global_part_ids = geometry.crop_part_ids(
        part_ids, global_boxes, global_flips, global_px
      )
    return Views(
      global_views=global_views,
      local_views=local_views,
      global_boxes=global_boxes,
      local_boxes=local_boxes,
      global_flips=global_flips,
      local_flips=local_flips,
      global_part_ids=global_part_ids,
    )

  spread = sharding.on_each_device(augment_share, mesh)
  return augment


def make_eval_view(
  *,
  view_px: int = 224,
  crop_fraction: float | None = 0.875,
  mean: tuple[float, ...] = IMAGENET_MEAN,
  std: tuple[float, ...] = IMAGENET_STD,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """Makes the function that turns canvases into the one view of an evaluation.

  The default is resizing the shorter side to 256 and cutting out the central
  224 pixels: the pixels beyond the border of the crop count as they do there.

  Args:
    view_px: side G of the view.
    crop_fraction: side of the central square over the shorter side; None: all.
    mean: mean of the channels, in 0..1.
    std: their standard deviation.

  Returns:
    (canvases [B, R, R, 3] uint8, sizes [B, 2] int32) -> [B, G, G, 3] float32,
    normalised.

  Raises:
    UserError: `view_px` or `crop_fraction` is out of its range.
  """
  if view_px < 1:
    raise UserError(f'config.eval.view_px is {view_px}: give a positive number')
  if crop_fraction is not None and not 0.0 < crop_fraction <= 1.0:
    raise UserError(
      f'config.eval.crop_fraction is {crop_fraction}: give a number above 0 '
      'and at most 1, or 0 for the whole image'
    )

  def eval_view(canvases: jax.Array, sizes: jax.Array) -> jax.Array:
    images = _to_planes(canvases)
    if crop_fraction is None:
      boxes = jnp.tile(jnp.array([0.0, 0.0, 1.0, 1.0]), (sizes.shape[0], 1))
    else:
      boxes = geometry.central_square(sizes, crop_fraction)
    flips = jnp.zeros((sizes.shape[0], 1), bool)
    views = geometry.crop_and_resize(
      images, boxes[:, None], flips, view_px, truncate=False
    )
    return _normalise(views[:, 0], mean, std)

  return eval_view


def _check_recipe(recipe: _Recipe) -> None:
  for name in ('flip_prob', 'jitter_prob', 'gray_prob'):
    _check_probability(name, getattr(recipe, name))
  for name in ('brightness', 'contrast', 'saturation'):
    if getattr(recipe, name) < 0:
      raise UserError(
        f'config.augment.{name} is {getattr(recipe, name)}: give 0 or more'
      )
  if not 0 <= recipe.hue <= 0.5:
    raise UserError(f'config.augment.hue is {recipe.hue}: give 0..0.5 turns')
  for name in ('ratio', 'blur_sigma'):
    low, high = getattr(recipe, name)
    if not 0 < low <= high:
      raise UserError(
        f'config.augment.{name} is ({low}, {high}): give two positive numbers, '
        'the '
        'smaller first'
      )


def _check_group(name: str, group: _Group) -> None:
  if group.view_px < 1:
    raise UserError(
      f'config.augment.{name}_px is {group.view_px}: give a positive number'
    )
  low, high = group.scale
  if not 0 < low <= high <= 1:
    raise UserError(
      f'config.augment.{name}_scale is ({low}, {high}): give two fractions '
      'above 0 and at most 1, the smaller first'
    )


def _check_probability(name: str, value: float) -> None:
  if not 0 <= value <= 1:
    raise UserError(
      f'config.augment.{name} has {value}: give a probability, 0..1'
    )
