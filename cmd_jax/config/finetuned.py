"""Fine-tuning by labels: what `method=finetune` makes of a config."""

from __future__ import annotations

from ml_collections import ConfigDict

# The usual recipe for a network that is trained already: a light augmentation,
# a low rate that falls towards the images, and an end when nothing is gained.
_RECIPE = dict(
  total_epochs=20,
  augment=dict(
    num_local=0,
    global_scale=(0.35, 1.0),
    jitter_prob=0.5,
    brightness=0.3,
    contrast=0.3,
    saturation=0.3,
    hue=0.02,
    gray_prob=0.0,
    blur_probs=(0.0, 0.0, 0.0),
    solarize_prob=0.0,
  ),
  optim=dict(
    name='adamw',
    base_learning_rate=0.01,
    final_learning_rate=1e-6,
    warmup_epochs=1.0,
    base_weight_decay=0.05,
    final_weight_decay=0.05,
    clip_norm=3.0,
    freeze_last_layer_epochs=0.0,
  ),
  checkpoint=dict(keep_best='top1', patience=5),
  eval=dict(
    # The same classifier over frozen features, before and after.
    protocols=('linear/logreg',),
    network='student',
    every_epochs=1.0,
  ),
)

# Of weights for photographs, which `continued` trains in part alone.
_PRETRAINED = dict(
  # What is learned is watched, and ends the run.
  min_steps=0,
  canvas_px=192,
  augment=dict(global_px=160),
  optim=dict(
    base_learning_rate=8e-3,
    # Labels tell more than the terms of other methods do.
    encoder_scale=0.25,
    layer_decay=0.8,
    train_last_blocks=-1,
  ),
  # What is searched by is what the labels have made.
  eval=dict(view_px=160, search=dict(view_px=0, pooling='encoder')),
)


def use_finetune_recipe(config: ConfigDict) -> None:
  """Applies the recipe for any encoder."""
  config.update(_RECIPE)


def use_pretrained_recipe(config: ConfigDict) -> None:
  """Applies what else weights for photographs ask for."""
  config.update(_PRETRAINED)
