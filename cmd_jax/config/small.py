"""What makes the published settings small enough for a CPU.

Functions that change a config of `published.published`.
"""

from __future__ import annotations

from ml_collections import ConfigDict


def _shrink_model(model: ConfigDict, *, image_px: int, depth: int) -> None:
  """The smallest encoder of its kind."""
  model.update(variant='Mu', dtype='float32')
  if model.name == 'vit':
    model.update(
      depth=depth,
      image_px=image_px,
      patch_px=8,
      drop_path_rate=0.0,
      pool='mean',
    )
  elif model.name == 'swin':
    model.update(image_px=image_px, window=4, drop_path_rate=0.0)
  elif model.name == 'efficientnet':
    model.update(drop_path_rate=0.0)


def use_small_recipe(config: ConfigDict) -> None:
  """What trains a small encoder from nothing in minutes on a CPU.

  It departs from the published recipe where that is made for 224-pixel views,
  ImageNet weights to start from, and days:

  - few prototypes, a fast teacher and a high learning rate;
  - batch normalisation in the heads, with which more is learned in so short a
    run (benchmarks/RESEARCH.md);
  - Sinkhorn rather than centring and a colder teacher, which keep the targets
    of a small batch from becoming uniform (at 0.03 -> 0.05 one seed of two
    collapsed);
  - larger local views: one that shows background alone teaches the background;
  - more brightness and contrast jitter, because light is the shortcut, and less
    of hue and gray, because colour tells fine-grained categories apart;
  - regions at half of the image's weight, and all terms but the image's rising
    from 0 over six epochs (methods of parts aside): at once or at the same
    weight the image term learns late or not at all with some seeds.
  """
  config.batch_size = 32
  config.augment.update(
    global_px=32,
    local_px=16,
    num_local=4,
    global_scale=(0.5, 1.0),
    local_scale=(0.25, 0.6),
    jitter_prob=1.0,
    brightness=0.8,
    contrast=0.8,
    hue=0.03,
    gray_prob=0.0,
    solarize_prob=0.0,
  )
  _shrink_model(config.model, image_px=32, depth=3)
  config.head.update(
    num_prototypes=512, hidden_dim=128, bottleneck_dim=64, use_bn=True
  )
  config.optim.update(base_learning_rate=0.01, warmup_epochs=2.0)
  config.teacher.update(
    base_momentum=0.95,
    final_momentum=0.99,
    warmup_temperature=0.02,
    temperature=0.03,
    warmup_temperature_epochs=6,
    normalisation='sinkhorn',
  )
  if 'parts' in config:
    _shrink_parts(config)
  elif 'region' in config.method.get('weights', {}):
    config.method.weights.update(image=1.0, region=0.5)
    config.term_warmup_epochs = 6.0
  if config.method.name == 'simclr':
    config.method.projector.update(hidden_dim=128, output_dim=64)
  if config.method.get('variant') == 'released':
    # Its student_bag has no lower bound and takes all there is.
    config.method.weights.update(student_bag=0.1, teacher_bag=0.1)


def _shrink_parts(config: ConfigDict) -> None:
  """Parts for small images, trained by the small recipe."""
  config.method.projector.update(hidden_dim=128, output_dim=64)
  config.method.predictor.hidden_dim = 128
  config.method.num_samples = 6
  config.parts.view_px = 64
  # Parts need more tokens than images; local views have no parts.
  config.augment.num_local = 0
  if config.model.name == 'vit':
    config.model.patch_px = 4
  if config.model.name == 'resnet':
    config.canvas_px = 128
    config.augment.global_px = 128
    config.parts.view_px = 128
    config.eval.view_px = 128
  if config.parts.source == 'cosegmentation':
    config.parts.settings.stride_px = 4
  if config.parts.source == 'hypercolumn':
    config.parts.settings.grid_px = 32
    config.parts.settings.num_parts = 8
  config.optim.update(
    name='adamw',
    final_learning_rate=1e-6,
    base_weight_decay=0.04,
    final_weight_decay=0.4,
    clip_norm=3.0,
    freeze_last_layer_epochs=1.0,
    decay_vectors=False,
  )
  config.teacher.momentum_schedule = 'cosine'
  config.eval.segmentation.update(
    view_px=64, labelled_images=100, num_steps=300
  )


def shrink_to_quicktest(config: ConfigDict) -> None:
  """Makes a config end within two minutes on two cores, learning little."""
  config.batch_size = 32
  config.total_epochs = 2
  config.canvas_px = 32
  config.augment.update(global_px=24, local_px=16, num_local=2)
  _shrink_model(config.model, image_px=24, depth=2)
  config.head.update(num_prototypes=64, hidden_dim=64, bottleneck_dim=32)
  if 'parts' in config:
    _shrink_parts(config)
  config.optim.update(warmup_epochs=0.5, freeze_last_layer_epochs=0.5)
  config.term_warmup_epochs = min(config.term_warmup_epochs, 0.5)
  config.teacher.update(base_momentum=0.9, warmup_temperature_epochs=1)
  config.eval.update(view_px=32, batch_size=128)
  config.log.every_steps = 10
  config.checkpoint.every_steps = 25
