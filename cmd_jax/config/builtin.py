"""The built-in configs by name; `configs/` has a short file for each.

A config is `NAME` or `NAME:WORDS` with words such as `method=dino,quicktest`,
see `vocabulary.parse_argument`.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from cmd_jax.config import (
  continued,
  finetuned,
  published,
  small,
  vocabulary,
)


def _finish(
  config: ConfigDict,
  words: vocabulary.Argument,
  encoder_scale: float = continued.ENCODER_SCALE,
) -> ConfigDict:
  """What the words ask for besides, applied last."""
  if words.method == 'finetune':
    finetuned.use_finetune_recipe(config)
  if words.quicktest:
    small.shrink_to_quicktest(config)
  if words.start == 'pretrained':
    continued.use_continued_recipe(config, encoder_scale)
    if words.method == 'finetune':
      finetuned.use_pretrained_recipe(config)
  return config.lock()


def _use_pretrained_views(config: ConfigDict, *recipes: dict[str, Any]) -> None:
  """The views that an encoder of ImageNet is used to."""
  for recipe in recipes:
    config.update(recipe)
  if 'parts' in config:
    config.parts.view_px = config.eval.view_px
    config.augment.num_local = 0


def _published_set(argument: str | None, **dataset: str) -> ConfigDict:
  """A published set with the published settings."""
  words = vocabulary.parse_argument(argument)
  config = published.published(words)
  config.dataset.update(**dataset)
  return _finish(config, words)


def cub(argument: str | None = None) -> ConfigDict:
  """CUB-200-2011."""
  return _published_set(argument, name='cub_200_2011')


def cars(argument: str | None = None) -> ConfigDict:
  """Stanford Cars."""
  return _published_set(argument, name='stanford_cars')


def aircraft(argument: str | None = None) -> ConfigDict:
  """FGVC-Aircraft."""
  return _published_set(
    argument, name='fgvc_aircraft', pretrain_split='trainval'
  )


def folder(argument: str | None = None) -> ConfigDict:
  """A folder of photographs, from ImageNet's weights if they are installed."""
  words = vocabulary.parse_argument(argument, vocabulary.Argument(encoder=''))
  words = continued.resolve_start(words)
  config = published.published(words)
  small.use_small_recipe(config)
  config.total_epochs = 40
  config.canvas_px = 96
  config.dataset = dict(
    source='folder',
    path='',
    labels_file='labels.csv',
    test_fraction=0.2,
    # Where the listing of a large folder is kept; empty for ~/.cache.
    index_file='',
    pretrain_split='pretrain',
    test_split='test',
    validation_split='val',
  )
  config.augment.update(global_px=64, local_px=32)
  if 'image_px' in config.model:
    config.model.image_px = 64
  config.eval.update(view_px=96, crop_fraction=0.0, batch_size=128)
  if words.start == 'pretrained':
    _use_pretrained_views(config, continued.PHOTOGRAPHS)
  return _finish(config, words)


def shards(argument: str | None = None) -> ConfigDict:
  """Photographs in tar shards, with the settings of a folder."""
  config = folder(argument).unlock()
  config.dataset = dict(
    source='shards',
    train='',
    test='',
    pretrain_split='train',
    test_split='test',
    validation_split='',
  )
  return config.lock()


def _drawn_birds(words: vocabulary.Argument) -> ConfigDict:
  """The drawn birds, at sizes that the encoder of the words can read."""
  config = published.published(words)
  small.use_small_recipe(config)
  config.total_epochs = 20
  config.canvas_px = 64
  config.dataset.update(name='toybirds', builder_config='64px')
  config.eval.update(view_px=40, crop_fraction=0.0, batch_size=256)
  if words.start == 'pretrained':
    _use_pretrained_views(config, continued.PHOTOGRAPHS, continued.DRAWINGS)
    config.dataset.builder_config = f'{config.canvas_px}px'
  if words.quicktest:
    config.dataset.builder_config = '32px'
  return config


def toybirds(argument: str | None = None) -> ConfigDict:
  """The drawn birds."""
  words = vocabulary.parse_argument(argument)
  config = _drawn_birds(words)
  # Crown, beak, wing bars, tail band and breast spots tell species apart.
  config.eval.parts_hit.part_ids = (3, 4, 6, 8, 9)
  return _finish(config, words, continued.ENCODER_SCALE_OF_DRAWINGS)


def particle_toybirds(argument: str | None = None) -> ConfigDict:
  """The drawn birds, for methods of parts."""
  usual = vocabulary.Argument(method='particle')
  words = vocabulary.parse_argument(argument, usual)
  config = _drawn_birds(words)
  if 'parts' in config:
    config.parts.rounds = 2
  config.eval.protocols = ('knn/20', 'linear/logreg', 'seg/pascub5')
  return _finish(config, words, continued.ENCODER_SCALE_OF_DRAWINGS)


BUILTIN = {
  make.__name__: make
  for make in (
    aircraft,
    cars,
    cub,
    folder,
    particle_toybirds,
    shards,
    toybirds,
  )
}


def get_config(name_and_words: str) -> ConfigDict:
  """A built-in config, as `ml_collections.config_flags` asks a file for it.

  Args:
    name_and_words: `NAME` or `NAME:WORDS`.

  Raises:
    ValueError: an unknown name or word; the message lists the valid ones.
  """
  name, _, words = name_and_words.partition(':')
  if name not in BUILTIN:
    raise ValueError(
      f'unknown config {name!r}: choose one of {", ".join(BUILTIN)}, or a file'
    )
  return BUILTIN[name](words)
