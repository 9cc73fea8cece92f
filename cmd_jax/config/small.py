"""What makes the published settings small enough for a CPU.

Functions that change a config of `published.published`.
"""

from __future__ import annotations

from ml_collections import ConfigDict

# What trains a small encoder from nothing in minutes on a CPU. It departs from
# the published recipe where that is made for 224-pixel views, ImageNet weights
# to start from, and days:
SMALL = dict(
  batch_size=32,
  augment=dict(
    global_px=32,
    # Larger: a local view that shows background alone teaches the background.
    local_px=16,
    num_local=4,
    global_scale=(0.5, 1.0),
    local_scale=(0.25, 0.6),
    # Light is the shortcut, and colour tells fine-grained categories apart.
    jitter_prob=1.0,
    brightness=0.8,
    contrast=0.8,
    hue=0.03,
    gray_prob=0.0,
    solarize_prob=0.0,
  ),
  # With batch normalisation more is learned in so short a run
  # (benchmarks/RESEARCH.md).
  head=dict(num_prototypes=512, hidden_dim=128, bottleneck_dim=64, use_bn=True),
  optim=dict(base_learning_rate=0.01, warmup_epochs=2.0),
  # A fast teacher. Sinkhorn and a low temperature keep the targets of a small
  # batch from becoming uniform (at 0.03 -> 0.05 one seed of two collapsed).
  teacher=dict(
    base_momentum=0.95,
    final_momentum=0.99,
    warmup_temperature=0.02,
    temperature=0.03,
    warmup_temperature_epochs=6,
    normalisation='sinkhorn',
  ),
)

# Parts for small images. They need more tokens than images; local views have
# none.
_SMALL_PARTS = dict(
  method=dict(
    projector=dict(hidden_dim=128, output_dim=64),
    predictor=dict(hidden_dim=128),
    num_samples=6,
  ),
  parts=dict(view_px=64),
  augment=dict(num_local=0),
  optim=dict(
    name='adamw',
    final_learning_rate=1e-6,
    base_weight_decay=0.04,
    final_weight_decay=0.4,
    clip_norm=3.0,
    freeze_last_layer_epochs=1.0,
    decay_vectors=False,
  ),
  teacher=dict(momentum_schedule='cosine'),
  eval=dict(segmentation=dict(view_px=64, labelled_images=100, num_steps=300)),
)
_SMALL_PARTS_OF_ENCODER = dict(
  vit=dict(model=dict(patch_px=4)),
  resnet=dict(
    canvas_px=128,
    augment=dict(global_px=128),
    parts=dict(view_px=128),
    eval=dict(view_px=128),
  ),
)
_SMALL_PART_SETTINGS = dict(
  cosegmentation=dict(stride_px=4),
  hypercolumn=dict(grid_px=32, num_parts=8),
)

# A teacher of others says what to learn, so that nothing can collapse. It knows
# clean photographs: what it says of changed colours and blur teaches less.
_SMALL_DISTIL = dict(
  augment=dict(num_local=0, jitter_prob=0.0, blur_probs=(0.0, 0.0, 0.0)),
  optim=dict(
    name='adamw', base_learning_rate=4e-3, warmup_epochs=1.0, clip_norm=0.0
  ),
)

# Ends within two minutes on two cores, and learns little.
QUICKTEST = dict(
  batch_size=32,
  total_epochs=2,
  min_steps=0,
  canvas_px=32,
  augment=dict(global_px=24, local_px=16, num_local=2),
  head=dict(num_prototypes=64, hidden_dim=64, bottleneck_dim=32),
)
_QUICK_RUN = dict(
  optim=dict(warmup_epochs=0.5, freeze_last_layer_epochs=0.5),
  teacher=dict(base_momentum=0.9, warmup_temperature_epochs=1),
  eval=dict(view_px=32, batch_size=128),
  log=dict(every_steps=10),
  checkpoint=dict(every_steps=25),
)


def _shrink_model(model: ConfigDict, *, image_px: int, depth: int) -> None:
  """The smallest encoder of its kind."""
  model.update(variant='Mu', dtype='float32')
  shapes = dict(
    vit=dict(
      depth=depth,
      image_px=image_px,
      patch_px=8,
      drop_path_rate=0.0,
      pool='mean',
    ),
    swin=dict(image_px=image_px, window=4, drop_path_rate=0.0),
    efficientnet=dict(drop_path_rate=0.0),
  )
  model.update(shapes.get(model.name, {}))


def _shrink_parts(config: ConfigDict) -> None:
  """Parts for small images, trained by the small recipe."""
  config.update(_SMALL_PARTS)
  config.update(_SMALL_PARTS_OF_ENCODER.get(config.model.name, {}))
  settings = _SMALL_PART_SETTINGS.get(config.parts.source, {})
  config.parts.settings.update(settings)


def use_small_recipe(config: ConfigDict) -> None:
  """Applies `SMALL`, and what goes with it for the method and the encoder.

  Regions get half of the image's weight, and all terms but the image's rise
  from 0 over six epochs (methods of parts aside): at once or at the same weight
  the image term learns late or not at all with some seeds.
  """
  config.update(SMALL)
  _shrink_model(config.model, image_px=32, depth=3)
  if 'parts' in config:
    _shrink_parts(config)
  elif 'region' in config.method.get('weights', {}):
    config.method.weights.update(image=1.0, region=0.5)
    config.term_warmup_epochs = 6.0
  if config.method.name == 'simclr':
    config.method.projector.update(hidden_dim=128, output_dim=64)
  if config.method.name == 'distil':
    config.update(_SMALL_DISTIL)
  if config.method.get('variant') == 'released':
    # Its student_bag has no lower bound and takes all there is.
    config.method.weights.update(student_bag=0.1, teacher_bag=0.1)


def shrink_to_quicktest(config: ConfigDict) -> None:
  """Applies `QUICKTEST`: a config ends within two minutes on two cores."""
  config.update(QUICKTEST)
  _shrink_model(config.model, image_px=24, depth=2)
  if 'parts' in config:
    _shrink_parts(config)
  config.update(_QUICK_RUN)
  config.term_warmup_epochs = min(config.term_warmup_epochs, 0.5)
