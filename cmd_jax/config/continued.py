"""Continued pre-training: the recipe for an encoder that knows something.

What `start=pretrained` makes of a config. An encoder of ImageNet tells most
look-alikes apart before any training (README.md), and the recipes for one that
is drawn at random, with their large learning rates and fast teachers, would
make it forget that.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from cmd_jax.config import choices, vocabulary
from cmd_jax.convert import pretrained

# The published weights that are used where nothing else is asked for.
WEIGHTS = 'efficientnet_lite0'
_ENCODER = 'efficientnet'

# How fast the encoder learns, as a fraction of the heads' rate. By a fiftieth
# it hardly moves. Drawings are so unlike the photographs that the weights are
# of that it has more to learn, and less to forget.
ENCODER_SCALE = 0.1
ENCODER_SCALE_OF_DRAWINGS = 0.3

# Chosen on validation splits of real photographs: benchmarks/RESEARCH.md.
_RECIPE = dict(
  optim=dict(
    name='adamw',
    base_learning_rate=0.01,
    final_learning_rate=1e-6,
    warmup_epochs=1.0,
    # The heads are drawn, and learn to read the encoder before it is moved by
    # them, more slowly.
    freeze_encoder_epochs=1.0,
    layer_decay=1.0,
    clip_norm=3.0,
  ),
  # A slow teacher: that it changes little is what keeps the student from
  # forgetting.
  teacher=dict(base_momentum=0.99, final_momentum=1.0),
)

# For photographs and such an encoder, made for 224 pixels. Smaller views
# train faster, and what they show is as large as in whole images of 224 pixels
# (Touvron et al. 2019).
PHOTOGRAPHS = dict(
  canvas_px=224,
  total_epochs=10,
  min_steps=700,
  augment=dict(global_px=128, local_px=64, num_local=2),
  # Training images ask each other for their labels, or a validation split does.
  # The centre is as published, for photographs that nobody has cropped.
  eval=dict(view_px=224, crop_fraction=0.875, every_epochs=2.0),
  checkpoint=dict(keep_best='auto'),
)

# For drawings, which have no more in them at 224 pixels.
DRAWINGS = dict(
  canvas_px=128,
  augment=dict(global_px=96, local_px=48),
  eval=dict(view_px=128, crop_fraction=0.0),
)

# Of published EfficientNet-Lite weights. The batches are too small and the
# views too unlike photographs to renew their statistics. Tokens are made by the
# blocks that are trained, or what is asked of patches would train heads alone.
_EFFICIENTNET = dict(
  variant='lite0', batch_statistics='frozen', tokens='stride32'
)
_LAST_BLOCKS = 5


def resolve_start(words: vocabulary.Argument) -> vocabulary.Argument:
  """Fills in the start and the encoder of a config for photographs.

  The start is 'pretrained' if nothing says otherwise, the package of the
  weights is installed and the encoder is theirs. Distillation teaches a small
  encoder what the weights know, so that it starts from nothing.

  Args:
    words: whose `start` and `encoder` may be empty.
  """
  start = words.start
  if not start:
    is_open = (
      words.encoder in ('', _ENCODER)
      and words.method != 'distil'
      and not words.quicktest
    )
    is_there = is_open and pretrained.is_installed(WEIGHTS)
    start = 'pretrained' if is_there else 'scratch'
  usual = _ENCODER if start == 'pretrained' else vocabulary.USUAL.encoder
  return words._replace(start=start, encoder=words.encoder or usual)


def use_continued_recipe(config: ConfigDict, encoder_scale: float) -> None:
  """Applies the recipe.

  An encoder without published weights has the size of the published systems',
  and waits for config.init.path.

  Args:
    config: is changed.
    encoder_scale: the encoder's learning rate as a fraction of the heads'.
  """
  config.update(_RECIPE)
  config.optim.encoder_scale = encoder_scale
  dtype = config.model.dtype
  config.model.update(choices.model_fields(config.model.name))
  config.model.update(dtype=dtype, drop_path_rate=0.0)
  if config.model.name == _ENCODER:
    config.init.path = WEIGHTS
    config.model.update(_EFFICIENTNET)
    config.eval.search.update(pretrained.WEIGHTS[WEIGHTS].search)
    config.optim.train_last_blocks = _LAST_BLOCKS
