"""Few-shot part segmentation on frozen feature maps: `seg/pascub5`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import tqdm
from flax import linen as nn

from cmd_jax.errors import UserError
from cmd_jax.evaluators import iou
from cmd_jax.evaluators.base import Evaluator, Splits
from cmd_jax.evaluators.features import in_chunks
from cmd_jax.evaluators.frozen_network import FrozenNetwork
from cmd_jax.models.fcn import make_decoder
from cmd_jax.models.feature_maps import check_facet

PROTOCOL = 'seg/pascub5'
# Images decoded at once when scoring: 16 at 224 px with 64 channels are 200 MB.
_CHUNK = 16


class PartMaps(NamedTuple):
  """The frozen feature maps of one split, with the parts they should tell.

  Attributes:
    maps: [N, h, w, C] features, float16 or float32. They cover the same part of
      the image as the masks: encode the whole canvas, not a central crop.
    masks: [N, H, W] uint8 part of every pixel, 0 background.
  """

  maps: np.ndarray
  masks: np.ndarray


def make_pascub5(
  *,
  view_px: int,
  facet: str,
  decoder: str,
  channels: Sequence[int],
  **recipe: Any,
) -> Evaluator:
  """`seg/pascub5` of a network: `make_part_segmentation` on its feature maps.

  Args:
    view_px: side of the views of the whole images.
    facet: what of the encoder is decoded, see `models.feature_maps`.
    decoder: kind of decoder, see `models.fcn.make_decoder`.
    channels: widths of its up-blocks.
    **recipe: arguments of `make_part_segmentation`.

  Returns:
    An evaluator, which needs part masks and no labels, giving `miou` and
    `miou_last`. Its check raises UserError for splits without part masks, a
    facet that the encoder lacks, and what `make_decoder` and
    `make_part_segmentation` refuse.
  """

  def make_score(*masks: np.ndarray) -> Callable:
    num_classes = max(int(part_ids.max()) for part_ids in masks) + 1
    module = make_decoder(
      num_classes=num_classes, variant=decoder, channels=tuple(channels)
    )
    return make_part_segmentation(module, progress=True, **recipe)

  def check(encoder: nn.Module, splits: Splits) -> None:
    if any(split is None or split.part_ids is None for split in splits):
      raise UserError(
        f'config.eval.protocols has {PROTOCOL}, but not all splits have part '
        'masks: leave it out'
      )
    check_facet(encoder, facet)
    make_score(*(split.part_ids for split in splits))

  def run(network: FrozenNetwork, splits: Splits) -> dict[str, float]:
    data = [
      PartMaps(
        network.feature_maps(split, view_px=view_px, facet=facet),
        np.asarray(split.part_ids),
      )
      for split in splits
    ]
    return make_score(*(x.masks for x in data))(*data)

  return Evaluator(PROTOCOL, run, needs_labels=False, check=check)


def make_part_segmentation(
  decoder: nn.Module,
  *,
  labelled_images: int = 0,
  num_steps: int = 500,
  batch_size: int = 8,
  learning_rate: float = 3e-3,
  num_checkpoints: int = 10,
  seed: int = 0,
  progress: bool = False,
) -> Callable[[PartMaps, PartMaps], dict[str, float]]:
  """`seg/pascub5`: a small decoder on frozen features, scored as PARTICLE does.

  The decoder is trained once, on k images of train: cross entropy averaged over
  all pixels, Adam with a cosine schedule to 0, no augmentation, every channel
  of the features standardised over the k images. `num_checkpoints` equally
  spaced states of it are scored.

  Scores are those of the released evaluation/test_miou.py: the test images, in
  their order, are cut into five folds of floor(N / 5); each fold chooses the
  checkpoint of best mean IoU on itself, which is scored on all the other test
  images; the mean of the five is `miou`. So a fifth of the test images chooses
  among the checkpoints, as published, and is left out of that score; nothing
  else sees them. `miou_last` is chosen by nothing: it is the score of the last
  checkpoint on all test images.

  The released program differs in training encoder and decoder together, with
  Adam at 1e-5, colour jitter and flips, on images cropped around the bird.

  Args:
    decoder: maps (features [B, h, w, C], (H, W), train) to [B, H, W, K] logits,
      `train` with mutable 'batch_stats', as cmd_jax.models.fcn.Decoder;
      `decoder.num_classes` is K.
    labelled_images: k, the first of a random order that `seed` fixes, so that
      fewer are a subset of more; 0 takes all.
    num_steps: steps of training.
    batch_size: images of a step; all k where there are fewer.
    learning_rate: of the first step.
    num_checkpoints: how many times the decoder is kept and scored.
    seed: of the images, their order and the decoder's initial parameters.
    progress: shows a progress bar on stderr where it takes long.

  Returns:
    An evaluator (train, test) giving `miou` and `miou_last` in [0, 1].

  Raises:
    UserError: a number that isn't positive (`labelled_images` may be 0), or
      more checkpoints than steps.
  """
  positive = dict(
    num_steps=num_steps,
    batch_size=batch_size,
    learning_rate=learning_rate,
    num_checkpoints=num_checkpoints,
  )
  for field, value in positive.items():
    if value <= 0:
      raise UserError(f'{PROTOCOL}: {field} is {value}; make it positive')
  if labelled_images < 0:
    raise UserError(
      f'{PROTOCOL}: labelled_images is {labelled_images}; give a number, or 0 '
      'for all'
    )
  if num_checkpoints > num_steps:
    raise UserError(
      f'{PROTOCOL}: {num_checkpoints} checkpoints of {num_steps} steps; '
      'lower num_checkpoints or raise num_steps'
    )

  def evaluate(train: PartMaps, test: PartMaps) -> dict[str, float]:
    _check('train', train, decoder.num_classes)
    _check('test', test, decoder.num_classes)
    if train.maps.shape[1:] != test.maps.shape[1:]:
      raise ValueError(
        f'{PROTOCOL}: maps of train are {train.maps.shape[1:]}, of test '
        f'{test.maps.shape[1:]}'
      )
    rng = np.random.default_rng(seed)
    labelled = _choose(rng, train, labelled_images)
    order = _order(rng, len(labelled.maps), num_steps, batch_size)
    checkpoints = _train_decoder(
      decoder,
      jax.random.key(seed),
      labelled,
      np.array_split(order, num_checkpoints),
      learning_rate,
    )
    counts = []
    for network in tqdm.tqdm(
      checkpoints,
      total=num_checkpoints,
      desc='parts decoder',
      unit='checkpoint',
      disable=not progress,
      delay=2,
    ):
      count = functools.partial(_count, network, decoder=decoder)
      chunk = min(_CHUNK, len(test.maps))
      counts.append(in_chunks(count, chunk, *test))
    intersections, unions = map(np.stack, zip(*counts, strict=True))
    folds = iou.cross_validate(intersections, unions)
    return {
      'miou': float(folds.miou.mean()),
      'miou_last': iou.mean_iou(intersections[-1], unions[-1]),
    }

  return evaluate


def _check(split: str, data: PartMaps, num_classes: int) -> None:
  """Raises on what can't be trained on or scored."""
  maps, masks = data
  if maps.ndim != 4 or masks.ndim != 3 or len(maps) != len(masks):
    raise ValueError(
      f'{PROTOCOL}: {split} must have maps [N, h, w, C] and masks [N, H, W], '
      f'got {maps.shape} and {masks.shape}'
    )
  if len(maps) == 0:
    raise UserError(
      f'{PROTOCOL}: the {split} split has no images with part masks; give it '
      'some or leave this protocol out'
    )
  if masks.max() >= num_classes:
    raise UserError(
      f'{PROTOCOL}: the {split} masks have part {masks.max()}, but the '
      f'decoder only {num_classes} classes, 0 to {num_classes - 1}; give it '
      'more'
    )
  broken = sum(not np.isfinite(image).all() for image in maps)
  if broken:
    raise UserError(
      f'{PROTOCOL}: {broken} of {len(maps)} {split} images have features that '
      'are not finite; use an earlier checkpoint or lower the learning rate'
    )


def _choose(
  rng: np.random.Generator, train: PartMaps, labelled_images: int
) -> PartMaps:
  """The images that the decoder is trained on."""
  count = len(train.maps)
  if labelled_images > count:
    raise UserError(
      f'{PROTOCOL}: labelled_images is {labelled_images}, but train has only '
      f'{count}; ask for at most that many, or 0 for all'
    )
  order = rng.permutation(count)
  if labelled_images in (0, count):
    return train
  chosen = np.sort(order[:labelled_images])
  return PartMaps(train.maps[chosen], train.masks[chosen])


def _order(
  rng: np.random.Generator, count: int, num_steps: int, batch_size: int
) -> np.ndarray:
  """[num_steps, batch] images: one permutation after the other."""
  batch_size = min(batch_size, count)
  epochs = -(-num_steps * batch_size // count)
  order = np.concatenate([rng.permutation(count) for _ in range(epochs)])
  order = order[: num_steps * batch_size].astype(np.int32)
  return order.reshape(num_steps, batch_size)


def _standardisation(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean [C] of every channel, and the inverse [C] of its deviation."""
  total = squares = 0.0
  # Image by image: a float64 copy of all maps would be the largest array.
  for image in maps:
    vectors = image.reshape(-1, maps.shape[-1]).astype(np.float64)
    total = total + vectors.sum(axis=0)
    squares = squares + np.square(vectors).sum(axis=0)
  count = maps[..., 0].size
  mean = total / count
  std = np.sqrt(np.maximum(squares / count - mean**2, 0))
  constant = std <= 1e-6 * np.abs(mean).clip(1e-30)
  scale = np.where(constant, 0.0, 1 / np.where(constant, 1.0, std))
  return mean.astype(np.float32), scale.astype(np.float32)


class _Network(NamedTuple):
  """A decoder under training, on features that it standardises."""

  mean: jax.Array
  scale: jax.Array
  variables: Any
  opt_state: Any


def _optimizer(
  learning_rate: float, num_steps: int
) -> optax.GradientTransformation:
  return optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))


def _train_decoder(
  decoder: nn.Module,
  key: jax.Array,
  labelled: PartMaps,
  orders: list[np.ndarray],
  learning_rate: float,
) -> Iterator[_Network]:
  """Trains a decoder; yields it after each of `orders`."""
  recipe = (learning_rate, sum(map(len, orders)))
  size = labelled.masks.shape[1:]
  init = jax.jit(decoder.init, static_argnums=2)
  variables = init(key, labelled.maps[:1], size)
  opt_state = _optimizer(*recipe).init(variables['params'])
  network = _Network(*_standardisation(labelled.maps), variables, opt_state)
  maps, masks = jax.device_put(tuple(labelled))
  for order in orders:
    network = _train(
      network, maps, masks, order, decoder=decoder, recipe=recipe
    )
    yield network


@functools.partial(jax.jit, static_argnames=('decoder', 'recipe'))
def _train(
  network: _Network,
  maps: jax.Array,
  masks: jax.Array,
  order: jax.Array,
  *,
  decoder: nn.Module,
  recipe: tuple[float, int],
) -> _Network:
  """Takes a step for every row of `order`, with no host in between."""
  optimizer = _optimizer(*recipe)

  def loss(params, batch_stats, images):
    logits, updated = decoder.apply(
      {'params': params, 'batch_stats': batch_stats},
      (maps[images] - network.mean) * network.scale,
      masks.shape[1:],
      True,
      mutable=['batch_stats'],
    )
    log_p = jax.nn.log_softmax(logits)
    truth = jax.nn.one_hot(masks[images], decoder.num_classes)
    return -(log_p * truth).sum(-1).mean(), updated

  def step(carry, images):
    variables, opt_state = carry
    params = variables['params']
    grads, updated = jax.grad(loss, has_aux=True)(
      params, variables['batch_stats'], images
    )
    updates, opt_state = optimizer.update(grads, opt_state)
    params = optax.apply_updates(params, updates)
    return ({'params': params, **updated}, opt_state), None

  carry = (network.variables, network.opt_state)
  (variables, opt_state), _ = jax.lax.scan(step, carry, order)
  return network._replace(variables=variables, opt_state=opt_state)


@functools.partial(jax.jit, static_argnames=('decoder',))
def _count(
  network: _Network, maps: jax.Array, masks: jax.Array, *, decoder: nn.Module
) -> tuple[jax.Array, jax.Array]:
  """Intersections and unions [B, K] of the predictions with the masks."""
  logits = decoder.apply(
    network.variables,
    (maps - network.mean) * network.scale,
    masks.shape[1:],
    False,
  )
  return iou.overlaps(logits.argmax(-1), masks, decoder.num_classes)
